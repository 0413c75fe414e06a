"""Draws what a run records round by round besides accuracy: a device rank's memory, and the bits of a plan's layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import EngFormatter, MaxNLocator

from fedbench.base.records import Run
from fedbench.report import units
from fedbench.report.arms import Arm
from fedbench.report.canvas import Drawing, canvas, legend, line, marks, rules
from fedbench.report.looks import Theme, looks
from fedbench.report.parts import fresh, hosts

_ROW_IN, _MOST_ROWS = 0.22, 24


def memory(arms: Sequence[Arm], theme: Theme) -> Drawing | None:
    """Return the highest memory of a rank with devices above its imports in each round, a line per arm; or None."""
    lines = {arm.label: found for arm in arms if (found := _peaks(arm)) is not None}
    if not lines:
        return None
    title = "Memory over the rounds"
    figure, (axes,) = canvas(theme, title, 3.9)
    chosen = looks(arms)
    for label, (rounds, peaks) in lines.items():
        line(axes, rounds, peaks, chosen[label], theme).set_label(label)
    axes.set_xlabel("rounds", color=theme.muted)
    axes.set_ylim(bottom=0, top=1.08 * max(float(peaks.max()) for _, peaks in lines.values()))
    axes.yaxis.set_major_formatter(EngFormatter(unit="B", sep=" "))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    rules(axes, theme, "y")
    marks(axes, "", whole=True)
    legend(figure, list(lines), theme, lines=True)
    caption = (
        "Highest resident memory (VmHWM) of any rank with devices in each round above that right after its imports, mean "
        "over seeds. A run in one process holds the cloud as well."
    )
    ends = "; ".join(f"{label} {units.quantity(float(peaks[-1]), 'B')}" for label, (_, peaks) in lines.items())
    return Drawing(
        figure, "memory_rounds", title, caption, f"Line chart of memory over the rounds. At the end: {ends}."
    )


def bits(arms: Sequence[Arm], theme: Theme) -> Drawing | None:
    """Return the bits of an entry by unit and round of the first run that chose them, darker for more; or None."""
    run = next((run for arm in arms for run in arm.runs if run.codec and len(run.codec["round"])), None)
    if run is None:
        return None
    rounds, names, table = _grid(run)
    title = "Bits by layer and round"
    figure, (axes,) = canvas(theme, title, 1.5 + _ROW_IN * max(5, len(names)))
    ramp = LinearSegmentedColormap.from_list("bits", theme.ramp)
    place = (rounds[0] - 0.5, rounds[-1] + 0.5, len(names) - 0.5, -0.5)
    shown: dict[str, Any] = {"vmin": 0.0, "vmax": float(np.nanmax(table)), "aspect": "auto", "interpolation": "nearest"}
    image = axes.imshow(table, cmap=ramp, extent=place, **shown)
    axes.set_yticks(range(len(names)), names, color=theme.ink, fontsize=8)
    axes.set_xlabel("round", color=theme.muted)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=30)
    bar.set_label("bits of an entry", color=theme.muted)
    bar.ax.tick_params(colors=theme.muted, length=0, labelsize=9)
    bar.outline.set_visible(False)
    steady = _write_steady(axes, table, rounds, shown["vmax"], theme)
    mean = float(np.nanmean(table))
    caption = f"Bits of an entry as the plan of {run.summary.run_id} travelled, mean over the units of a row."
    if steady:
        caption += " A number stands in a row that has it in every round."
    alt = f"Heat map of bits by layer and round: {len(names)} rows, {len(rounds)} rounds, {mean:.3g} bits on average."
    return Drawing(figure, "bits", title, caption, alt)


def _write_steady(axes: Axes, table: np.ndarray, rounds: Sequence[int], most: float, theme: Theme) -> bool:
    """Write the bits of every row that keeps them over all rounds into its middle; return whether there is any."""
    middle, steady = (rounds[0] + rounds[-1]) / 2, np.ptp(table, axis=1) == 0
    for row in np.flatnonzero(steady).tolist():
        bits = float(table[row, 0])
        colour = theme.surface if bits > most / 2 else theme.ink
        axes.annotate(f"{bits:.3g}", (middle, row), ha="center", va="center", fontsize=8, color=colour)
    return bool(steady.any())


def _peaks(arm: Arm) -> tuple[np.ndarray, np.ndarray] | None:
    """Return rounds done and the mean peak over seeds, at the rows that all seeds have; None where a run does not tell."""
    tables = []
    for run in arm.runs:
        table, start = run.memory_rounds, _at_import(run)
        if not fresh(run) or not table or not start.keys() >= set(hosts(run)):
            return None
        own = np.isin(table["rank"], hosts(run))
        above = table["peak_bytes"][own] - np.array([start[rank] for rank in table["rank"][own].tolist()], np.int64)
        number = table["round"][own]
        tables.append({int(r): int(above[number == r].max()) for r in np.unique(number)})
    common = sorted(set.intersection(*(set(table) for table in tables)))
    if not common:
        return None
    return np.array(common) + 1, np.array([[table[r] for r in common] for table in tables], np.float64).mean(axis=0)


def _at_import(run: Run) -> dict[int, int]:
    """Return the memory of each rank right after its imports."""
    start = run.memory["peak_bytes"] - run.memory["above_import_bytes"]
    return dict(zip(run.memory["rank"].tolist(), start.tolist(), strict=True))


def _grid(run: Run) -> tuple[list[int], list[str], np.ndarray]:
    """Return rounds, names of the rows in the order of the model, and mean bits [rows, rounds], NaN where none."""
    rounds = np.unique(run.codec["round"]).tolist()
    whole = list(dict.fromkeys(run.codec["unit"].tolist()))
    names = _rows(whole)
    rows = list(dict.fromkeys(names))
    sums, counts = np.zeros((2, len(rows), len(rounds)))
    place = {unit: rows.index(name) for unit, name in zip(whole, names, strict=True)}
    row = np.array([place[unit] for unit in run.codec["unit"].tolist()])
    column = np.searchsorted(rounds, run.codec["round"])
    np.add.at(sums, (row, column), run.codec["bits"])
    np.add.at(counts, (row, column), 1)
    return rounds, rows, np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _rows(whole: Sequence[str]) -> list[str]:
    """Return the row of each unit: the longest beginning of its name that leaves few enough rows; tiles share one.

    What all names begin with is left out.
    """
    parts = [name.partition("#")[0].split(".") for name in whole]
    shortest = min(map(len, parts))
    same = next((i for i in range(shortest) if len({part[i] for part in parts}) > 1), shortest - 1)
    parts = [part[same:] for part in parts]
    for depth in range(max(map(len, parts)), 1, -1):
        names = [".".join(part[:depth]) for part in parts]
        if len(set(names)) <= _MOST_ROWS:
            return names
    return [part[0] for part in parts]
