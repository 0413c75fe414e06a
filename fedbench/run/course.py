"""What a device computes before it reads each unit of a plan, from counted FLOPs alone.

The choice of codecs and the simulated clock share it, so that a plan which was chosen to hide does hide there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedbench.algorithms.base import Round
from fedbench.base.arrays import Unit
from fedbench.run.build import Built

#: FLOPs of a product in the time in which an entry is decoded, perturbed both ways and put back: one core does some 4e10
#: of the former and 4e8 of the latter a second (docs/engine.md).
FLOPS_OF_AN_ENTRY = 100.0


class Course(NamedTuple):
    """FLOPs of one pass over a plan's units: before its first unit, and from reading each one on (float64 [n])."""

    before: float
    behind: np.ndarray

    @property
    def reads(self) -> np.ndarray:
        """FLOPs before each unit is read, float64 [n], ascending."""
        return self.before + np.cumsum(self.behind) - self.behind


class Courses:
    """The courses of a run, whose devices' batches are taken to be as long as the public texts are on average."""

    def __init__(self, built: Built) -> None:
        self._algorithm = built.algorithm
        self._cut = built.cut
        lengths = built.splits.public.lengths
        self._shape = built.job.config.federation.batch_size, max(1, round(float(np.mean(lengths))))

    def of(self, at: Round, units: Sequence[Unit]) -> Course:
        """Return the course of one pass over a plan, whose sum is what is counted.

        A stage's FLOPs stand behind its own units by their entries; those of a stage without units stand behind what
        was read last, or before the first. In time, a unit's share is that of its FLOPs and `FLOPS_OF_AN_ENTRY`.
        """
        algorithm, cut = self._algorithm, self._cut
        before = algorithm.flops_before_plan(*self._shape)
        stages, entries = np.array(algorithm.plan_stages(at)), np.array([unit.entries for unit in units], np.float64)
        behind, latest = np.zeros(len(units)), -1
        for stage in range(cut.stages):
            flops = algorithm.sides * cut.stage_flops(stage, *self._shape)
            own = np.flatnonzero(stages == stage)
            if len(own):
                behind[own] += flops * entries[own] / entries[own].sum()
                latest = int(own[-1])
            elif latest < 0:
                before += flops
            else:
                behind[latest] += flops
        counted = behind.sum()
        taken = behind + FLOPS_OF_AN_ENTRY * entries
        return Course(before, counted * taken / taken.sum() if counted else behind)
