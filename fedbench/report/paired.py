"""Every arm against one baseline, same seed against same seed: differences of accuracy, ratios of what it costs.

An interval is that of the median of the pairs (95 %, by ranks), from 6 pairs on; fewer show their smallest and largest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fedbench.base import stats
from fedbench.base.errors import ConfigError, nearest
from fedbench.base.records import Run
from fedbench.report import units
from fedbench.report.arms import Arm
from fedbench.report.compare import best_on_dev
from fedbench.report.table import SPREADS, Grid

#: What one compares with where nothing is said: the plainest method that is there.
_PLAIN = ("fedmezo", "fedzo", "fedkseed", "public_only", "fedavg")

Value = Callable[[Run], float]

_POINTS: tuple[tuple[str, Value], ...] = (
    ("final accuracy (points)", lambda run: 100 * run.summary.final_accuracy),
    ("best accuracy (points)", lambda run: 100 * run.summary.best_accuracy),
)
_RATIOS: tuple[tuple[str, Value], ...] = (
    ("device FLOPs a round (times)", lambda run: run.summary.device_flops / run.summary.rounds),
    (
        "bytes of a device and round (times)",
        lambda run: (run.summary.uplink_bytes + run.summary.downlink_bytes) / run.summary.rounds,
    ),
    ("peak memory (times)", lambda run: run.summary.peak_device_bytes or 0),
    ("round time (times)", lambda run: run.summary.round_s_median),
)


def baseline_of(arms: Sequence[Arm], wanted: str | None = None) -> Arm | None:
    """Return the arm of a label, or the best on dev of a method, by default the plainest; None where it would be alone.

    ConfigError where no arm is called so.
    """
    labels = {arm.label: arm for arm in arms}
    if wanted is None:
        if len(arms) < 2:
            return None
        methods = {arm.method for arm in arms}
        wanted = next((method for method in _PLAIN if method in methods), arms[-1].method)
    elif wanted in labels:
        return labels[wanted]
    own = [arm for arm in arms if arm.method == wanted]
    if not own:
        raise ConfigError(f"--baseline: found {wanted!r}; allowed: {', '.join(labels)}.{nearest(wanted, list(labels))}")
    return best_on_dev(own)


def paired_grid(baseline: Arm, arms: Sequence[Arm]) -> Grid:
    """Return one row per other arm that shares a seed with the baseline."""
    rows = []
    for arm in arms:
        seeds = sorted(arm.by_seed.keys() & baseline.by_seed.keys())
        if arm.label == baseline.label or not seeds:
            continue
        apart = any(arm.by_seed[s].summary.rounds != baseline.by_seed[s].summary.rounds for s in seeds)
        final, best = (_difference(arm, baseline, value) for _, value in _POINTS)
        cells = [f"{final} *" if apart else final, best]
        cells += [_ratio(arm, baseline, seeds, value) for _, value in _RATIOS]
        rows.append((arm.label, str(len(seeds)), *cells))
    headings = ("against", "pairs", *(name for name, _ in (*_POINTS, *_RATIOS)))
    note = (
        f"Each arm minus, or over, {baseline.label} of the same seed: mean of the differences, median of the ratios. "
        f"{SPREADS}"
    )
    own = [arm for arm in arms if arm.method == baseline.method]
    if len(own) > 1 and baseline is best_on_dev(own):
        note += f" {baseline.label} is the best on dev of the {len(own)} arms of {baseline.method}."
    if any(row[2].endswith("*") for row in rows):
        note += " *: the two ran different numbers of rounds, so this is not after equal training."
    return Grid(f"Paired with {baseline.label}", headings, tuple(rows), note)


def _difference(arm: Arm, baseline: Arm, value: Value) -> str:
    ours, theirs = ({seed: value(run) for seed, run in one.by_seed.items()} for one in (arm, baseline))
    found = stats.paired_difference(ours, theirs)
    assert found is not None
    text = f"{found.mean:+.1f}" + ("" if found.sd is None else f" ± {found.sd:.1f}")
    return text if found.low is None else f"{text} [{found.low:+.1f}, {found.high:+.1f}]"


def _ratio(arm: Arm, baseline: Arm, seeds: Sequence[int], value: Value) -> str:
    ours, theirs = (np.array([value(one.by_seed[seed]) for seed in seeds]) for one in (arm, baseline))
    if not (ours > 0).all() or not (theirs > 0).all():
        return units.NOTHING
    middle = stats.median(ours / theirs)
    text, low, high = (_times(number) for number in (middle.value, np.min(ours / theirs), np.max(ours / theirs)))
    if low == high:
        return text
    if middle.low is not None and middle.high is not None:
        return f"{text} [{_times(middle.low)}, {_times(middle.high)}]"
    return f"{text} ({low} to {high})"


def _times(ratio: float) -> str:
    """Return a ratio with three digits that count, never as a power of ten."""
    return f"{ratio:.3g}" if ratio < 1000 else f"{float(f'{ratio:.3g}'):,.0f}"
