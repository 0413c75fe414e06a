"""FedAvg with backpropagation on devices (methods.md 2.1).

    device: w_i = w; repeat S: w_i <- w_i - lr (grad f_i(w_i; B) + weight_decay w_i)
    cloud:  w <- w + mean_i (w_i - w)

Devices weigh the same whatever their number of rows, as in every other method here. With
`optimizer = adamw` the local steps are AdamW's, and its state is gone at the end of the round.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from fedbench.algorithms.averaging import ModelAveraging
from fedbench.algorithms.backprop import Kind, descend
from fedbench.algorithms.base import Round, StepSize, Upload
from fedbench.algorithms.base import Settings as BaseSettings
from fedbench.base.arrays import Arrays


class Settings(BaseSettings):
    """FedAvg's settings."""

    lr: StepSize = 0.1
    optimizer: Kind = Field("sgd", description="rule of the local steps; adamw's state lasts one round")
    weight_decay: float = Field(0.0, ge=0, description="decay of the weights in a local step, times lr")


class FedAvg(ModelAveraging):
    """Local SGD by backpropagation, averaged: the reference that devices here can't afford."""

    name = "fedavg"
    summary = "backpropagation on devices, model averaging"
    settings_type: ClassVar[type[BaseSettings]] = Settings
    settings: Settings

    def local(self, round_: Round, device: int, plan: Arrays) -> Upload:
        """Return w_i - w after the local steps."""
        change, losses = descend(self.lab, round_, device, self.settings.optimizer, self.settings.weight_decay)
        names = [t.name for t in self.lab.trainable]
        arrays = {name: tensor.cpu().numpy() for name, tensor in zip(names, change, strict=True)}
        return Upload(arrays, float(np.mean(losses)))
