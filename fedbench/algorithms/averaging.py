"""Averaging of models: every device sends its change of all trainable tensors, all replicas take the mean.

How a device comes by its change is the method's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedbench.algorithms.base import Algorithm, CatchUp, Reply, Round
from fedbench.base.arrays import Arrays, Unit


class ModelAveraging(Algorithm):
    """w <- w + mean_i (w_i - w), devices weighing the same whatever their number of rows."""

    catch_up = CatchUp.REPLAY

    def _weights(self) -> Sequence[Unit]:
        return [Unit(t.name, tuple(t.parameter.shape)) for t in self.lab.trainable]

    def upload_units(self, round_: Round, device: int) -> Sequence[Unit]:
        """The change of every trainable tensor."""
        return self._weights()

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
