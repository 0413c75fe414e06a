"""The paired comparison: a guided arm against every other arm, same seed against same seed.

Rounds are counted at the guided arm's device FLOPs a round, so an arm that spends k
times as much counts k rounds for one; an arm without device FLOPs counts plain rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedbench.base import stats
from fedbench.base.records import Run
from fedbench.report import units
from fedbench.report.arms import Arm, cumulative, rounds_done
from fedbench.report.table import Grid

#: Methods that are compared with all others; FedSPZO takes the part where no guided arm was run.
GUIDED = ("cooperllm", "cooperllm_plus")
_FALLBACK = ("fedspzo",)


class Pair(NamedTuple):
    """One seed: baseline's over guided arm's rounds to target, and guided minus baseline accuracy in points.

    `bound`: the baseline never got there, the ratio is a lower bound. None: not defined for these two runs.
    """

    seed: int
    ratio: float | None
    bound: bool
    points: float | None
    converged: int | None


def references(arms: Sequence[Arm]) -> list[Arm]:
    """Return the best arm (on dev) of each guided method that has its public labels as given."""
    chosen = []
    for method in GUIDED if any(arm.method in GUIDED for arm in arms) else _FALLBACK:
        own = [a for a in arms if a.method == method and a.runs[0].config["data"]["public_labels"] == "given"]
        if own:
            chosen.append(min(own, key=_rank))
    return chosen


def compare_grid(reference: Arm, arms: Sequence[Arm]) -> Grid:
    """Return one row per other arm that shares a seed with `reference`."""
    matched = {arm.label: pairs_of(reference, arm) for arm in arms if arm.label != reference.label}
    rows = [(label, str(len(p)), _ratio_text(p), _points_text(p)) for label, p in matched.items() if p]
    converged = [p.converged + 1 for pairs in matched.values() for p in pairs if p.converged is not None]
    note = f"Same seed against same seed, rounds counted at the device FLOPs a round of {reference.label}."
    if converged:
        ends = sorted({min(converged), max(converged)})
        note += (
            f" Accuracy (test) where it has converged, after {' to '.join(map(str, ends))} rounds:"
            " from there dev accuracy rises by less than 1 point in 20 rounds."
        )
    else:
        note += " Its dev accuracy never rises by less than 1 point in 20 rounds, so no accuracies are compared."
    if any(units.NOTHING in row for row in rows):
        note += f" {units.NOTHING}: no common target, target not reached, or too few rounds run."
    headings = ("against", "same seeds", "times fewer rounds to target", "accuracy difference (points)")
    return Grid(f"{reference.label} against the others", headings, tuple(rows), note)


def pairs_of(reference: Arm, baseline: Arm) -> list[Pair]:
    """Return one pair per seed that both arms have."""
    others = baseline.by_seed
    return [_pair(run, others[seed]) for seed, run in reference.by_seed.items() if seed in others]


def _pair(guided: Run, baseline: Run) -> Pair:
    ratio, bound = _ratio(guided, baseline)
    converged = stats.convergence_round(guided.rounds["round"], guided.rounds["dev_accuracy"])
    points = None if converged is None else _points(guided, baseline, converged)
    return Pair(guided.summary.seed, ratio, bound, points, converged)


def _ratio(guided: Run, baseline: Run) -> tuple[float | None, bool]:
    ours, theirs = guided.summary, baseline.summary
    if ours.target_accuracy != theirs.target_accuracy or not ours.rounds_to_target:
        return None, False
    position = _equal_rounds(guided, baseline)
    row = theirs.rounds if theirs.rounds_to_target is None else theirs.rounds_to_target
    return float(position[row]) / ours.rounds_to_target, theirs.rounds_to_target is None


def _points(guided: Run, baseline: Run, converged: int) -> float | None:
    """Return guided minus baseline test accuracy, the baseline's first evaluation at or after the point counting."""
    position = _equal_rounds(guided, baseline)
    at = converged + 1
    if position[-1] < at * (1 - 1e-9):
        return None
    known = np.isfinite(baseline.rounds["test_accuracy"]) & (position >= at * (1 - 1e-9))
    ours = float(guided.rounds["test_accuracy"][at])
    return 100 * (ours - float(baseline.rounds["test_accuracy"][np.flatnonzero(known)[0]])) if known.any() else None


def _equal_rounds(guided: Run, baseline: Run) -> np.ndarray:
    """Return [rows] the baseline's progress in rounds of the guided run's mean device FLOPs."""
    spent = cumulative(baseline, "device_flops")
    per_round = guided.summary.device_flops / guided.summary.rounds
    return spent / per_round if spent[-1] > 0 and per_round > 0 else rounds_done(baseline)


def _ratio_text(pairs: Sequence[Pair]) -> str:
    known = [p.ratio for p in pairs if p.ratio is not None]
    if not known:
        return units.NOTHING
    middle = stats.median(known)
    sign = "> " if any(p.bound for p in pairs if p.ratio is not None) else ""
    text, low, high = f"{sign}{middle.value:.3g}", f"{min(known):.3g}", f"{max(known):.3g}"
    if middle.low is not None and middle.high is not None:
        return f"{text} [{middle.low:.3g}, {middle.high:.3g}]"
    return text if low == high else f"{text} ({low} to {high})"


def _points_text(pairs: Sequence[Pair]) -> str:
    known = [p.points for p in pairs if p.points is not None and math.isfinite(p.points)]
    if not known:
        return units.NOTHING
    spread, middle = stats.mean_sd(known), stats.median(known)
    if middle.low is not None and middle.high is not None:
        return f"{spread.mean:+.1f} [{middle.low:+.1f}, {middle.high:+.1f}]"
    return f"{spread.mean:+.1f}" if spread.sd is None else f"{spread.mean:+.1f} ± {spread.sd:.1f}"


def _rank(arm: Arm) -> tuple[float, float]:
    reached = [math.inf if run.summary.rounds_to_target is None else run.summary.rounds_to_target for run in arm.runs]
    dev = [float(np.nanmax(run.rounds["dev_accuracy"])) for run in arm.runs]
    return sum(reached) / len(reached), -sum(dev) / len(dev)
