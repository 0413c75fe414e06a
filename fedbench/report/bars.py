"""Draws the bar charts of a report: peak memory of a device, and where a round's time goes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from fedbench.base.records import Run
from fedbench.report import units
from fedbench.report.arms import Arm
from fedbench.report.canvas import Drawing, canvas, legend, marks, rules
from fedbench.report.looks import Theme, looks
from fedbench.report.parts import fresh, hosts
from fedbench.report.summary import OUTSIDE_LIMIT

#: What rank 0 does in a round, one after the other; "devices compute" is the part of its waiting that they fill.
PARTS = ("devices compute", "cloud", "encode", "wait", "apply", "decode, send, account")
_BAR_IN, _BAR = 0.42, 0.62
_SMALL_MODEL = 0.5
_LABEL_CHARACTERS = 38


class _Peak(NamedTuple):
    """Peak memory of an arm over its seeds: mean, smallest, largest, weights within it, and whose process it was."""

    mean: float
    low: float
    high: float
    weights: float
    shared: bool


def memory(arms: Sequence[Arm], theme: Theme) -> Drawing | None:
    """Return one bar per arm: highest resident memory of a device rank above that after the imports; None for no arm."""
    peaks = {arm.label: peak for arm in arms if (peak := _peak(arm)) is not None}
    if not peaks:
        return None
    chosen = looks(arms)
    title = "Peak device memory"
    drawn = [arm for arm in arms if arm.label in peaks]
    figure, (axes,) = canvas(theme, title, 1.4 + _BAR_IN * len(drawn))
    words = []
    for row, (label, peak) in enumerate(peaks.items()):
        colour = theme.arms[chosen[label].colour]
        hollow = {"facecolor": "none", "edgecolor": colour, "hatch": "////"}
        fill: dict[str, Any] = hollow if peak.shared else {"color": colour}
        axes.barh(row, peak.mean, height=_BAR, **fill)
        axes.barh(row, peak.weights, height=_BAR / 3, color=theme.ink)
        axes.hlines(row, peak.low, peak.high, color=theme.ink, linewidth=1.2)
        text = units.quantity(peak.mean, "B") + (" (cloud included)" if peak.shared else "")
        _end_label(axes, peak.high, row, text, theme)
        words.append(f"{label} {text}")
    _arm_axis(axes, drawn, theme, "B")
    caption = _memory_caption(arms, peaks)
    return Drawing(figure, "memory", title, caption, f"Bar chart of peak device memory: {'; '.join(words)}.")


def _memory_caption(arms: Sequence[Arm], peaks: dict[str, _Peak]) -> str:
    text = (
        "Highest resident memory (VmHWM) of a device process above that right after the imports, mean over seeds; lines "
        "run from the smallest to the largest."
    )
    least, most = (pick(peak.weights for peak in peaks.values()) for pick in (min, max))
    shown = " to ".join(dict.fromkeys(units.quantity(weights, "B") for weights in (least, most)))
    text += f" The model's weights (inner bar) are {shown}, the rest is activations, buffers and the runtime."
    if most < _SMALL_MODEL * min(peak.mean for peak in peaks.values()):
        text += (
            " Here that is mostly the runtime: zeroth-order arms load numba and LLVM for their kernels, some 60 MB that "
            "backpropagation does without. What methods need is read from `bench memory` or a run of a larger model."
        )
    if any(peak.shared for peak in peaks.values()):
        text += " Hatched: cloud and devices shared one process, so the bar holds both."
    used = [arm.label for arm in arms if not all(map(fresh, arm.runs))]
    if used:
        text += f" Runs of a process that had made others before are left out, since its heap is theirs too: {', '.join(used)}."
    return text


def _peak(arm: Arm) -> _Peak | None:
    """Return the peak memory of an arm over those seeds whose process made no run before; None without one."""
    runs = [run for run in arm.runs if fresh(run)]
    if not runs:
        return None
    known = [run.summary.peak_device_bytes for run in runs]
    peaks = [_whole_process(run) if peak is None else peak for run, peak in zip(runs, known, strict=True)]
    weights = [_weights(run) for run in runs]
    return _Peak(float(np.mean(peaks)), min(peaks), max(peaks), float(np.mean(weights)), None in known)


def _whole_process(run: Run) -> int:
    """Return the peak of the largest process of a run whose devices had none of their own, above its imports."""
    return int(max(run.memory["above_import_bytes"], default=0))


def _weights(run: Run) -> int:
    """Return the bytes of weights that a process with devices has in memory at a time."""
    return int(max(run.memory["weights_bytes"][np.isin(run.memory["rank"], hosts(run))], default=0))


def time_split(arms: Sequence[Arm], theme: Theme) -> Drawing:
    """Return one stacked bar per arm: mean seconds of a trained round by part, the first one left out as warm-up."""
    title = "Where the time of a round goes"
    figure, (axes,) = canvas(theme, title, 1.4 + _BAR_IN * len(arms))
    pieces = np.array([_parts(arm) for arm in arms])
    left = np.zeros(len(arms))
    for name, colour, width in zip(PARTS, theme.parts, pieces.T, strict=True):
        edge: dict[str, Any] = {"edgecolor": theme.surface, "linewidth": 0.8}
        axes.barh(range(len(arms)), width, left=left, height=_BAR, label=name, color=colour, **edge)
        left = left + width
    texts = [units.quantity(float(whole), "s") for whole in left]
    for row, text in enumerate(texts):
        _end_label(axes, left[row], row, text, theme)
    _arm_axis(axes, arms, theme, "s")
    legend(figure, PARTS, theme, lines=False)
    caption = (
        "Mean wall time of a computed round on rank 0 (the cloud), evaluation excluded, the first round left out. While "
        "rank 0 waits the devices compute: as much of its wait as the slowest rank computes is shown as that, the rest "
        "as wait (messages that nothing hides)."
    )
    torn = [a.label for a in arms if max(run.summary.unaccounted_fraction for run in a.runs) > OUTSIDE_LIMIT]
    if torn:
        caption += (
            f" More than {100 * OUTSIDE_LIMIT:g} % of the rounds' time lies outside all spans: {', '.join(torn)}."
        )
    words = "; ".join(f"{arm.label} {text}" for arm, text in zip(arms, texts, strict=True))
    alt = f"Stacked bar chart of the time of a round split into {', '.join(PARTS)}. Whole round: {words}."
    return Drawing(figure, "time_split", title, caption, alt)


def _parts(arm: Arm) -> np.ndarray:
    """Return [parts] mean seconds of each part over seeds; together they are the round."""
    return np.mean([_parts_of(run) for run in arm.runs], axis=0)


def _parts_of(run: Run) -> np.ndarray:
    """Return [parts] mean seconds over the computed rounds of one run, 0 where a part is not known."""
    trained = np.flatnonzero(run.rounds["trained"] == 1)
    counted = trained[1:] if len(trained) > 1 else trained
    names = ("round", "compute", "cloud", "encode", "wait", "apply")
    whole, compute, cloud, encode, wait, apply = (np.nan_to_num(run.rounds[f"{n}_s"][counted]) for n in names)
    rest = np.maximum(0.0, whole - cloud - encode - wait - apply)
    alone = 0 in hosts(run)  # rank 0 then computes for the devices itself, and does not wait for it
    devices = np.minimum(compute, rest if alone else wait)
    wait, rest = (wait, rest - devices) if alone else (wait - devices, rest)
    return np.array([devices, cloud, encode, wait, apply, rest]).mean(axis=1)


def _end_label(axes: Axes, x: float, y: float, text: str, theme: Theme) -> None:
    axes.annotate(text, (x, y), (6, 0), textcoords="offset points", va="center", color=theme.ink, fontsize=9)


def _arm_axis(axes: Axes, arms: Sequence[Arm], theme: Theme, unit: str) -> None:
    axes.set_yticks(range(len(arms)), [textwrap.fill(arm.label, _LABEL_CHARACTERS) for arm in arms], color=theme.ink)
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.margins(x=0.05)
    marks(axes, unit)
    rules(axes, theme, "x")
