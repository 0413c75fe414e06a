"""BAFFLE: finite differences along K shared directions, one synchronous step at a time (methods.md 2.9).

    cloud:  sends a seed;  delta_k = sigma z_k, z_k from the seed and k <= K;  sigma = zo.epsilon
    device: D_ik = f(w + delta_k; B) - f(w; B), or with `central` [f(w + delta_k; B) - f(w - delta_k; B)] / 2
    cloud:  D_k = mean_i D_ik
    all:    w <- w - lr mean_k(D_k delta_k) / sigma^2

Each local step is one such exchange with a seed of its own (FedSGD), at (K + 1) C or 2 K C. The published code feeds the
estimate to Adam with weight decay, clipping and averaged weights; here it is plain SGD, as in every other method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from fedbench.algorithms.base import CatchUp, Reply, Round, ScalarMethod, StepSize, Upload
from fedbench.algorithms.base import Settings as BaseSettings
from fedbench.base.arrays import Arrays, Unit
from fedbench.base.rng import key
from fedbench.zo.direction import Direction, Terms, shared_keys
from fedbench.zo.estimate import central, forward
from fedbench.zo.update import subtract


class Settings(BaseSettings):
    """BAFFLE's settings."""

    lr: StepSize = 5e-3
    k: int = Field(20, ge=1, description="directions of a step, shared by all devices")
    central: bool = Field(False, description="two-sided differences, 2 K forwards a step instead of K + 1")


class Baffle(ScalarMethod):
    """K loss differences a step, which the cloud only ever needs the mean of."""

    name = "baffle"
    summary = "synchronous finite differences along shared directions, mean differences go both ways"
    catch_up = CatchUp.REPLAY
    settings_type: ClassVar[type[BaseSettings]] = Settings
    settings: Settings

    def plan_units(self, round_: Round) -> Sequence[Unit]:
        """One seed for all directions of the step."""
        return (Unit("seeds", (1,), "<u8"),)

    def plan(self, round_: Round) -> Arrays:
        """Return the seed of this exchange."""
        seed = key(self.lab.seed, "baffle seed", round_.number, round_.exchange)[0]
        return {"seeds": np.array([seed], np.uint64)}

    def scalars(self, round_: Round) -> int:
        """K in each exchange, one exchange per local step."""
        return self.settings.k

    def local(self, round_: Round, device: int, plan: Arrays) -> Upload:
        """Return D_i [K] at the replica's weights; differences aren't divided, which a step of 1 says below."""
        lab, sigma = self.lab, self.lab.epsilon
        batch = lab.private(round_.number, round_.exchange, device)
        z = [Direction(key) for key in self._keys(plan)]
        if self.settings.central:
            pairs = [lab.stream.losses(batch, z_k, sigma) for z_k in z]
            d = [central(plus, minus, 1.0) for plus, minus in pairs]
            return Upload({"scalars": np.array(d, np.float32)}, float(np.mean(pairs)))
        centre = lab.stream.loss(batch, z[0], 0.0)
        d = [forward(lab.stream.loss(batch, z_k, sigma), centre, 1.0) for z_k in z]
        return Upload({"scalars": np.array(d, np.float32)}, centre)

    def reply_units(self, round_: Round) -> Sequence[Unit]:
        """The mean differences."""
        return (Unit("scalars", (self.settings.k,)),)

    def combine(self, round_: Round, uploads: Mapping[int, Arrays]) -> Reply:
        """Return D [K], the mean over devices; one more exchange for each local step left."""
        d = np.asarray(np.mean([arrays["scalars"] for arrays in uploads.values()], 0, np.float64), np.float32)
        return Reply({"scalars": d}, again=round_.exchange + 1 < self.lab.local_steps)

    def apply(self, round_: Round, plan: Arrays, reply: Arrays) -> None:
        """w <- w - lr mean_k(D_k delta_k) / sigma^2 = w - lr / (K sigma) sum_k D_k z_k."""
        coef = (round_.lr / (self.settings.k * self.lab.epsilon) * reply["scalars"]).astype(np.float32)
        self.replay_ops += subtract(self.lab.trainable, Terms(self._keys(plan), coef), gaussian=self.lab.gaussian)

    def _keys(self, plan: Arrays) -> np.ndarray:
        return shared_keys(plan["seeds"], self.settings.k)
