"""Draws memory against accuracy: which arms no other beats in both, and what the others pay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from fedbench.report import units
from fedbench.report.arms import Arm
from fedbench.report.canvas import Drawing, canvas, legend, marks, rules
from fedbench.report.looks import Theme, looks

_WIDE_RATIO = 30.0
_NARROW = 1 / 3  # of an axis from 0, which data that fill less of it are cut out of
_MARGIN = 0.12
_LABEL_PT, _LINE_PT, _CHARACTER_PT = 6, 11, 4.8


class Place(NamedTuple):
    """Where an arm stands: mean and range over seeds of a device's peak memory (bytes) and of best accuracy."""

    label: str
    memory: float
    least: float
    most: float
    accuracy: float
    low: float
    high: float


def pareto(arms: Sequence[Arm], theme: Theme) -> Drawing | None:
    """Return best test accuracy over peak device memory, those that nothing beats joined; None for less than two arms.

    Arms whose devices compute nothing, or share a process with the cloud, have no place in it.
    """
    places = [place for arm in arms if (place := _place(arm)) is not None]
    if len(places) < 2:
        return None
    title = "Accuracy against device memory"
    figure, (axes,) = canvas(theme, title, 4.4)
    chosen = looks(arms)
    best = frontier(places)
    steps: dict[str, Any] = {"color": theme.muted, "linewidth": 1.3, "linestyle": (0, (4, 2)), "zorder": 1}
    axes.plot([p.memory for p in best], [p.accuracy for p in best], drawstyle="steps-post", **steps)
    for place in places:
        look = chosen[place.label]
        colour = theme.arms[look.colour]
        bar: dict[str, Any] = {"color": colour, "linewidth": 1.4, "alpha": 0.7, "zorder": 2}
        axes.vlines(place.memory, place.low, place.high, **bar)
        axes.hlines(place.accuracy, place.least, place.most, **bar)
        mark: dict[str, Any] = {"marker": look.marker, "markersize": 9, "linestyle": "none", "zorder": 3}
        mark |= {"markerfacecolor": colour, "markeredgecolor": theme.surface}
        axes.plot([place.memory], [place.accuracy], label=place.label, markeredgewidth=1.1, **mark)
    cut = _memory_axis(axes, places)
    axes.set_xlabel("peak memory of a device", color=theme.muted)
    axes.set_ylabel("best test accuracy", color=theme.muted)
    axes.margins(y=_MARGIN)
    _name(axes, best, theme)
    rules(axes, theme, "y")
    legend(figure, [place.label for place in places], theme, lines=False)
    caption = _caption(arms, places, best, cut)
    words = "; ".join(f"{p.label} {units.fraction(p.accuracy)} at {units.quantity(p.memory, 'B')}" for p in places)
    return Drawing(figure, "pareto", title, caption, f"Scatter chart of best test accuracy over peak memory: {words}.")


def _memory_axis(axes: Axes, places: Sequence[Place]) -> bool:
    """Fit the x axis to the places; return whether it was cut, and does not begin at 0."""
    least, most = min(place.least for place in places), max(place.most for place in places)
    log = most > _WIDE_RATIO * least > 0
    marks(axes, "B", log=log)
    if log:
        return False
    cut = 0 < most - least < _NARROW * most
    margin = _MARGIN * (most - least if cut else most)
    axes.set_xlim(least - margin if cut else 0, most + margin)
    return cut


def _name(axes: Axes, places: Sequence[Place], theme: Theme) -> None:
    """Write labels beside their marks, on the side that has room, and above those that they would lie on."""
    to_points = 72 / axes.get_figure().dpi  # type: ignore[union-attr]
    (low, _), (high, _) = axes.transData.transform([(x, 0) for x in axes.get_xlim()]) * to_points
    axes.get_ylim()  # settles the limits that marks are placed by
    taken: list[tuple[float, float, float]] = []
    for place in places:
        x, y = axes.transData.transform((place.memory, place.accuracy)) * to_points
        left, width, up = x < (low + high) / 2, _CHARACTER_PT * len(place.label), _LABEL_PT
        start = x + _LABEL_PT if left else x - _LABEL_PT - width
        while any(start < end and begin < start + width and abs(y + up - at) < _LINE_PT for begin, end, at in taken):
            up += _LINE_PT
        taken.append((start, start + width, y + up))
        text: dict[str, Any] = {"ha": "left" if left else "right", "va": "bottom", "fontsize": 8.5, "color": theme.ink}
        offset: dict[str, Any] = {"xytext": (_LABEL_PT if left else -_LABEL_PT, up), "textcoords": "offset points"}
        axes.annotate(place.label, (place.memory, place.accuracy), zorder=4, **offset, **text)


def _caption(arms: Sequence[Arm], places: Sequence[Place], best: Sequence[Place], cut: bool) -> str:
    text = (
        "Up and to the left is better. Marks are means over seeds, lines their smallest and largest values; the dashed "
        f"line joins the arms that no other beats in both: {', '.join(place.label for place in best)}. Memory is what the "
        "bars of peak memory show."
    )
    if cut:
        text += " The memory axis does not begin at 0."
    drawn = {place.label for place in places}
    left_out = [arm.label for arm in arms if arm.label not in drawn]
    if left_out:
        text += (
            f" Not drawn, since their devices compute nothing or share a process with the cloud: {', '.join(left_out)}."
        )
    return text


def frontier(places: Sequence[Place]) -> list[Place]:
    """Return the places that no other beats in both memory and accuracy, by rising memory."""
    best: list[Place] = []
    for place in sorted(places, key=lambda p: (p.memory, -p.accuracy)):
        if not best or place.accuracy > best[-1].accuracy:
            best.append(place)
    return best


def _place(arm: Arm) -> Place | None:
    known = [run.summary.peak_device_bytes for run in arm.runs if run.summary.peak_device_bytes is not None]
    if not known or not all(run.summary.device_flops > 0 for run in arm.runs):
        return None
    accuracies = [run.summary.best_accuracy for run in arm.runs]
    spread = (float(np.mean(accuracies)), min(accuracies), max(accuracies))
    return Place(arm.label, float(np.mean(known)), min(known), max(known), *spread)
