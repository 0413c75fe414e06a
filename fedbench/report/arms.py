"""Groups runs into arms: same method and settings, several seeds. It reads records only, never files."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fedbench.base.records import Run
from fedbench.results.arms import names

#: The order of methods in tables and legends; others follow by name.
METHOD_ORDER = (
    *("cooperllm", "cooperllm_plus", "public_only", "fedmezo", "fedspzo", "fedzo", "fedkseed", "fedkseed_pro"),
    *("fwdllm", "decomfl", "baffle", "spry", "ferret", "meerkat", "agzo", "bitfit", "fedavg_lora", "fedavg"),
)


@dataclass(frozen=True)
class Arm:
    """Runs that differ by their seed alone, in order of seed; `settings` are those of the label."""

    label: str
    method: str
    settings: dict[str, Any]
    runs: tuple[Run, ...]

    @property
    def by_seed(self) -> dict[int, Run]:
        """The run of each seed."""
        return {run.summary.seed: run for run in self.runs}


class Curve(NamedTuple):
    """A line over the seeds of an arm: x, and mean, smallest and largest y at that x, each [points]."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def group(runs: Sequence[Run]) -> list[Arm]:
    """Return the arms of `runs`; a run that occurs twice counts once."""
    unique = {run.summary.run_id: run for run in runs}
    members: dict[str, list[Run]] = {}
    named = names(list(unique.values()))
    for run_id, run in unique.items():
        members.setdefault(named[run_id].label, []).append(run)
    arms = [
        Arm(
            label,
            own[0].summary.method,
            named[own[0].summary.run_id].settings,
            tuple(sorted(own, key=lambda run: run.summary.seed)),
        )
        for label, own in members.items()
    ]
    return sorted(arms, key=lambda arm: (_place(arm.method), [_order(v) for v in arm.settings.values()], arm.label))


def cumulative(run: Run, column: str) -> np.ndarray:
    """Return [rows] the running total of a column of `rounds`; row 0 is the state before training."""
    values = np.asarray(run.rounds[column], dtype=np.float64)
    return np.cumsum(np.where(np.isfinite(values), values, 0.0))


def rounds_done(run: Run) -> np.ndarray:
    """Return [rows] how many rounds were complete at each row, from 0."""
    return np.asarray(run.rounds["round"], dtype=np.float64) + 1


def curve(arm: Arm, x: str, y: str) -> Curve:
    """Return accuracy `y` (a column of `rounds`) against rounds (`x` = "round") or the running total of column `x`.

    Against rounds the points are those that all seeds evaluated. Seeds that spend differently are not at the same x in
    the same round: against a total each is interpolated where any was evaluated, as far as the one that spent least.
    """
    known = [np.isfinite(run.rounds[y]) for run in arm.runs]
    xs = [(rounds_done(run) if x == "round" else cumulative(run, x))[k] for run, k in zip(arm.runs, known, strict=True)]
    ys = [np.asarray(run.rounds[y], dtype=np.float64)[k] for run, k in zip(arm.runs, known, strict=True)]
    if not all(map(len, xs)):
        return Curve(*np.empty((4, 0)))
    if x == "round":
        grid = functools.reduce(np.intersect1d, xs)
    else:
        grid = functools.reduce(np.union1d, xs)
        grid = grid[grid <= min(own[-1] for own in xs)]
    at = np.stack([np.interp(grid, *pair) for pair in zip(xs, ys, strict=True)])
    return Curve(grid, at.mean(axis=0), at.min(axis=0), at.max(axis=0))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _place(method: str) -> tuple[int, str]:
    return (METHOD_ORDER.index(method) if method in METHOD_ORDER else len(METHOD_ORDER), method)


def _order(value: Any) -> tuple[int, float, str]:
    return (1, float(value), "") if _is_number(value) else (0 if value is None else 2, 0.0, str(value))
