"""The figures that a reader looks for first: which arm is best in what, over its seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fedbench.base.records import Run
from fedbench.report import units
from fedbench.report.arms import Arm


class Highlight(NamedTuple):
    """One figure with the arm that has it, or the first that has it and how many others do."""

    heading: str
    value: str
    label: str


def highlights(arms: Sequence[Arm]) -> list[Highlight]:
    """Return the best arms in accuracy, rounds to target, memory, bytes up and round time; nothing for one arm alone.

    What no run knows is left out; so are arms whose devices compute nothing from memory, and those that send nothing
    from bytes.
    """
    if len(arms) < 2:
        return []
    found = [
        _best(
            arms,
            "highest accuracy (best on dev)",
            lambda run: -run.summary.best_accuracy,
            lambda v: units.fraction(-v),
        ),
        _soonest(arms),
        _best(
            arms,
            "least device memory",
            lambda run: run.summary.peak_device_bytes if run.summary.device_flops > 0 else None,
            lambda v: units.quantity(v, "B"),
        ),
        _best(
            arms,
            "least sent in a round",
            lambda run: run.summary.uplink_bytes_per_device_round or None,
            lambda v: units.quantity(v, "B"),
        ),
        _best(arms, "shortest round", lambda run: run.summary.round_s_median, lambda v: units.quantity(v, "s")),
    ]
    return [highlight for highlight in found if highlight is not None]


def _best(
    arms: Sequence[Arm], heading: str, value: Callable[[Run], float | None], show: Callable[[float], str]
) -> Highlight | None:
    """Return the arm with the smallest mean of a value that all its runs know, and those that show the same."""
    means: list[tuple[float, str]] = []
    for arm in arms:
        values = [value(run) for run in arm.runs]
        known = [v for v in values if v is not None]
        if known and len(known) == len(values):
            means.append((float(np.mean(known)), arm.label))
    if not means:
        return None
    shown = show(min(mean for mean, _ in means))
    return Highlight(heading, shown, _told([label for mean, label in means if show(mean) == shown]))


def _soonest(arms: Sequence[Arm]) -> Highlight | None:
    """Return the arm that reached the target in the fewest rounds, of those that did with every seed."""
    reached = {arm.label: [r for run in arm.runs if (r := run.summary.rounds_to_target) is not None] for arm in arms}
    whole = [arm for arm in arms if len(reached[arm.label]) == len(arm.runs)]
    if not whole:
        return None
    medians = {arm.label: float(np.median(reached[arm.label])) for arm in whole}
    fewest = min(medians.values())
    tied = [label for label, median in medians.items() if median == fewest]
    return Highlight("fewest rounds to target", units.count(fewest), _told(tied))


def _told(labels: Sequence[str]) -> str:
    """Return the first of the arms that share a place, and how many others do."""
    others = len(labels) - 1
    return labels[0] if not others else f"{labels[0]} and {others} other{'s' if others > 1 else ''}"
