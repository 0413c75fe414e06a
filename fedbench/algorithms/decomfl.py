"""DeComFL: directions shared by all devices, so that one scalar a direction goes both ways (methods.md 2.8).

    cloud:  draws seeds s_1 .. s_S;  z_sp follows from s_s and p
    device: w_i = w; repeat S: a_isp = [f(w_i + eps z_sp; B) - f(w_i - eps z_sp; B)] / (2 eps)
                               w_i <- w_i - lr mean_p(a_isp z_sp);  the walk is discarded
    cloud:  a_sp = mean_i a_isp
    all:    w <- w - lr sum_s mean_p(a_sp z_sp)

The last line is the mean of the devices' models, since the walk is linear in the scalars. A late device replays missed
rounds from seeds and mean scalars alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from fedbench.algorithms.base import CatchUp, Reply, Round, ScalarMethod, StepSize, Upload
from fedbench.algorithms.base import Settings as BaseSettings
from fedbench.algorithms.walk import local_steps
from fedbench.base.arrays import Arrays, Unit
from fedbench.base.rng import key
from fedbench.zo.direction import Direction, Terms, shared_keys
from fedbench.zo.update import subtract


class Settings(BaseSettings):
    """DeComFL's settings."""

    lr: StepSize = 2e-3
    one_sided: bool = Field(False, description="probe f(w + eps z) - f(w), P + 1 forwards a step instead of 2 P")


class DeComFL(ScalarMethod):
    """Traffic that depends on neither the model nor the number of devices: seeds down, S P scalars up and down."""

    name = "decomfl"
    summary = "zeroth-order along shared directions, mean scalars go both ways"
    catch_up = CatchUp.REPLAY
    settings_type: ClassVar[type[BaseSettings]] = Settings
    settings: Settings

    def plan_units(self, round_: Round) -> Sequence[Unit]:
        """One seed for each local step."""
        return (Unit("seeds", (self.lab.local_steps,), "<u8"),)

    def plan(self, round_: Round) -> Arrays:
        """Return s [S]."""
        steps = range(self.lab.local_steps)
        return {"seeds": np.array([key(self.lab.seed, "decomfl seed", round_.number, s)[0] for s in steps], np.uint64)}

    def scalars(self, round_: Round) -> int:
        """S P."""
        return self.lab.local_steps * self.lab.perturbations

    def local(self, round_: Round, device: int, plan: Arrays) -> Upload:
        """Return a_i [S P] along the device's own walk."""
        z = [Direction(key) for key in self._keys(plan)]
        return local_steps(self.lab, round_, device, z, one_sided=self.settings.one_sided)[0]

    def reply_units(self, round_: Round) -> Sequence[Unit]:
        """The mean scalars, one row a local step."""
        return (Unit("scalars", (self.lab.local_steps, self.lab.perturbations)),)

    def combine(self, round_: Round, uploads: Mapping[int, Arrays]) -> Reply:
        """Return a [S, P], the mean over devices."""
        a = np.mean([arrays["scalars"] for arrays in uploads.values()], 0, np.float64)
        return Reply({"scalars": a.astype(np.float32).reshape(self.lab.local_steps, self.lab.perturbations)})

    def apply(self, round_: Round, plan: Arrays, reply: Arrays) -> None:
        """w <- w - lr sum_s mean_p(a_sp z_sp)."""
        lab = self.lab
        coef = (round_.lr / lab.perturbations * reply["scalars"].reshape(-1)).astype(np.float32)
        self.replay_ops += subtract(lab.trainable, Terms(self._keys(plan), coef), gaussian=lab.gaussian)

    def _keys(self, plan: Arrays) -> np.ndarray:
        return shared_keys(plan["seeds"], self.lab.perturbations)
