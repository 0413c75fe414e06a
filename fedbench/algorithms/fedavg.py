"""FedAvg with backpropagation on devices (methods.md 2.1).

    device: w_i = w; repeat S: w_i <- w_i - lr grad f_i(w_i; B)
    cloud:  w <- w + mean_i (w_i - w)

Devices weigh the same whatever their number of rows, as in every other method here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch

from fedbench.algorithms.base import Algorithm, CatchUp, Reply, Round, StepSize, Upload
from fedbench.algorithms.base import Settings as BaseSettings
from fedbench.base.arrays import Arrays, Unit
from fedbench.zo.guide import gradient


class Settings(BaseSettings):
    """FedAvg's settings."""

    lr: StepSize = 0.1


class FedAvg(Algorithm):
    """Local SGD by backpropagation, averaged: the reference that devices here can't afford."""

    name = "fedavg"
    summary = "backpropagation on devices, model averaging"
    catch_up = CatchUp.REPLAY
    settings_type: ClassVar[type[BaseSettings]] = Settings

    def _weights(self) -> Sequence[Unit]:
        return [Unit(t.name, tuple(t.parameter.shape)) for t in self.lab.trainable]

    def upload_units(self, round_: Round, device: int) -> Sequence[Unit]:
        """The change of every trainable tensor."""
        return self._weights()

    def local(self, round_: Round, device: int, plan: Arrays) -> Upload:
        """Return w_i - w after the local steps."""
        lab = self.lab
        start = [p.detach().clone() for p in lab.trainable.parameters]
        losses = []
        for step in range(lab.local_steps):
            loss, grads = gradient(lab.cut, lab.trainable, lab.private(round_.number, step, device), lab.meter)
            losses.append(loss)
            with torch.no_grad():
                for parameter, grad in zip(lab.trainable.parameters, grads, strict=True):
                    parameter.add_(grad, alpha=-round_.lr)
        change = {}
        for tensor, before in zip(lab.trainable, start, strict=True):
            change[tensor.name] = (tensor.parameter.detach() - before).cpu().numpy()
            with torch.no_grad():
                tensor.parameter.copy_(before)
        return Upload(change, float(np.mean(losses)))

    def reply_units(self, round_: Round) -> Sequence[Unit]:
        """The mean change of every trainable tensor."""
        return self._weights()

    def combine(self, round_: Round, uploads: Mapping[int, Arrays]) -> Reply:
        """Return the mean change, summed in device order."""
        total = {t.name: np.zeros(tuple(t.parameter.shape), np.float32) for t in self.lab.trainable}
        for arrays in uploads.values():
            for name in total:
                total[name] += arrays[name]
        for name in total:
            total[name] /= np.float32(len(uploads))
        return Reply(total)

    def apply(self, round_: Round, plan: Arrays, reply: Arrays) -> None:
        """w <- w + mean change."""
        for tensor in self.lab.trainable:
            tensor.add(reply[tensor.name])
