"""FedZO: FedAvg whose local steps are zeroth-order, one-sided, along the unit sphere (methods.md 2.4).

    device: w_i = w; repeat S: g = d / b2 sum_{n <= b2} [f(w_i + mu v_n; B) - f(w_i; B)] / mu v_n
                               w_i <- w_i - lr g;          v_n uniform on the unit sphere
    cloud:  w <- w + mean_i (w_i - w)

It runs with u_n = sqrt(d) v_n and mu = eps sqrt(d): then mu v_n = eps u_n, so that eps is the probing step per
coordinate as everywhere, and g = mean_n [f(w_i + eps u_n; B) - f(w_i; B)] / eps u_n. The factor d is in the lengths of
the two u_n. Rademacher draws have that length already; Gaussian ones are scaled to it.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from pydantic import Field

from fedbench.algorithms.averaging import ModelAveraging
from fedbench.algorithms.base import Round, StepSize, Upload
from fedbench.algorithms.base import Settings as BaseSettings
from fedbench.algorithms.walk import local_steps
from fedbench.base.arrays import Arrays
from fedbench.zo import draw
from fedbench.zo.direction import Direction


class Settings(BaseSettings):
    """FedZO's settings."""

    lr: StepSize = 2e-3
    b2: int = Field(0, ge=0, description="directions of a local step (the paper: 20); 0 is zo.perturbations")


class FedZO(ModelAveraging):
    """Models travel as in FedAvg; what is saved is the backward pass."""

    name = "fedzo"
    summary = "one-sided zeroth-order local steps, model averaging"
    settings_type: ClassVar[type[BaseSettings]] = Settings
    settings: Settings

    @property
    def query_radius(self) -> float:
        """Epsilon: u_n has the length sqrt(d)."""
        return self.lab.epsilon

    def local(self, round_: Round, device: int, plan: Arrays) -> Upload:
        """Return w_i - w after the local steps, rebuilt from the walk."""
        lab = self.lab
        keys = lab.directions(round_.number, device, range(lab.local_steps), self.settings.b2 or lab.perturbations)
        u = [Direction(key, self._onto_sphere(key)) for key in keys]
        upload, walk = local_steps(lab, round_, device, u, one_sided=True)
        change = {
            tensor.name: draw.total(tensor, walk.keys, -walk.coef, gaussian=lab.gaussian).reshape(
                tuple(tensor.parameter.shape)
            )
            for tensor in lab.trainable
        }
        return Upload(change, upload.loss)

    def _onto_sphere(self, key: np.ndarray) -> float:
        """Return sqrt(d) / |z|, the norm taken over all trainable tensors."""
        lab = self.lab
        if not lab.gaussian:
            return 1.0
        square = sum(
            float(np.square(draw.entries(tensor, key, gaussian=True), dtype=np.float64).sum())
            for tensor in lab.trainable
        )
        return math.sqrt(lab.trainable.size / square)
