"""Ferret: first-order local steps, their sum projected on keyed candidate directions (methods.md 2.11).

    device: S steps of SGD;  per group l of d_l entries: D_l = w_old - w_new
            K_l = max(2, floor(K |D_l| / max_j |D_j|)) of the K candidates b_k = z_k / sqrt(d_l), drawn from a key
            coord_k = (d_l / K_l) <D_l, b_k>
    cloud:  pool[l, k] <- momentum pool[l, k] + mean_i coord_ilk
    all:    w_l <- w_l - server_lr sum_k min(1, clip / |pool[l, k]|) pool[l, k] b_k

Candidates are the same all run long and for all devices, since the pool remembers them; the numbers of those that a
device chose travel, as in the paper. Groups are consecutive tensors of about 0.9 times the median tensor's size.
|b_k| counts as 1 in the clip, which it is for Rademacher and nearly for Gaussian entries. The answer is the pool, or
the change where that is less.

Deviation: E b b' = I / d_l here, where the published truncated normal has I / (3 d_l). The reconstruction is D itself
in the mean, so the published server step of 10 is 10/3 of this one's units. A projection is metered as the 2 d_l K_l
operations of its products, beside backpropagation's 3 C a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from fedbench.algorithms.backprop import descend
from fedbench.algorithms.base import Algorithm, CatchUp, Lab, Reply, Round, StepSize, Upload
from fedbench.algorithms.base import Settings as BaseSettings
from fedbench.base.arrays import Arrays, Unit
from fedbench.base.rng import generator, key
from fedbench.models.trainable import Tensor
from fedbench.zo.direction import Terms, as_keys
from fedbench.zo.draw import entries
from fedbench.zo.kernels import cpu
from fedbench.zo.update import subtract

#: Size of a group over that of the median tensor.
_GROUP = 0.9
#: The fewest candidates that a device projects a group on.
_LEAST = 2

_NO_GUIDE = np.empty(0, np.float32)


class Settings(BaseSettings):
    """Ferret's settings."""

    lr: StepSize = 0.1
    candidates: int = Field(200, ge=_LEAST, description="candidate directions of each group (K)")
    server_lr: float = Field(1.0, gt=0, description="share of the rebuilt mean change that is applied")
    momentum: float = Field(0.0, ge=0, lt=1, description="what the pool keeps of the round before")
    clip: float = Field(10.0, gt=0, description="largest length of one candidate's part of the change")


class Ferret(Algorithm):
    """FedAvg whose changes travel as a few coordinates along keyed directions: little to send, noisy."""

    name = "ferret"
    summary = "backpropagation on devices, the change sent as coordinates along keyed directions"
    catch_up = CatchUp.REPLAY
    settings_type: ClassVar[type[BaseSettings]] = Settings
    settings: Settings

    def __init__(self, settings: BaseSettings, lab: Lab) -> None:
        super().__init__(settings, lab)
        self._groups = groups(lab.trainable.tensors)
        count = self.settings.candidates
        self._keys = as_keys([key(lab.seed, "ferret candidate", k) for k in range(count)])
        self._pool = np.zeros((len(self._groups), count), np.float32)
        self._sends_pool = self._pool.size <= lab.trainable.size

    def upload_units(self, round_: Round, device: int) -> Sequence[Unit]:
        """The chosen places in the pool, laid out group by group, and the coordinates there."""
        most = (self._pool.size,)
        return (Unit("indices", most, "<u4", at_most=True), Unit("coords", most, at_most=True))

    def local(self, round_: Round, device: int, plan: Arrays) -> Upload:
        """Return the coordinates of D = w - w_i after the local steps."""
        lab, count = self.lab, self.settings.candidates
        change, losses = descend(lab, round_, device, "sgd", 0.0)
        d = {t.name: -c.reshape(-1).cpu().numpy() for t, c in zip(lab.trainable, change, strict=True)}
        norms = [float(np.sqrt(sum(np.square(d[t.name], dtype=np.float64).sum() for t in g))) for g in self._groups]
        indices, coords = [], []
        for number, (group, norm) in enumerate(zip(self._groups, norms, strict=True)):
            share = norm / max(norms) if norm else 0.0
            chosen = self._chosen(round_, device, number, max(_LEAST, int(count * share)))
            size = sum(t.size for t in group)
            for k in chosen:
                product = sum(self._product(t, d[t.name], self._keys[k]) for t in group)
                coords.append(size / len(chosen) * product / np.sqrt(size))
            indices.append(number * count + chosen)
            lab.meter.add(2.0 * size * len(chosen))
        arrays = {"indices": np.concatenate(indices).astype(np.uint32), "coords": np.array(coords, np.float32)}
        return Upload(arrays, float(np.mean(losses)))

    def reply_units(self, round_: Round) -> Sequence[Unit]:
        """The pool, or the change of every tensor where that is less."""
        if self._sends_pool:
            return (Unit("pool", self._pool.shape),)
        return [Unit(t.name, (t.size,)) for t in self.lab.trainable]

    def combine(self, round_: Round, uploads: Mapping[int, Arrays]) -> Reply:
        """Take the mean coordinates into the pool, in device order; return it, or the change that it makes."""
        total = np.zeros(self._pool.size, np.float32)
        for arrays in uploads.values():
            total[arrays["indices"]] += arrays["coords"]
        mean = (total / np.float32(len(uploads))).reshape(self._pool.shape)
        self._pool = np.float32(self.settings.momentum) * self._pool + mean
        if self._sends_pool:
            return Reply({"pool": self._pool})
        change = {}
        for group, coef in zip(self._groups, self._coef(self._pool), strict=True):
            for tensor in group:
                change[tensor.name] = np.zeros(tensor.size, np.float32)
                keys = cpu.stream_keys(self._keys, tensor.key)
                cpu.update(change[tensor.name], 0, keys, coef, _NO_GUIDE, 0.0, self.lab.gaussian)
                self.replay_ops += float(len(keys)) * tensor.size
        return Reply(change)

    def apply(self, round_: Round, plan: Arrays, reply: Arrays) -> None:
        """w_l <- w_l - server_lr sum_k clipped(pool[l, k]) b_k."""
        if not self._sends_pool:
            for tensor in self.lab.trainable:
                tensor.add(reply[tensor.name])
            return
        for group, coef in zip(self._groups, self._coef(reply["pool"]), strict=True):
            self.replay_ops += subtract(group, Terms(self._keys, coef), gaussian=self.lab.gaussian)

    def state(self) -> dict[str, np.ndarray]:
        """Return the cloud's pool where it is remembered."""
        return {"pool": self._pool} if self.settings.momentum else {}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take the pool back."""
        self._pool = np.array(state["pool"]) if "pool" in state else self._pool

    def _chosen(self, round_: Round, device: int, group: int, count: int) -> np.ndarray:
        """Return the ascending numbers of the candidates that a device projects a group on (int64 [K_l])."""
        draw = generator(self.lab.seed, "ferret choice", round_.number, device, group)
        return np.sort(draw.choice(self.settings.candidates, count, replace=False))

    def _product(self, tensor: Tensor, d: np.ndarray, key_: np.ndarray) -> float:
        """Return <D, z> in a tensor: products in float32, their sum in float64."""
        return float((d * entries(tensor, key_, gaussian=self.lab.gaussian)).sum(dtype=np.float64))

    def _coef(self, pool: np.ndarray) -> list[np.ndarray]:
        """Return each group's coefficients of z_k: server_lr times the clipped pool over sqrt(d_l), float32 [K]."""
        clip = self.settings.clip
        sizes = [sum(t.size for t in group) for group in self._groups]
        rows = zip(np.clip(pool.astype(np.float64), -clip, clip), sizes, strict=True)
        return [(self.settings.server_lr / np.sqrt(size) * row).astype(np.float32) for row, size in rows]


def groups(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return consecutive tensors in groups, each closed as soon as it has 0.9 times the median tensor's entries."""
    enough = _GROUP * float(np.median([t.size for t in tensors]))
    made: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if sum(t.size for t in made[-1]) >= enough:
            made.append([])
        made[-1].append(tensor)
    return made
