"""FedSPZO: the network in two blocks, more directions for the second (methods.md 2.14, estimator A).

    h+- = block1(y +- eps u_p)                                 once per p <= P1
    l+  = block2(h+, z + eps v_pq),  l- = block2(h-, z - eps v_pq)   for q <= P2
    d_pq = (l+ - l-) / (2 eps)
    g_z  = mean_pq d_pq v_pq,   g_y = mean_p [(mean_q d_pq) u_p]

Block 1 is the embedding and the first `split` layers; block 2 is the rest and the head. One
synchronous update per local step. With P1 = P and P2 = 1 it is FedMeZO with P directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from pydantic import Field

from fedbench.algorithms.base import Lab, Reply, Round, ScalarMethod, StepSize, Upload
from fedbench.algorithms.base import Settings as BaseSettings
from fedbench.base.arrays import Arrays
from fedbench.base.errors import ConfigError
from fedbench.zo.direction import AT_WEIGHTS, Direction, Terms
from fedbench.zo.estimate import central
from fedbench.zo.stream import Probe
from fedbench.zo.update import subtract


class Settings(BaseSettings):
    """FedSPZO's settings."""

    lr: StepSize = 2e-3
    lr_ratio: float = Field(1.0, gt=0, description="step size of block 2 over that of block 1")
    split: int = Field(-1, description="layers in block 1; negative counts from the end (-1: all but the last)")
    p1: int = Field(1, ge=1, description="directions of block 1 in a step")
    p2: int = Field(6, ge=1, description="directions of block 2 for each one of block 1")


class FedSPZO(ScalarMethod):
    """Split perturbation: block 1 runs once per direction of its own, its activations serve P2 of block 2."""

    name = "fedspzo"
    summary = "zeroth-order in two blocks, boundary activations reused"
    settings_type: ClassVar[type[BaseSettings]] = Settings
    settings: Settings

    def __init__(self, settings: BaseSettings, lab: Lab) -> None:
        super().__init__(settings, lab)
        layers = len(lab.cut.blocks)
        split = self.settings.split if self.settings.split >= 0 else layers + self.settings.split
        if not 0 <= split <= layers:
            raise ConfigError(f"method.fedspzo.split: found {self.settings.split}; allowed: {-layers} .. {layers}.")
        self._boundary = split + 1
        self._y = [t for t in lab.trainable if t.stage < self._boundary]
        self._z = [t for t in lab.trainable if t.stage >= self._boundary]
        if not self._y or not self._z:
            empty = 1 if not self._y else 2
            raise ConfigError(
                f"method.fedspzo.split: with split = {split} and the part {lab.trainable.part!r}, "
                f"block {empty} has nothing to train."
            )

    def scalars(self, round_: Round) -> int:
        """P1 P2 in each exchange, one exchange per local step."""
        return self.settings.p1 * self.settings.p2

    def local(self, round_: Round, device: int, plan: Arrays) -> Upload:
        """Return d [P1 P2] at the replica's weights."""
        lab, (p1, p2) = self.lab, (self.settings.p1, self.settings.p2)
        batch = lab.private(round_.number, round_.exchange, device)
        v = self._keys(round_, device)
        d = np.empty(p1 * p2, np.float32)
        losses = []
        for p in range(p1):
            u = Probe(Direction(v[p * p2]), lab.epsilon, AT_WEIGHTS)
            boundary = lab.stream.run(lab.stream.begin(batch), range(self._boundary), u)
            for k in range(p * p2, (p + 1) * p2):
                probe = Probe(Direction(v[k]), lab.epsilon, AT_WEIGHTS)
                plus, minus = lab.stream.end(boundary, self._boundary, probe)
                d[k] = central(plus, minus, lab.epsilon)
                losses.append((plus + minus) / 2)
        return Upload({"scalars": d}, float(np.mean(losses)))

    def combine(self, round_: Round, uploads: Mapping[int, Arrays]) -> Reply:
        """Return all scalars; one more exchange for each local step left."""
        return super().combine(round_, uploads)._replace(again=round_.exchange + 1 < self.lab.local_steps)

    def apply(self, round_: Round, plan: Arrays, reply: Arrays) -> None:
        """z <- z - lr_z mean_ipq(d v),  y <- y - lr_y mean_ip((mean_q d) u); u_p has the key of v_p0."""
        p2 = self.settings.p2
        d = reply["scalars"].reshape(-1, p2)
        v = np.concatenate([self._keys(round_, device) for device in round_.devices])
        y_coef = (round_.lr / len(d) * d.mean(1, dtype=np.float64).astype(np.float32)).astype(np.float32)
        z_coef = (round_.lr * self.settings.lr_ratio / d.size * d.reshape(-1)).astype(np.float32)
        gaussian = self.lab.gaussian
        self.replay_ops += subtract(self._y, Terms(np.ascontiguousarray(v[::p2]), y_coef), gaussian=gaussian)
        self.replay_ops += subtract(self._z, Terms(v, z_coef), gaussian=gaussian)

    def _keys(self, round_: Round, device: int) -> np.ndarray:
        step = range(round_.exchange, round_.exchange + 1)
        return self.lab.directions(round_.number, device, step, self.settings.p1 * self.settings.p2)
