"""Meerkat: zeroth-order steps on a static, extremely sparse set of coordinates (methods.md 2.12).

    cloud:  m = the q d coordinates with the largest (grad f_pub(w0))^2, made and sent once
    device: w_i = w; repeat S: a_p = [f(w_i + eps z_p; B) - f(w_i - eps z_p; B)] / (2 eps),  z_p zero outside m
                               w_i <- w_i - lr mean_p(a_p z_p)
    all:    w <- w - lr mean_i sum_s mean_p(a_isp z_isp)

Entry j of a direction in a tensor belongs to the tensor's j-th coordinate in m, so rebuilding costs q d entries. The
control of equal size, `mask = random`, follows from a key and is never sent. Early stopping of devices by their
agreement with the public gradient (Meerkat-vp) is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from fedbench.algorithms.base import Lab, Round, ScalarMethod, StepSize, Upload
from fedbench.algorithms.base import Settings as BaseSettings
from fedbench.base.arrays import Arrays, Unit
from fedbench.base.errors import ConfigError
from fedbench.base.rng import generator
from fedbench.models.trainable import Tensor
from fedbench.zo.direction import Direction
from fedbench.zo.draw import entries
from fedbench.zo.estimate import central
from fedbench.zo.guide import mean_gradient
from fedbench.zo.kernels.device import kernels_of
from fedbench.zo.ranges import OnDemand

_NO_GUIDE = np.empty(0, np.float32)


class Settings(BaseSettings):
    """Meerkat's settings."""

    lr: StepSize = 2e-2
    density: float = Field(1e-3, gt=0, le=1, description="share of the trainable entries that moves (q)")
    mask: Literal["public", "random"] = Field(
        "public", description="entries with the largest public gradient at the start, or the random control"
    )


class Meerkat(ScalarMethod):
    """FedMeZO on the few coordinates where a public gradient is largest: less noise, the rest stands still."""

    name = "meerkat"
    summary = "zeroth-order on a static sparse mask made from the cloud's public gradient"
    settings_type: ClassVar[type[BaseSettings]] = Settings
    settings: Settings

    def __init__(self, settings: BaseSettings, lab: Lab) -> None:
        super().__init__(settings, lab)
        self._count = round(self.settings.density * lab.trainable.size)
        if self._count == 0:
            raise ConfigError(
                f"method.meerkat.density: found {self.settings.density}, which is none of {lab.trainable.size} "
                f"trainable entries; allowed: from {1 / lab.trainable.size:.2g}."
            )
        self._mask: np.ndarray | None = None
        self._inside: dict[str, Any] = {}
        if self.settings.mask == "random":
            draw = generator(lab.seed, "meerkat mask").choice(lab.trainable.size, self._count, replace=False)
            self._take({"mask": np.sort(draw).astype(np.uint32)})

    @property
    def query_radius(self) -> float:
        """Epsilon on the masked coordinates and 0 elsewhere, as a root mean square over all."""
        return self.lab.epsilon * float(np.sqrt(self._count / self.lab.trainable.size))

    def plan_units(self, round_: Round) -> Sequence[Unit]:
        """The mask m, once: ascending places in the trainable tensors laid end to end."""
        if self.settings.mask == "random" or round_.number > 0 or round_.exchange > 0:
            return ()
        return (Unit("mask", (self._count,), "<u4"),)

    def plan(self, round_: Round) -> Arrays:
        """Return m at the present weights, which are w0."""
        if not self.plan_units(round_):
            return {}
        lab = self.lab
        self.cloud_loss, grads = mean_gradient(lab.cut, lab.trainable, lab.public_rows(), lab.meter)
        size = np.concatenate([grad.abs().reshape(-1).cpu().numpy() for grad in grads])
        return {"mask": largest(size, self._count).astype(np.uint32)}

    def scalars(self, round_: Round) -> int:
        """S P."""
        return self.lab.local_steps * self.lab.perturbations

    def local(self, round_: Round, device: int, plan: Arrays) -> Upload:
        """Return a [S P] along the device's own walk, which is taken back at the end."""
        self._take(plan)
        lab, count = self.lab, self.lab.perturbations
        keys = lab.directions(round_.number, device, range(lab.local_steps), count)
        a = np.empty(len(keys), np.float32)
        losses = []
        start = [(tensor, inside, tensor.flat[inside]) for tensor, inside in self._masked()]
        for step in range(lab.local_steps):
            batch = lab.private(round_.number, step, device)
            here = slice(step * count, (step + 1) * count)
            for k in range(here.start, here.stop):
                plus, minus = lab.stream.losses(batch, self._direction(keys[k]), lab.epsilon)
                a[k] = central(plus, minus, lab.epsilon)
                losses.append((plus + minus) / 2)
            if here.stop < len(keys):
                self._subtract(keys[here], (round_.lr / count * a[here]).astype(np.float32))
        for tensor, inside, values in start:
            tensor.flat[inside] = values
        return Upload({"scalars": a}, float(np.mean(losses)))

    def apply(self, round_: Round, plan: Arrays, reply: Arrays) -> None:
        """w <- w - lr / (M P) sum_isp a_isp z_isp, on m alone."""
        self._take(plan)
        lab = self.lab
        a = reply["scalars"]
        keys = [lab.directions(round_.number, d, range(lab.local_steps), lab.perturbations) for d in round_.devices]
        coef = (round_.lr / (len(a) * lab.perturbations) * a.reshape(-1)).astype(np.float32)
        self.replay_ops += self._subtract(np.concatenate(keys), coef)

    def state(self) -> dict[str, np.ndarray]:
        """Return m where it can't be drawn again."""
        return {} if self._mask is None or self.settings.mask == "random" else {"mask": self._mask}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take m back."""
        self._take(state)

    def _take(self, plan: Arrays) -> None:
        """Keep a mask that came, cut up by tensors."""
        if "mask" not in plan:
            return
        self._mask = np.array(plan["mask"], np.uint32)
        first = 0
        for tensor in self.lab.trainable:
            low, high = np.searchsorted(self._mask, (first, first + tensor.size))
            self._inside[tensor.name] = self.lab.cut.residency.take(self._mask[low:high].astype(np.int64) - first)
            first += tensor.size

    def _masked(self) -> Iterator[tuple[Tensor, Any]]:
        """Yield the tensors that m touches, each with its masked places (int64 [n])."""
        for tensor in self.lab.trainable:
            if len(self._inside[tensor.name]):
                yield tensor, self._inside[tensor.name]

    def _direction(self, key: np.ndarray) -> Direction:
        """Return z: entry j of the key's draw at the tensor's j-th masked place, 0 elsewhere."""
        tensors = {t.name: t for t in self.lab.trainable}

        def make(name: str) -> np.ndarray:
            tensor, inside = tensors[name], self.lab.cut.residency.host(self._inside[name])
            z = np.zeros(tensor.size, np.float32)
            z[inside] = entries(tensor, key, gaussian=self.lab.gaussian, count=len(inside))
            return z

        return Direction(key, 0.0, OnDemand(make), 1.0)

    def _subtract(self, keys: np.ndarray, coef: np.ndarray) -> float:
        """Subtract sum_k coef_k z_k from the masked coordinates, as the kernels do it, and return the entries drawn."""
        drawn = 0.0
        for tensor, inside in self._masked():
            kernels = kernels_of(tensor.residency)
            values = tensor.flat[inside]
            kernels.update(values, 0, kernels.stream_keys(keys, tensor.key), coef, _NO_GUIDE, 0.0, self.lab.gaussian)
            tensor.flat[inside] = values
            tensor.residency.release(tensor.flat, written=True)
            drawn += float(len(keys)) * len(inside)
        return drawn


def largest(size: np.ndarray, count: int) -> np.ndarray:
    """Return the ascending places of the `count` largest entries; of equal ones the first are taken."""
    least = np.partition(size, len(size) - count)[len(size) - count]
    above = np.flatnonzero(size > least)
    equal = np.flatnonzero(size == least)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))
