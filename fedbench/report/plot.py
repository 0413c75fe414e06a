"""Draws accuracy on dev and test against kinds of cost: rounds, device FLOPs, bytes up and down, wall and simulated time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from fedbench.report import units
from fedbench.report.arms import Arm, Curve, curve
from fedbench.report.canvas import Drawing, canvas, legend, line, marks, rules
from fedbench.report.looks import Theme, looks


class Cost(NamedTuple):
    """An x axis: file name, title, label, column of `rounds` whose running total it shows, unit."""

    name: str
    title: str
    label: str
    column: str
    unit: str


COSTS = (
    Cost("accuracy_rounds", "Accuracy against rounds", "rounds", "round", ""),
    Cost("accuracy_flops", "Accuracy against device compute", "FLOPs of one sampled device", "device_flops", "FLOP"),
    Cost("accuracy_uplink", "Accuracy against uplink", "bytes sent by one sampled device", "uplink_bytes", "B"),
    Cost("accuracy_downlink", "Accuracy against downlink", "bytes sent to one sampled device", "downlink_bytes", "B"),
    Cost("accuracy_time", "Accuracy against wall time", "wall time without evaluation", "round_s", "s"),
    Cost("accuracy_simulated", "Accuracy against simulated time", "seconds on the virtual clock", "sim_s", "s"),
)
_SPLITS = (("dev_accuracy", "dev split"), ("test_accuracy", "test split"))
_NOTHING_SPENT = {
    "device_flops": "Spends no device FLOPs",
    "uplink_bytes": "Sends no bytes",
    "downlink_bytes": "Is sent no bytes",
    "sim_s": "Has no virtual clock, or nothing takes time on it",
}
_WIDE_RATIO = 30.0


def accuracy(arms: Sequence[Arm], cost: Cost, theme: Theme) -> Drawing | None:
    """Return dev and test accuracy against one cost; None where no arm has any of it.

    A line is the mean over seeds, a band their smallest and largest value; arms that went the same way at the same cost
    are one line. The axis is logarithmic where the arms' totals differ by more than 30 times.
    """
    lines = {arm.label: [curve(arm, cost.column, split) for split, _ in _SPLITS] for arm in arms}
    names = _names(arms, lines)
    drawn = {label: float(lines[label][0].x[-1]) for label in names if _spends(lines[label][0])}
    if not drawn:
        return None
    log = bool(cost.unit) and max(drawn.values()) > _WIDE_RATIO * min(drawn.values())
    figure, panels = canvas(theme, cost.title, 4.3, columns=len(_SPLITS))
    chosen = looks(arms)
    for i, (axes, (_, split)) in enumerate(zip(panels, _SPLITS, strict=True)):
        for label in drawn:
            own, look = _positive(lines[label][i]) if log else lines[label][i], chosen[label]
            axes.fill_between(own.x, own.low, own.high, color=theme.arms[look.colour], alpha=0.16, linewidth=0)
            line(axes, own.x, own.mean, look, theme).set_label(names[label] if i == 0 else "_")
        axes.set_title(split, loc="left", fontsize=10, color=theme.muted)
        axes.set_xlabel(cost.label, color=theme.muted)
        rules(axes, theme, "y")
        axes.margins(x=0.02)
        marks(axes, cost.unit, log=log, whole=cost.column == "round")
    panels[0].set_ylabel("accuracy", color=theme.muted)
    _target(panels[0], arms, theme)
    legend(figure, [names[label] for label in drawn], theme, lines=True)
    left_out = [label for label, own in lines.items() if not _spends(own[0])]
    shared = [names[label] for label in drawn if names[label] != label]
    finals = ", ".join(f"{names[label]} {_last(lines[label][1])}" for label in drawn)
    alt = f"Two line charts, dev and test accuracy against {cost.label}. Last test accuracy: {finals}."
    return Drawing(figure, cost.name, cost.title, _caption(arms, left_out, shared, cost, log), alt)


def _names(arms: Sequence[Arm], lines: Mapping[str, Sequence[Curve]]) -> dict[str, str]:
    """Return the lines to draw, by the label of their first arm, and the names of all arms that each one stands for.

    One line is enough where every seed has the same trajectory and the curves are the same: arms that differ by ranks.
    """
    ways = {arm.label: {run.summary.seed: run.summary.trajectory_sha256 for run in arm.runs} for arm in arms}
    methods = {arm.label: arm.method for arm in arms}
    names: dict[str, str] = {}
    for label, own in lines.items():
        first = next((f for f in names if ways[f] == ways[label] and _equal(lines[f], own)), label)
        names[first] = f"{names[first]} = {label.removeprefix(f'{methods[first]} ')}" if first in names else label
    return names


def _equal(some: Sequence[Curve], others: Sequence[Curve]) -> bool:
    pairs = [pair for curves in zip(some, others, strict=True) for pair in zip(*curves, strict=True)]
    return all(a.shape == b.shape and np.allclose(a, b) for a, b in pairs)


def _spends(own: Curve) -> bool:
    return len(own.x) > 0 and bool(own.x[-1] > 0)


def _positive(own: Curve) -> Curve:
    return Curve(*(values[own.x > 0] for values in own))


def _last(own: Curve) -> str:
    return units.fraction(float(own.mean[-1]) if len(own.mean) else None)


def _target(axes: Axes, arms: Sequence[Arm], theme: Theme) -> None:
    """Draw the target, outside whose right end stands its value, where all runs share one."""
    targets = {run.summary.target_accuracy for arm in arms for run in arm.runs}
    target = targets.pop() if len(targets) == 1 else None
    if target is not None:
        axes.axhline(target, color=theme.ink, linewidth=1, linestyle=(0, (2, 2)), alpha=0.8)
        text: dict[str, Any] = {"ha": "left", "va": "center", "fontsize": 8.5, "color": theme.ink}
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(f"target\n{target:g}", (1, target), (4, 0), **place, **text)


def _caption(arms: Sequence[Arm], left_out: Sequence[str], shared: Sequence[str], cost: Cost, log: bool) -> str:
    seeds = sorted({len(arm.runs) for arm in arms})
    span = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else str(seeds[0])
    text = "One seed." if span == "1" else f"Mean over {span} seeds; bands run from the smallest to the largest value."
    if log:
        text += " Logarithmic axis; the state before training has no place on it."
    if shared:
        text += f" One line where every seed went the same way bit by bit: {'; '.join(shared)}."
    if left_out:
        spent = _NOTHING_SPENT.get(cost.column, "Not evaluated")
        text += f" {spent}, so not drawn: {', '.join(left_out)}."
    return text
