"""FedAvg with backpropagation on devices (methods.md 2.1).

    device: w_i = w; repeat S: w_i <- w_i - lr (grad f_i(w_i; B) + weight_decay w_i)
    cloud:  w <- w + mean_i (w_i - w)
            before the first round, `public_rounds` times: w <- w - public_lr grad f_pub(w)

Devices weigh the same whatever their number of rows, as in every other method here. With
`optimizer = adamw` the local steps are AdamW's, and its state is gone at the end of the round.
With `public_rounds` the devices of the first round fetch where public training led to: the control of
methods.md 4 for guided methods, which have public rows too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
from pydantic import Field

from fedbench.algorithms.averaging import ModelAveraging
from fedbench.algorithms.backprop import Kind, descend, on_public_rows, walking
from fedbench.algorithms.base import Round, StepSize, Upload
from fedbench.algorithms.base import Settings as BaseSettings
from fedbench.base.arrays import Arrays, Unit


class Settings(BaseSettings):
    """FedAvg's settings."""

    lr: StepSize = 0.1
    optimizer: Kind = Field("sgd", description="rule of the local steps; adamw's state lasts one round")
    weight_decay: float = Field(0.0, ge=0, description="decay of the weights in a local step, times lr")
    public_rounds: int = Field(0, ge=0, description="SGD steps on the whole public set before the first round")
    public_lr: float = Field(0.1, gt=0, description="step size of those")


class FedAvg(ModelAveraging):
    """Local SGD by backpropagation, averaged: the reference that devices here can't afford."""

    name = "fedavg"
    summary = "backpropagation on devices, model averaging"
    settings_type: ClassVar[type[BaseSettings]] = Settings
    settings: Settings

    def plan_units(self, round_: Round) -> Sequence[Unit]:
        """The weights after public training, in the first round; nothing without it."""
        return self._weights() if self.settings.public_rounds and round_.number == round_.exchange == 0 else ()

    def plan(self, round_: Round) -> Arrays:
        """Train on the public rows and return the weights reached."""
        lab = self.lab
        with walking(lab.trainable.tensors):
            for _ in range(self.settings.public_rounds):
                self.cloud_loss = on_public_rows(lab, lab.public_rows(), self.settings.public_lr)
            return {t.name: t.parameter.detach().cpu().numpy().copy() for t in lab.trainable}

    def local(self, round_: Round, device: int, plan: Arrays) -> Upload:
        """Return w_i - w after the local steps."""
        with self._starting_at(plan):
            change, losses = descend(self.lab, round_, device, self.settings.optimizer, self.settings.weight_decay)
        names = [t.name for t in self.lab.trainable]
        arrays = {name: tensor.cpu().numpy() for name, tensor in zip(names, change, strict=True)}
        return Upload(arrays, float(np.mean(losses)))

    def apply(self, round_: Round, plan: Arrays, reply: Arrays) -> None:
        """w <- w + mean change, from where public training led to in the first round."""
        self._take(plan)
        super().apply(round_, plan, reply)

    def skip(self, round_: Round, plan: Arrays) -> None:
        """Go on from where public training led to."""
        self._take(plan)

    @contextmanager
    def _starting_at(self, plan: Arrays) -> Iterator[None]:
        """Hold the plan's weights inside the block; without a plan nothing is copied."""
        with walking(self.lab.trainable.tensors if plan else ()):
            self._take(plan)
            yield

    def _take(self, plan: Arrays) -> None:
        for tensor in self.lab.trainable if plan else ():
            tensor.assign(plan[tensor.name])
