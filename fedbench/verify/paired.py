"""Runs compared seed by seed at equal device FLOPs: rounds and FLOPs to target, accuracy within a budget, the best baseline.

A lower bound stays one: a run that never reached its target counts with what it spent. Nothing is judged here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedbench.base import stats
from fedbench.base.records import Run
from fedbench.report.arms import cumulative, rounds_done
from fedbench.verify.claims import Found, Measured

#: Share of a budget that a run has to have spent for its last evaluation to count for it.
_SPENT = 0.9
_ROUNDING = 1e-9

#: Seed -> a value where there is one.
Partial = Mapping[int, float | None]


class Cost(NamedTuple):
    """What a run had spent when it reached its target, or in all where it never did (`reached` False)."""

    value: float
    reached: bool


def flops_per_round(run: Run) -> float:
    """Return a run's mean device FLOPs a round."""
    return run.summary.device_flops / run.summary.rounds


def positions(run: Run, unit_flops: float) -> np.ndarray:
    """Return [rows] a run's progress in rounds of `unit_flops`; plain rounds where its devices compute nothing."""
    spent = cumulative(run, "device_flops")
    return spent / unit_flops if spent[-1] > 0 and unit_flops > 0 else rounds_done(run)


def to_target(run: Run, unit_flops: float) -> Cost:
    """Return the rounds of `unit_flops` that a run took to its target."""
    row = run.summary.rounds_to_target
    at = positions(run, unit_flops)
    return Cost(float(at[-1] if row is None else at[row]), row is not None)


def accuracy_within(run: Run, unit_flops: float, budget: float) -> float | None:
    """Return test accuracy at the last evaluation within `budget` rounds of `unit_flops`; None where it ended long before."""
    at = positions(run, unit_flops)
    if at[-1] < _SPENT * budget:
        return None
    inside = np.isfinite(run.rounds["test_accuracy"]) & (at <= budget * (1 + _ROUNDING))
    return float(run.rounds["test_accuracy"][np.flatnonzero(inside)[-1]])


def within(found: Found, reference: str, arm: str, budget: int) -> dict[int, float | None]:
    """Return an arm's test accuracy by seed within the device FLOPs of `budget` rounds of the seed's reference run."""
    units = {seed: flops_per_round(run) for seed, run in found.of(reference).items()}
    return {seed: accuracy_within(run, units[seed], budget) for seed, run in found.of(arm).items() if seed in units}


def best_on_dev(run: Run, rounds: int) -> float:
    """Return test accuracy at the evaluation, within the first `rounds` rounds, that is best on dev."""
    dev = np.where(rounds_done(run) <= rounds, run.rounds["dev_accuracy"], np.nan)
    return float(run.rounds["test_accuracy"][int(np.nanargmax(dev))])


def ratios(ours: Mapping[int, Cost], theirs: Mapping[int, Cost]) -> Measured | None:
    """Return the median over seeds of their cost over ours; None where no seed tells anything.

    A seed on which we never reached the target counts as 0 where they did, and not at all where neither did. A seed on
    which they alone never did counts with its lower bound, and the median is a bound where it rests on such a seed.
    """
    values, ends = [], []
    for seed in sorted(ours.keys() & theirs.keys()):
        mine, other = ours[seed], theirs[seed]
        if not mine.reached and not other.reached:
            continue
        values.append(other.value / mine.value if mine.reached else 0.0)
        ends.append(values[-1] if other.reached else math.inf)
    if not values:
        return None
    middle = stats.median(values)
    low, high = (middle.low, middle.high) if middle.low is not None else (min(values), max(values))
    assert low is not None
    assert high is not None
    return Measured(middle.value, low, high, bound=float(np.median(ends)) != middle.value)


def differences(ours: Mapping[int, float] | Partial, theirs: Mapping[int, float] | Partial) -> Measured | None:
    """Return the mean over shared seeds of ours minus theirs, in points; None where they share none."""
    mine, other = ({seed: 100 * v for seed, v in side.items() if v is not None} for side in (ours, theirs))
    found = stats.paired_difference(mine, other)
    if found is None:
        return None
    each = [mine[seed] - other[seed] for seed in mine.keys() & other.keys()]
    low, high = (found.low, found.high) if found.low is not None else (min(each), max(each))
    assert low is not None
    assert high is not None
    return Measured(found.mean, low, high)


def fastest(costs: Mapping[str, Mapping[int, Cost]], seeds: Sequence[int]) -> str:
    """Return the arm with the lowest median cost to target; a seed without a run counts as never.

    Of arms that never reached it that which was stopped first: the bound that it gives is the safest.
    """

    def rank(arm: str) -> tuple[float, float]:
        own = [costs[arm].get(seed) for seed in seeds]
        ends = [cost.value if cost is not None and cost.reached else math.inf for cost in own]
        return float(np.median(ends)), float(np.median([cost.value for cost in own if cost is not None]))

    return min(costs, key=rank)
