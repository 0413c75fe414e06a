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
from fedbench.report.table import SPREADS, Grid

#: Methods that are compared with all others; FedSPZO takes the part where no guided arm was run.
GUIDED = ("cooperllm", "cooperllm_plus")
_FALLBACK = ("fedspzo",)
_POINTS_HEADING = "accuracy difference (points)"


class Pair(NamedTuple):
    """One seed: baseline's over guided arm's rounds to target, and guided minus baseline accuracy in points.

    `bound`: "> " where the baseline never got to the target, "< " where the guided arm never did, and the ratio is but a
    bound. `reached`: whether the guided arm and the baseline did. None: not defined for these two runs.
    """

    seed: int
    ratio: float | None
    bound: str
    reached: tuple[bool, bool]
    points: float | None
    converged: int | None


def references(arms: Sequence[Arm]) -> list[Arm]:
    """Return the best arm (on dev) of each guided method that has its public labels as given."""
    chosen = []
    for method in GUIDED if any(arm.method in GUIDED for arm in arms) else _FALLBACK:
        own = [a for a in arms if a.method == method and a.runs[0].config["data"]["public_labels"] == "given"]
        if own:
            chosen.append(best_on_dev(own))
    return chosen


def best_on_dev(arms: Sequence[Arm]) -> Arm:
    """Return the arm that gets to the target in the fewest rounds (mean over seeds), or else highest, both on dev."""
    return min(arms, key=_rank)


def compare_grid(reference: Arm, arms: Sequence[Arm]) -> Grid:
    """Return one row per other arm that shares a seed with `reference`."""
    matched = {arm.label: pairs_of(reference, arm) for arm in arms if arm.label != reference.label}
    rows = [(label, str(len(p)), _reached(p), _ratio_text(p), _points_text(p)) for label, p in matched.items() if p]
    converged = [p.converged + 1 for pairs in matched.values() for p in pairs if p.converged is not None]
    note = (
        f"Same seed against same seed, rounds counted at the device FLOPs a round of {reference.label}. Seeds at target: "
        f"of {reference.label}, and of the other. Median of the ratios, mean of the differences. {SPREADS} < or > a ratio: "
        f"{reference.label}, or the other, never got to the target in the rounds that it ran; < counts as the smallest."
    )
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
    headings = ("against", "same seeds", "seeds at target", "times fewer rounds to target", _POINTS_HEADING)
    return Grid(f"{reference.label} against the others", headings, tuple(rows), note)


def pairs_of(reference: Arm, baseline: Arm) -> list[Pair]:
    """Return one pair per seed that both arms have."""
    others = baseline.by_seed
    return [_pair(run, others[seed]) for seed, run in reference.by_seed.items() if seed in others]


def _pair(guided: Run, baseline: Run) -> Pair:
    ratio, bound = _ratio(guided, baseline)
    reached = (guided.summary.rounds_to_target is not None, baseline.summary.rounds_to_target is not None)
    converged = stats.convergence_round(guided.rounds["round"], guided.rounds["dev_accuracy"])
    points = None if converged is None else _points(guided, baseline, converged)
    return Pair(guided.summary.seed, ratio, bound, reached, points, converged)


def _ratio(guided: Run, baseline: Run) -> tuple[float | None, str]:
    """Return the baseline's over the guided run's rounds to target, and what bound it is."""
    ours, theirs = guided.summary, baseline.summary
    mine, other = ours.rounds_to_target, theirs.rounds_to_target
    if ours.target_accuracy != theirs.target_accuracy or mine == 0 or (mine is None and other is None):
        return None, ""
    position = _equal_rounds(guided, baseline)
    ratio = float(position[theirs.rounds if other is None else other]) / (ours.rounds if mine is None else mine)
    return ratio, "< " if mine is None else "> " if other is None else ""


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
    known = sorted((p.bound != "< ", p.ratio, p.bound) for p in pairs if p.ratio is not None)
    if not known:
        return units.NOTHING
    middle = stats.median(range(len(known)))
    text = _at(known, middle.value)
    if middle.low is not None and middle.high is not None:
        return f"{text} [{_at(known, middle.low)}, {_at(known, middle.high)}]{_of(known, pairs)}"
    low, high = (_at(known, end) for end in (0, len(known) - 1))
    return f"{text if low == high else f'{text} ({low} to {high})'}{_of(known, pairs)}"


def _at(ordered: Sequence[tuple[bool, float, str]], place: float) -> str:
    """Return the ratio at a place of the order, between two places their mean, with the sign of a bound.

    The true ratio of a lower bound may have its place further up, so the ratios from there on are lower bounds as well.
    """
    below, above = math.floor(place), math.ceil(place)
    text = f"{(ordered[below][1] + ordered[above][1]) / 2:.3g}"
    least = any(bound == "> " for *_, bound in ordered[: above + 1])
    if ordered[below][2] == "< ":
        return units.NOTHING if least else f"< {text}"
    return f"> {text}" if least else text


def _reached(pairs: Sequence[Pair]) -> str:
    """Return how many seeds of the guided arm and of the baseline got to the target."""
    ours, theirs = (sum(p.reached[i] for p in pairs) for i in (0, 1))
    return f"{ours} and {theirs}"


def _of(known: Sequence[object], pairs: Sequence[Pair]) -> str:
    """Return how many of the seeds stand behind a figure, where that is not all."""
    return f", {len(known)} of {len(pairs)} seeds" if len(known) < len(pairs) else ""


def _points_text(pairs: Sequence[Pair]) -> str:
    known = [p.points for p in pairs if p.points is not None and math.isfinite(p.points)]
    if not known:
        return units.NOTHING
    spread, middle = stats.mean_sd(known), stats.median(known)
    if middle.low is not None and middle.high is not None:
        return f"{spread.mean:+.1f} [{middle.low:+.1f}, {middle.high:+.1f}]{_of(known, pairs)}"
    return f"{spread.mean:+.1f}{'' if spread.sd is None else f' ± {spread.sd:.1f}'}{_of(known, pairs)}"


def _rank(arm: Arm) -> tuple[float, float]:
    reached = [math.inf if run.summary.rounds_to_target is None else run.summary.rounds_to_target for run in arm.runs]
    dev = [float(np.nanmax(run.rounds["dev_accuracy"])) for run in arm.runs]
    return sum(reached) / len(reached), -sum(dev) / len(dev)
