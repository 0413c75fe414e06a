"""Tables of runs for the terminal, Markdown and CSV, all from one list of columns. It prints nothing itself."""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from fedbench.base import stats
from fedbench.base.records import Run
from fedbench.report import units
from fedbench.report.arms import Arm, group


class Grid(NamedTuple):
    """A table as text: title, one heading per column, rows of cells; the first column is text, the rest are figures."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


class Measure(NamedTuple):
    """One figure per arm: CSV name, heading, its value in a run (None: not known) and how a value is shown."""

    name: str
    heading: str
    value: Callable[[Run], float | None]
    show: Callable[[float | None], str]


ACCURACIES = (
    Measure("best_accuracy", "best accuracy", lambda run: run.summary.best_accuracy, units.fraction),
    Measure("final_accuracy", "final accuracy", lambda run: run.summary.final_accuracy, units.fraction),
)
COSTS = (
    Measure(
        "uplink_bytes_per_device_round",
        "uplink per device and round",
        lambda run: run.summary.uplink_bytes_per_device_round,
        lambda value: units.quantity(value, "B"),
    ),
    Measure(
        "peak_device_bytes",
        "peak device memory",
        lambda run: run.summary.peak_device_bytes,
        lambda value: units.quantity(value, "B"),
    ),
    Measure(
        "round_s_median",
        "median round time",
        lambda run: run.summary.round_s_median,
        lambda value: units.quantity(value, "s"),
    ),
    Measure(
        "device_flops",
        "device FLOPs",
        lambda run: run.summary.device_flops,
        lambda value: units.quantity(value, ""),
    ),
)
_HEADING_CHARACTERS = 8
_FIRST = ("arm", "rounds", "rounds to target")

#: What the signs behind a figure mean, for the note of a table that has them.
SPREADS = (
    "±: standard deviation over seeds; ( ): smallest to largest; [ ]: 95 % interval of the median, from 6 pairs on."
)


def demo_grid(arms: Sequence[Arm]) -> Grid:
    """Return the main comparison, one row per arm, over its seeds."""
    measures = (*ACCURACIES, *COSTS)
    seeds = {len(arm.runs) for arm in arms}
    headings = (*_FIRST, *(m.heading for m in measures))
    rows = [(arm.label, _rounds(arm), rounds_to_target(arm), *(_spread(arm, m) for m in measures)) for arm in arms]
    note = (
        "Accuracy on the test split: best is at the evaluation that is best on dev, final at the last one. The target is "
        "on the dev split."
    )
    if max(seeds) > 1:
        note += " Mean and standard deviation over seeds; rounds to target: median (smallest to largest)."
        headings = (headings[0], "seeds", *headings[1:])
        rows = [(row[0], str(len(arm.runs)), *row[1:]) for row, arm in zip(rows, arms, strict=True)]
    if len({_rounds(arm) for arm in arms}) > 1:
        note += " Where rounds differ, final accuracies and device FLOPs are not those of equal training."
    return Grid(_title(arms), headings, tuple(rows), note)


def demo_table(runs: Sequence[Run]) -> Table:
    """Return the main comparison of `runs` for the terminal."""
    return to_rich(demo_grid(group(runs)))


def to_rich(grid: Grid) -> Table:
    """Return a grid for the terminal."""
    compact: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 0, 0, 1)}
    table = Table(title=grid.title, caption=grid.note or None, title_justify="left", caption_justify="left", **compact)
    words = [len(word) for row in grid.rows for word in row[0].split()]
    table.add_column(grid.headings[0], min_width=max(words, default=0), overflow="fold")
    for i, heading in enumerate(grid.headings[1:], start=1):
        widest = max((len(row[i]) for row in grid.rows), default=0)
        lines = textwrap.wrap(heading, max(widest, _HEADING_CHARACTERS), break_long_words=False)
        widest = max(widest, *map(len, lines))
        table.add_column("\n".join(lines), justify="right", overflow="fold", min_width=widest)
    for row in grid.rows:
        table.add_row(*row)
    return table


def to_markdown(grid: Grid) -> str:
    """Return a grid as a Markdown table with its note below."""
    lines = [grid.headings, tuple("---:" if i else "---" for i in range(len(grid.headings))), *grid.rows]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{text}\n\n{grid.note}\n" if grid.note else f"{text}\n"


def to_csv(arms: Sequence[Arm]) -> str:
    """Return one line per arm in base units: mean and sample SD over seeds, empty where not known.

    `rounds_to_target` is the median over seeds, empty where that is more than the rounds run.
    """
    measures = (*ACCURACIES, *COSTS)
    header: list[object] = [
        "arm",
        "method",
        "seeds",
        "rounds",
        "target_accuracy",
        "rounds_to_target",
        "seeds_at_target",
    ]
    header += [name for m in measures for name in (m.name, f"{m.name}_sd")]
    lines = [header]
    for arm in arms:
        reached = [run.summary.rounds_to_target for run in arm.runs]
        middle = _median_round(reached)
        line: list[object] = [arm.label, arm.method, len(arm.runs), min(run.summary.rounds for run in arm.runs)]
        line += [arm.runs[0].summary.target_accuracy, middle if math.isfinite(middle) else None]
        line += [sum(r is not None for r in reached)]
        for measure in measures:
            values = _values(arm, measure)
            known = stats.mean_sd(values) if values else None
            line += [known.mean, known.sd] if known else [None, None]
        lines.append(line)
    return csv_text(lines)


def csv_text(lines: Sequence[Sequence[object]]) -> str:
    """Return lines as CSV; None and NaN become empty cells."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for line in lines:
        writer.writerow(["" if v is None or (isinstance(v, float) and math.isnan(v)) else v for v in line])
    return out.getvalue()


def _rounds(arm: Arm) -> str:
    """Return how many rounds the runs of an arm took: `40`, or `34 to 40`."""
    few, many = (pick(run.summary.rounds for run in arm.runs) for pick in (min, max))
    return str(few) if few == many else f"{few} to {many}"


def rounds_to_target(arm: Arm) -> str:
    """Return rounds to target over seeds: `34`, `> 60` where not reached in 60 rounds, `-` without a target."""
    if all(run.summary.target_accuracy is None for run in arm.runs):
        return units.NOTHING
    reached = [run.summary.rounds_to_target for run in arm.runs]
    limit = f"> {min(run.summary.rounds for run in arm.runs)}"
    middle = _median_round(reached)
    text = units.count(middle) if math.isfinite(middle) else limit
    if len(set(reached)) == 1:
        return text
    known = [r for r in reached if r is not None]
    return f"{text} ({min(known)} to {limit if None in reached else max(known)})"


def _median_round(reached: Sequence[int | None]) -> float:
    """Return the median with "never" as infinity."""
    ordered = sorted(math.inf if r is None else float(r) for r in reached)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def _spread(arm: Arm, measure: Measure) -> str:
    values = _values(arm, measure)
    if not values:
        return units.NOTHING
    known = stats.mean_sd(values)
    text = measure.show(known.mean)
    if known.sd is None:
        return text
    if measure.show is units.fraction:
        return f"{text} ± {known.sd:.3f}"
    per_cent = round(100 * known.sd / abs(known.mean)) if known.mean else 0
    return f"{text} ± {per_cent} %" if per_cent else text


def _values(arm: Arm, measure: Measure) -> list[float]:
    found = [measure.value(run) for run in arm.runs]
    return [float(v) for v in found if v is not None and math.isfinite(v)]


def _title(arms: Sequence[Arm]) -> str:
    targets = {run.summary.target_accuracy for arm in arms for run in arm.runs}
    target = targets.pop() if len(targets) == 1 else None
    return "Comparison" if target is None else f"Comparison (target {target:g} on dev)"
