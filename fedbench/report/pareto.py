"""Draws memory against accuracy: which arms no other beats in both, and what the others pay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedbench.report import units
from fedbench.report.arms import Arm
from fedbench.report.bars import whole_process
from fedbench.report.canvas import Drawing, canvas, legend, marks, rules
from fedbench.report.looks import Theme, looks

_WIDE_RATIO = 30.0


class Place(NamedTuple):
    """Where an arm stands: mean peak memory of a device (bytes), mean and range of best accuracy over seeds."""

    label: str
    memory: float
    accuracy: float
    low: float
    high: float
    shared: bool


def pareto(arms: Sequence[Arm], theme: Theme) -> Drawing | None:
    """Return best test accuracy over peak device memory, those that nothing beats joined; None for one arm alone."""
    places = [_place(arm) for arm in arms]
    if len(places) < 2:
        return None
    title = "Accuracy against device memory"
    figure, (axes,) = canvas(theme, title, 4.4)
    chosen = looks(arms)
    best = frontier([place for place in places if not place.shared] or places)
    steps: dict[str, Any] = {"color": theme.muted, "linewidth": 1.3, "linestyle": (0, (4, 2)), "zorder": 1}
    axes.plot([p.memory for p in best], [p.accuracy for p in best], drawstyle="steps-post", **steps)
    for place in places:
        look = chosen[place.label]
        colour = theme.arms[look.colour]
        bar: dict[str, Any] = {"color": colour, "linewidth": 1.4, "alpha": 0.7, "zorder": 2}
        axes.vlines(place.memory, place.low, place.high, **bar)
        mark: dict[str, Any] = {"marker": look.marker, "markersize": 9, "linestyle": "none", "zorder": 3}
        mark |= {
            "markerfacecolor": theme.surface if place.shared else colour,
            "markeredgecolor": colour,
        }
        axes.plot([place.memory], [place.accuracy], label=place.label, markeredgewidth=1.6, **mark)
    sizes = [place.memory for place in places if place.memory > 0]
    log = bool(sizes) and max(sizes) > _WIDE_RATIO * min(sizes)
    marks(axes, "B", log=log)
    if not log and sizes:
        axes.set_xlim(0, 1.08 * max(sizes))
    axes.set_xlabel("peak memory of a device", color=theme.muted)
    axes.set_ylabel("best test accuracy", color=theme.muted)
    axes.margins(y=0.12)
    rules(axes, theme, "y")
    legend(figure, [place.label for place in places], theme, lines=False)
    names = ", ".join(place.label for place in best)
    caption = (
        "Up and to the left is better. Marks are means over seeds, bars their smallest and largest accuracy; the dashed "
        f"line joins the arms that no other beats in both: {names}. Memory is what the bars of peak memory show."
    )
    if any(place.shared for place in places):
        caption += " Hollow: cloud and devices shared one process, so the memory is that of both"
        caption += "." if all(place.shared for place in places) else "; the line leaves them out."
    words = "; ".join(f"{p.label} {units.fraction(p.accuracy)} at {units.quantity(p.memory, 'B')}" for p in places)
    return Drawing(figure, "pareto", title, caption, f"Scatter chart of best test accuracy over peak memory: {words}.")


def frontier(places: Sequence[Place]) -> list[Place]:
    """Return the places that no other beats in both memory and accuracy, by rising memory."""
    best: list[Place] = []
    for place in sorted(places, key=lambda p: (p.memory, -p.accuracy)):
        if not best or place.accuracy > best[-1].accuracy:
            best.append(place)
    return best


def _place(arm: Arm) -> Place:
    known = [run.summary.peak_device_bytes for run in arm.runs if run.summary.peak_device_bytes is not None]
    accuracies = [run.summary.best_accuracy for run in arm.runs]
    memory = float(np.mean(known)) if known else whole_process(arm)
    return Place(arm.label, memory, float(np.mean(accuracies)), min(accuracies), max(accuracies), not known)
