"""Draws the bar charts of a report: peak memory of a device, and where a round's time goes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from fedbench.report import units
from fedbench.report.arms import Arm
from fedbench.report.canvas import Drawing, canvas, legend, marks, rules
from fedbench.report.looks import Theme, looks
from fedbench.report.summary import OUTSIDE_LIMIT

PARTS = ("compute", "cloud", "encode", "wait", "apply")
_BAR_IN, _BAR = 0.42, 0.62
_TOLERANCE = 1.02
_LABEL_CHARACTERS = 38


def memory(arms: Sequence[Arm], theme: Theme) -> Drawing:
    """Return one bar per arm: highest resident memory of a device rank above that after the imports."""
    chosen = looks(arms)
    title = "Peak device memory"
    figure, (axes,) = canvas(theme, title, 1.4 + _BAR_IN * len(arms))
    words, shared = [], False
    for row, arm in enumerate(arms):
        known = [run.summary.peak_device_bytes for run in arm.runs if run.summary.peak_device_bytes is not None]
        value = float(np.mean(known)) if known else whole_process(arm)
        shared |= not known
        colour = theme.arms[chosen[arm.label].colour]
        hollow = {"facecolor": "none", "edgecolor": colour, "hatch": "////"}
        fill: dict[str, Any] = {"color": colour} if known else hollow
        axes.barh(row, value, height=_BAR, **fill)
        text = units.quantity(value, "B") + ("" if known else " (cloud included)")
        _end_label(axes, value, row, text, theme)
        words.append(f"{arm.label} {text}")
    _arm_axis(axes, arms, theme, "B")
    caption = "Highest resident memory (VmHWM) of a device process above that right after the imports, mean over seeds."
    if shared:
        caption += " Hatched: cloud and devices shared one process, so the bar holds both."
    return Drawing(figure, "memory", title, caption, f"Bar chart of peak device memory: {'; '.join(words)}.")


def time_split(arms: Sequence[Arm], theme: Theme) -> Drawing:
    """Return one stacked bar per arm: mean seconds of a trained round by part, the first one left out as warm-up."""
    title = "Where the time of a round goes"
    figure, (axes,) = canvas(theme, title, 1.4 + _BAR_IN * len(arms))
    means = np.array([_parts(arm) for arm in arms])
    known, total = means[:, :-1], means[:, -1]
    pieces = np.column_stack([known, np.maximum(0.0, total - known.sum(axis=1))])
    names = [*PARTS, "other"]
    left = np.zeros(len(arms))
    for name, colour, width in zip(names, theme.parts, pieces.T, strict=True):
        edge: dict[str, Any] = {"edgecolor": theme.surface, "linewidth": 0.8}
        axes.barh(range(len(arms)), width, left=left, height=_BAR, label=name, color=colour, **edge)
        left = left + width
    texts = [units.quantity(float(whole), "s") for whole in total]
    for row, text in enumerate(texts):
        _end_label(axes, left[row], row, text, theme)
    _arm_axis(axes, arms, theme, "s")
    legend(figure, names, theme, lines=False)
    caption = (
        "Mean time of a computed round by part, the first left out; the figure at the end is the round's wall time."
    )
    if np.any(left > _TOLERANCE * total):
        caption += " Where the bar is longer than that, parts on different ranks ran at the same time."
    torn = [a.label for a in arms if max(run.summary.unaccounted_fraction for run in a.runs) > OUTSIDE_LIMIT]
    if torn:
        caption += (
            f" More than {100 * OUTSIDE_LIMIT:g} % of the rounds' time lies outside all spans: {', '.join(torn)}."
        )
    words = "; ".join(f"{arm.label} {text}" for arm, text in zip(arms, texts, strict=True))
    alt = f"Stacked bar chart of the time of a round split into {', '.join(names)}. Whole round: {words}."
    return Drawing(figure, "time_split", title, caption, alt)


def _parts(arm: Arm) -> list[float]:
    """Return mean seconds of each part and of the whole round over seeds; 0 where a part is not known."""
    trained = [np.flatnonzero(run.rounds["trained"] == 1) for run in arm.runs]
    counted = [rounds[1:] if len(rounds) > 1 else rounds for rounds in trained]
    means = []
    for column in (*(f"{part}_s" for part in PARTS), "round_s"):
        values = [np.nan_to_num(run.rounds[column][rounds]) for run, rounds in zip(arm.runs, counted, strict=True)]
        means.append(float(np.mean([np.mean(value) if value.size else 0.0 for value in values])))
    return means


def whole_process(arm: Arm) -> float:
    """Return the mean peak of the largest process of an arm whose devices had none of their own, above its imports."""
    return float(np.mean([max(run.memory["above_import_bytes"], default=0) for run in arm.runs]))


def _end_label(axes: Axes, x: float, y: float, text: str, theme: Theme) -> None:
    axes.annotate(text, (x, y), (6, 0), textcoords="offset points", va="center", color=theme.ink, fontsize=9)


def _arm_axis(axes: Axes, arms: Sequence[Arm], theme: Theme, unit: str) -> None:
    axes.set_yticks(range(len(arms)), [textwrap.fill(arm.label, _LABEL_CHARACTERS) for arm in arms], color=theme.ink)
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.margins(x=0.05)
    marks(axes, unit)
    rules(axes, theme, "x")
