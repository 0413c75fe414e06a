"""CooperLLM: zeroth-order steps along guided perturbations, canonical form (methods.md 2.15, ZGR).

    cloud:  G = mean over public rows of grad f_pub(w);  V = G / |G|;  s = +-1;  guide = s V
    device: u = beta (sqrt(alpha/n) z + sqrt(1-alpha) guide),  n trainable entries
            a = [f(w + h u) - f(w - h u)] / (2 h)
    all:    w <- w - lr mean_ip(a_ip u_ip)

The guide is made once a round; every local step is one synchronous update on it. Devices
keep the guide as it travelled until the update, so it crosses the network once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from fedbench.algorithms.base import Reply, Round, ScalarMethod, StepSize, Upload
from fedbench.algorithms.base import Settings as BaseSettings
from fedbench.base.arrays import Arrays, Unit
from fedbench.base.rng import key
from fedbench.zo.direction import Direction, Terms
from fedbench.zo.estimate import central
from fedbench.zo.guide import mean_gradient, unit_guide
from fedbench.zo.update import subtract


class Settings(BaseSettings):
    """CooperLLM's settings."""

    lr: StepSize = 0.1
    alpha: float = Field(0.5, ge=0, le=1, description="share of the isotropic direction")
    beta: float = Field(1.0, gt=0, description="length of the direction")
    h: float = Field(0.01, gt=0, description="probing step along u, which is about beta long")
    public_batches: int = Field(0, ge=0, description="public batches a round for the guide; 0 is the whole public set")


class CooperLLM(ScalarMethod):
    """Devices probe along the cloud's gradient direction plus noise; the cloud never sees private rows."""

    name = "cooperllm"
    summary = "zeroth-order along perturbations guided by the cloud's public gradient"
    settings_type: ClassVar[type[BaseSettings]] = Settings
    settings: Settings

    @property
    def _z_scale(self) -> float:
        return self.settings.beta * math.sqrt(self.settings.alpha / self.lab.trainable.size)

    @property
    def _guide_scale(self) -> float:
        return self.settings.beta * math.sqrt(1.0 - self.settings.alpha)

    @property
    def query_radius(self) -> float:
        """h |u| / sqrt(n), with |u| about beta."""
        return self.settings.h * self.settings.beta / math.sqrt(self.lab.trainable.size)

    def plan_units(self, round_: Round) -> Sequence[Unit]:
        """The guide, tensor by tensor in forward order, in the first exchange of a round."""
        if round_.exchange > 0:
            return ()
        return [Unit(t.name, tuple(t.parameter.shape)) for t in self.lab.trainable]

    def plan(self, round_: Round) -> Arrays:
        """Return s V at the present weights."""
        lab, batches = self.lab, self.settings.public_batches
        rows = [lab.public(round_.number, b) for b in range(batches)] if batches else lab.public_rows()
        self.cloud_loss, grads = mean_gradient(lab.cut, lab.trainable, rows, lab.meter)
        sign = 1.0 if key(lab.seed, "guide sign", round_.number)[0] & 1 else -1.0
        return unit_guide(lab.trainable, [grad.mul_(sign) for grad in grads])

    def scalars(self, round_: Round) -> int:
        """P in each exchange, one exchange per local step."""
        return self.lab.perturbations

    def local(self, round_: Round, device: int, plan: Arrays) -> Upload:
        """Return a [P] along the device's guided directions."""
        lab, h = self.lab, self.settings.h
        batch = lab.private(round_.number, round_.exchange, device)
        a = np.empty(lab.perturbations, np.float32)
        losses = []
        for p, z in enumerate(self._keys(round_, device)):
            plus, minus = lab.stream.losses(batch, Direction(z, self._z_scale, plan, self._guide_scale), h)
            a[p] = central(plus, minus, h)
            losses.append((plus + minus) / 2)
        return Upload({"scalars": a}, float(np.mean(losses)))

    def combine(self, round_: Round, uploads: Mapping[int, Arrays]) -> Reply:
        """Return all scalars; one more exchange for each local step left."""
        return super().combine(round_, uploads)._replace(again=round_.exchange + 1 < self.lab.local_steps)

    def apply(self, round_: Round, plan: Arrays, reply: Arrays) -> None:
        """w <- w - lr mean(a) guide_scale guide - lr mean(a z_scale z)."""
        a = reply["scalars"].reshape(-1).astype(np.float64)
        keys = np.concatenate([self._keys(round_, device) for device in round_.devices])
        coef = (round_.lr * self._z_scale / len(a) * a).astype(np.float32)
        terms = Terms(keys, coef, plan, round_.lr * self._guide_scale * float(a.mean()))
        self.replay_ops += subtract(self.lab.trainable, terms, gaussian=self.lab.gaussian)

    def _keys(self, round_: Round, device: int) -> np.ndarray:
        step = range(round_.exchange, round_.exchange + 1)
        return self.lab.directions(round_.number, device, step, self.lab.perturbations)
