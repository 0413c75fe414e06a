"""FedMeZO: MeZO steps on devices, averaged by the cloud, in its seeded form (methods.md 2.5).

    device: w_i = w; repeat S: a_p = [f(w_i + eps z_p; B) - f(w_i - eps z_p; B)] / (2 eps)
                               w_i <- w_i - lr mean_p(a_p z_p)
    all:    w <- w - lr mean_i sum_s mean_p(a_isp z_isp)

The walk is linear in the scalars, so the mean of the devices' models is rebuilt from
them: M P S directions a round, each device its own.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fedbench.algorithms.base import Round, ScalarMethod, StepSize, Upload
from fedbench.algorithms.base import Settings as BaseSettings
from fedbench.algorithms.walk import local_steps
from fedbench.base.arrays import Arrays
from fedbench.zo.direction import Direction, Terms
from fedbench.zo.update import subtract


class Settings(BaseSettings):
    """FedMeZO's settings."""

    lr: StepSize = 2e-3


class FedMeZO(ScalarMethod):
    """Plain zeroth-order federated fine-tuning: the baseline."""

    name = "fedmezo"
    summary = "zeroth-order local steps, scalars up, every replica rebuilds"
    settings_type: ClassVar[type[BaseSettings]] = Settings

    def scalars(self, round_: Round) -> int:
        """S P."""
        return self.lab.local_steps * self.lab.perturbations

    def local(self, round_: Round, device: int, plan: Arrays) -> Upload:
        """Return a [S P] along the device's own walk, which stays laid over the weights."""
        lab = self.lab
        keys = lab.directions(round_.number, device, range(lab.local_steps), lab.perturbations)
        return local_steps(lab, round_, device, [Direction(key) for key in keys])[0]

    def apply(self, round_: Round, plan: Arrays, reply: Arrays) -> None:
        """w <- w - lr / (M P) sum_isp a_isp z_isp."""
        lab = self.lab
        a = reply["scalars"]
        keys = [lab.directions(round_.number, d, range(lab.local_steps), lab.perturbations) for d in round_.devices]
        coef = (round_.lr / (len(a) * lab.perturbations) * a.reshape(-1)).astype(np.float32)
        terms = Terms(np.concatenate(keys), coef)
        self.replay_ops += subtract(lab.trainable, terms, gaussian=lab.gaussian)
