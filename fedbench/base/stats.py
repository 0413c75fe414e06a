"""Summaries of repeated measurements: medians with rank intervals, paired differences, the point of convergence.

No distribution is assumed: intervals come from order statistics and are left out
where too few samples exist. Nothing here draws random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

#: Below this number of samples even the range from the smallest to the largest covers the median by less than 95 %.
MIN_SAMPLES = 6
_MISS = 0.05
_ROUNDING = 1e-9


class Median(NamedTuple):
    """A median of n samples; `low`, `high` and `coverage` are None for n < 6."""

    n: int
    value: float
    low: float | None
    high: float | None
    coverage: float | None


class MeanSd(NamedTuple):
    """A mean with the sample standard deviation (n - 1); `sd` is None for n = 1."""

    n: int
    mean: float
    sd: float | None


class Paired(NamedTuple):
    """Differences of matched pairs: mean, sample SD (None for n = 1), median with its 95 % rank interval."""

    n: int
    mean: float
    sd: float | None
    median: float
    low: float | None
    high: float | None


def median(samples: Sequence[float] | np.ndarray) -> Median:
    """Return the median with a 95 % interval from binomial order statistics; ValueError for no or NaN samples.

    The interval runs from the k-th smallest to the k-th largest sample, with the largest k
    for which Binomial(n, 1/2) falls outside with a probability of at most 5 %.
    """
    ordered = np.sort(_finite(samples))
    n = len(ordered)
    value = float(np.median(ordered))
    k = _rank(n)
    if k == 0:
        return Median(n, value, None, None, None)
    return Median(n, value, float(ordered[k - 1]), float(ordered[n - k]), 1 - 2 * _tail(n, k))


def mean_sd(samples: Sequence[float] | np.ndarray) -> MeanSd:
    """Return mean and sample standard deviation; ValueError for no or NaN samples."""
    values = _finite(samples)
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return MeanSd(len(values), float(np.mean(values)), sd)


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Paired | None:
    """Return `first - second` over the keys (seeds) that both have, or None where they share none."""
    shared = sorted(first.keys() & second.keys())
    if not shared:
        return None
    differences = [first[seed] - second[seed] for seed in shared]
    centre, spread = median(differences), mean_sd(differences)
    return Paired(spread.n, spread.mean, spread.sd, centre.value, centre.low, centre.high)


def convergence_round(
    rounds: Sequence[int] | np.ndarray,
    dev_accuracy: Sequence[float] | np.ndarray,
    horizon: int = 20,
    rise: float = 0.01,
) -> int | None:
    """Return the first evaluated round from which dev accuracy rises by less than `rise` in the next `horizon` rounds.

    NaN marks rounds without evaluation. The rise is that to the best evaluation inside the
    horizon (to the next one, where none lies inside). None: no evaluation has its whole horizon
    inside the run and rises that little.
    """
    at = np.asarray(rounds, dtype=np.int64)
    accuracy = np.asarray(dev_accuracy, dtype=np.float64)
    if at.shape != accuracy.shape:
        raise ValueError(f"found {at.shape} rounds and {accuracy.shape} accuracies; expected equal lengths")
    known = np.isfinite(accuracy)
    at, accuracy = at[known], accuracy[known]
    for i, start in enumerate(at):
        if start + horizon > at[-1]:
            return None
        ahead = accuracy[i + 1 :][at[i + 1 :] <= start + horizon]
        best = ahead.max() if len(ahead) else accuracy[i + 1]
        if best - accuracy[i] < rise - _ROUNDING:
            return int(start)
    return None


def _finite(samples: Sequence[float] | np.ndarray) -> np.ndarray:
    values = np.asarray(samples, dtype=np.float64).ravel()
    if len(values) == 0:
        raise ValueError("found no samples; expected at least one")
    if np.isnan(values).any():
        raise ValueError(f"found {int(np.isnan(values).sum())} NaN among {len(values)} samples; expected numbers")
    return values


def _tail(n: int, k: int) -> float:
    """Return P(Binomial(n, 1/2) < k)."""
    return sum(math.comb(n, i) for i in range(k)) / 2**n


def _rank(n: int) -> int:
    """Return the largest k whose interval covers the median by 95 % or more; 0 where none does."""
    below, total = 0, 2**n
    for k in range(n // 2 + 1):
        below += math.comb(n, k)
        if 2 * below > _MISS * total:
            return k
    return n // 2
