"""The cloud's choice of a codec for every unit of a plan (`comm.codec = "adaptive"`), and what it is based on.

Nominal rates come from the job alone, so that equal jobs choose equal codecs. Measured ones follow the rounds played,
and no two runs need choose alike. How bits are shared out among the units stands in `codec/allocate.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from fedbench.algorithms.base import Algorithm, Round
from fedbench.base.arrays import Arrays, Unit
from fedbench.base.job import Config
from fedbench.codec.allocate import Schedule, allocate
from fedbench.codec.coding import Codec
from fedbench.models.cut import Cut
from fedbench.run.build import Built
from fedbench.sim.profiles import device_of, link_of

#: FLOP/s of a device where the job names none: one core of a small computer.
DEFAULT_FLOPS_PER_S = 2e10

#: A plan counts as hidden while devices wait for less than this share of what they compute; then the next one may be
#: larger by `_BOLDER`, in case the link carries more than is known.
_HIDDEN, _BOLDER = 0.05, 1.25


class Rates:
    """What the choice rests on: the link's rate in bit/s and a device's FLOP/s, both the slowest's."""

    def __init__(self, config: Config, *, measured: bool) -> None:
        flops_per_s = device_of(config).flops_per_s
        self.bit_s = link_of(config).down_bit_s
        self.flops_per_s = flops_per_s if math.isfinite(flops_per_s) else DEFAULT_FLOPS_PER_S
        self.measured = measured

    def observe(self, plan_bytes: int, exchange_s: float, compute_s: Sequence[float], flops: Sequence[float]) -> None:
        """Learn from an exchange with a plan: `compute_s` has no waiting in it, `exchange_s` is all of it.

        Where devices waited, the link was what took the time, and carried the plan within it; else it carries more.
        """
        if not self.measured or not compute_s or min(compute_s) <= 0 or plan_bytes == 0:
            return
        self.flops_per_s = min(f / s for f, s in zip(flops, compute_s, strict=True))
        carried = 8.0 * plan_bytes / exchange_s
        hidden = exchange_s - max(compute_s) < _HIDDEN * max(compute_s)
        self.bit_s = max(carried, 0.0 if math.isinf(self.bit_s) else self.bit_s) * _BOLDER if hidden else carried


class Chooser:
    """Chooses on the cloud."""

    def __init__(self, algorithm: Algorithm, cut: Cut, rates: Rates, batch: int, length: int, passes: int) -> None:
        self._algorithm = algorithm
        self._cut = cut
        self._shape = batch, length
        self._passes = passes
        self.rates = rates

    def choose(self, at: Round, units: Sequence[Unit], arrays: Arrays, poll: Callable[[], None]) -> list[Codec]:
        """Return a codec for each unit of a plan; `poll` is called after each."""
        entries = [unit.entries for unit in units]
        squares = np.zeros(len(units))
        for k, unit in enumerate(units):
            squares[k] = _square(arrays[unit.name])
            poll()
        return allocate(units, squares, self.schedule(at, entries), self.rates.bit_s)

    def schedule(self, at: Round, entries: Sequence[int]) -> Schedule:
        """Return what a device computes before it reads each unit, a stage's time shared out among its units."""
        stages = np.array(self._algorithm.plan_stages(at))
        sides = self._algorithm.sides
        per_stage = [sides * self._cut.stage_flops(s, *self._shape) for s in range(self._cut.stages)]
        before = self._algorithm.flops_before_plan(*self._shape)
        sizes, reads, done = np.array(entries, np.float64), np.zeros(len(entries)), before
        for stage, flops in enumerate(per_stage):
            own = sizes[stages == stage]
            reads[stages == stage] = done + flops * (np.cumsum(own) - own) / max(1.0, own.sum())
            done += flops
        total = before + self._passes * sum(per_stage)
        return Schedule(reads / self.rates.flops_per_s, total / self.rates.flops_per_s)


def chooser_of(built: Built) -> Chooser | None:
    """Return what chooses for a run, or None where its job names one codec.

    A device's batch is taken to be as long as the public texts are on average.
    """
    config = built.job.config
    if config.comm.codec != "adaptive":
        return None
    length = max(1, round(float(np.mean(built.splits.public.lengths))))
    rates = Rates(config, measured=config.comm.adapt == "measured")
    return Chooser(
        built.algorithm, built.cut, rates, config.federation.batch_size, length, max(1, config.zo.perturbations)
    )


def _square(array: np.ndarray) -> float:
    return float(np.square(array, dtype=np.float64).sum())
