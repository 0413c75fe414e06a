"""FwdLLM: synchronous zeroth-order steps, with as many directions as the spread of the estimate asks for (methods.md 2.7).

    device: a_k = [f(w + h v_k; B) - f(w - h v_k; B)] / (2 h), k <= P
    all:    var = mean over entries of one tensor of (x - y)^2 / 2, x and y the means of a v over the first and the
            second half of all contributions; while var > threshold: one more direction from every device, same B
    all:    G = mean of all a v;  w <- w - lr G

In every second round v is chosen: of 10 draws for a tensor, that with the largest cosine to the tensor's last G. The
estimate then leans towards the last one by design and is not unbiased. Scalars travel and every replica keeps the last G,
so that all choose, judge and step alike. A local step is one batch. The published code adds contributions up where this
takes their mean, and sets no bound on the retries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from pydantic import Field

from fedbench.algorithms.base import Lab, Reply, Round, ScalarMethod, StepSize, Upload
from fedbench.algorithms.base import Settings as BaseSettings
from fedbench.base.arrays import Arrays
from fedbench.base.errors import ConfigError
from fedbench.models.trainable import Tensor
from fedbench.zo import draw
from fedbench.zo.direction import Direction, as_keys, direction_key
from fedbench.zo.estimate import central
from fedbench.zo.ranges import OnDemand

#: Draws among which a tensor's direction is chosen.
CANDIDATES = 10


class Settings(BaseSettings):
    """FwdLLM's settings."""

    lr: StepSize = 5e-3
    h: float = Field(0.0, ge=0, description="probing step (the paper: 0.01); 0 is zo.epsilon")
    variance_threshold: float = Field(0.1, ge=0, description="more directions above this variance; 0: no check")
    variance_tensor: int = Field(-1, ge=-1, description="trainable tensor that is checked; -1: the middle one")
    max_directions: int = Field(10, ge=0, description="most directions of a device beyond the first in a step")


class FwdLLM(ScalarMethod):
    """Steps wait until enough directions agree; directions lean on the last step."""

    name = "fwdllm"
    summary = "synchronous zeroth-order steps, more directions while the estimate varies"
    settings_type: ClassVar[type[BaseSettings]] = Settings
    settings: Settings

    def __init__(self, settings: BaseSettings, lab: Lab) -> None:
        super().__init__(settings, lab)
        tensors = lab.trainable.tensors
        index = self.settings.variance_tensor
        if index >= len(tensors):
            raise ConfigError(f"method.fwdllm.variance_tensor: found {index}; allowed: -1 .. {len(tensors) - 1}.")
        self._checked = tensors[index if index >= 0 else len(tensors) // 2]
        self._last = {t.name: np.zeros(t.size, np.float32) for t in tensors}  # G of the last step
        self._step = 0
        self._kept: list[np.ndarray] = []  # scalars [M, n] of this step's exchanges so far

    @property
    def query_radius(self) -> float:
        """h: directions have entries of mean square 1."""
        return self.settings.h or self.lab.epsilon

    def scalars(self, round_: Round) -> int:
        """P, and one in each exchange that asks for more."""
        return 1 if self._kept else self.lab.perturbations

    def local(self, round_: Round, device: int, plan: Arrays) -> Upload:
        """Return a along the next directions of the step."""
        lab, h = self.lab, self.query_radius
        batch = lab.private(round_.number, self._step, device)
        done = sum(kept.shape[1] for kept in self._kept)
        a = np.empty(self.scalars(round_), np.float32)
        losses = []
        for k in range(len(a)):
            plus, minus = lab.stream.losses(batch, self._direction(round_, device, done + k), h)
            a[k] = central(plus, minus, h)
            losses.append((plus + minus) / 2)
        return Upload({"scalars": a}, float(np.mean(losses)))

    def combine(self, round_: Round, uploads: Mapping[int, Arrays]) -> Reply:
        """Return all scalars; another exchange where more directions are wanted or a local step is left."""
        reply = super().combine(round_, uploads)
        more = self._varies(round_, [*self._kept, reply.arrays["scalars"]])
        return reply._replace(again=more or self._step + 1 < self.lab.local_steps)

    def apply(self, round_: Round, plan: Arrays, reply: Arrays) -> None:
        """Keep the scalars; w <- w - lr G once they agree."""
        self._kept.append(np.array(reply["scalars"]))
        if self._varies(round_, self._kept):
            return
        lab = self.lab
        a, numbers = self._contributions(round_, self._kept)
        coef = (a / np.float32(len(a))).astype(np.float32)
        for tensor in lab.trainable:
            g = draw.total(tensor, self._keys(round_, tensor, numbers), coef, gaussian=lab.gaussian)
            tensor.add(np.float32(-round_.lr) * g)
            self._last[tensor.name] = g
        draws = CANDIDATES + 1 if self._chooses(round_) else 1
        self.replay_ops += float(draws * len(a) * lab.trainable.size)
        self._kept = []
        self._step = (self._step + 1) % lab.local_steps

    def state(self) -> dict[str, np.ndarray]:
        """The last G."""
        return dict(self._last)

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take the last G back."""
        self._last = {name: np.array(state[name]) for name in self._last}

    def variance(self, round_: Round, kept: list[np.ndarray]) -> float:
        """Return var of a step's scalars so far, NaN of a single one."""
        a, numbers = self._contributions(round_, kept)
        keys, half = self._keys(round_, self._checked, numbers), len(a) // 2
        if half == 0:
            return float("nan")
        halves = (slice(0, half), slice(half, None))
        x, y = (
            draw.total(self._checked, keys[part], a[part] / np.float32(len(a[part])), gaussian=self.lab.gaussian)
            for part in halves
        )
        return float((np.square(x - y, dtype=np.float64) / 2).mean())

    def _varies(self, round_: Round, kept: list[np.ndarray]) -> bool:
        """Return whether the step needs more directions, on every replica alike."""
        threshold = self.settings.variance_threshold
        if threshold == 0 or len(kept) > self.settings.max_directions:
            return False
        return self.variance(round_, kept) > threshold

    def _contributions(self, round_: Round, kept: list[np.ndarray]) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Return all a of a step and (device, k) of each: by exchange, then device, then direction."""
        a, numbers, done = [], [], 0
        for scalars in kept:
            a.append(scalars.reshape(-1))
            numbers += [(device, done + k) for device in round_.devices for k in range(scalars.shape[1])]
            done += scalars.shape[1]
        return np.concatenate(a), numbers

    def _chooses(self, round_: Round) -> bool:
        return round_.number % 2 == 1

    def _direction(self, round_: Round, device: int, k: int) -> Direction:
        """Return v_k of a device, made tensor by tensor where it is chosen."""
        lab = self.lab
        if not self._chooses(round_):
            return Direction(as_keys([direction_key(lab.seed, round_.number, self._step, device, k)])[0])
        keys = {t.name: self._keys(round_, t, [(device, k)])[0] for t in lab.trainable}
        tensors = {t.name: t for t in lab.trainable}
        v = OnDemand(lambda name: draw.entries(tensors[name], keys[name], gaussian=lab.gaussian))
        return Direction(np.zeros(2, np.uint64), 0.0, v, 1.0)

    def _keys(self, round_: Round, tensor: Tensor, numbers: list[tuple[int, int]]) -> np.ndarray:
        """Return the keys of v in a tensor, uint64 [len(numbers), 2]; numbers are (device, k)."""
        seed, number, step = self.lab.seed, round_.number, self._step
        if not self._chooses(round_):
            return as_keys([direction_key(seed, number, step, device, k) for device, k in numbers])
        chosen = []
        for device, k in numbers:
            among = range(k * CANDIDATES, (k + 1) * CANDIDATES)
            keys = as_keys([direction_key(seed, number, step, device, candidate) for candidate in among])
            cosines = draw.cosines(tensor, keys, self._last[tensor.name], gaussian=self.lab.gaussian)
            chosen.append(keys[int(np.argmax(cosines))])
        return np.stack(chosen)
