"""Ties the report together: run files in, tables, figures and one page out. It changes no run file."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from fedbench.base import fsio
from fedbench.base.errors import ResultError
from fedbench.base.records import ROUND_COLUMNS
from fedbench.report import (
    about,
    bars,
    canvas,
    compare,
    facts,
    highlights,
    over_rounds,
    page,
    paired,
    pareto,
    plot,
    speedup,
    table,
    timeline,
)
from fedbench.report.arms import Arm, cumulative, group, rounds_done
from fedbench.report.looks import DARK, LIGHT, Theme
from fedbench.results import folder

_TOTALS = ("device_flops", "uplink_bytes", "round_s")
_TITLE = "Federated fine-tuning, measured"

#: The figures that stand before the tables.
_FIRST = ("accuracy_rounds", "pareto")


def build(paths: Sequence[Path], out: Path, baseline: str | None = None) -> list[Path]:
    """Write report.md, table.csv, rounds.csv, the figures as PNG and SVG, and index.html into `out`; return their paths.

    `baseline` is the label or method of the arm that all others are paired with (unset: the plainest there is).

    A folder stands for all run files below it, those in `bad` apart; one that can't be read
    there is named in the report and left out. A file named here must be readable (ResultError).
    """
    runs, skipped = folder.load(paths)
    if not runs:
        told = f" Left out: {' '.join(skipped)}" if skipped else ""
        raise ResultError(
            f"no run file in {', '.join(map(str, paths)) or 'no path'}; expected *.h5 of `fedbench run`.{told}"
        )
    arms = group(runs)
    against = paired.baseline_of(arms, baseline)
    drawings = {theme.name: _drawings(arms, theme) for theme in (LIGHT, DARK)}
    vectors = {name: {d.name: canvas.svg(d.figure) for d in own} for name, own in drawings.items()}
    files: dict[str, bytes] = {}
    for drawing in drawings["light"]:
        files[f"{drawing.name}.png"] = canvas.png(drawing.figure)
        files[f"{drawing.name}.svg"] = vectors["light"][drawing.name]
    tables = [table.demo_grid(arms)]
    tables += [grid for arm in compare.references(arms) if (grid := compare.compare_grid(arm, arms)).rows]
    if against is not None and (grid := paired.paired_grid(against, arms)).rows:
        tables.append(grid)
    if faster := speedup.speedup_grid(arms):
        tables.append(faster)
    behind = [facts.settings_grid(arms), facts.shared_grid(arms), facts.provenance_grid(arms), facts.runs_grid(arms)]
    files["table.csv"] = table.to_csv(arms).encode()
    files["rounds.csv"] = rounds_csv(arms).encode()
    lead = about.lead(arms, skipped)
    first = sum(drawing.name in _FIRST for drawing in drawings["light"])
    files["report.md"] = _markdown(lead, tables, drawings["light"], behind, first).encode()
    pictures = [
        page.Picture(d.name, d.title, vectors["light"][d.name], vectors["dark"][d.name], d.caption, d.alt)
        for d in drawings["light"]
    ]
    sections = [page.Section(grid) for grid in tables]
    footer = [page.Section(grid, text=True, folded=i in (1, 3)) for i, grid in enumerate(behind)]
    best = highlights.highlights(arms)
    body: list[page.Section | page.Picture] = [*pictures[:first], *sections, *pictures[first:]]
    html = page.render(title=_TITLE, lead=lead, arms=arms, best=best, body=body, facts=footer)
    files["index.html"] = html.encode()
    for name, content in files.items():
        fsio.replace_whole(out / name, functools.partial(_put, content=content))
    return [out / name for name in files]


def rounds_csv(arms: Sequence[Arm]) -> str:
    """Return one line per run and row of `rounds`, in base units, with rounds done and running totals."""
    header = ["arm", "run_id", "method", "seed", *ROUND_COLUMNS, "rounds_done", *(f"total_{name}" for name in _TOTALS)]
    lines: list[list[object]] = [list(header)]
    for arm in arms:
        for run in arm.runs:
            start = [arm.label, run.summary.run_id, arm.method, run.summary.seed]
            columns = [run.rounds[name] for name in ROUND_COLUMNS]
            columns += [rounds_done(run).astype(int), *(cumulative(run, name) for name in _TOTALS)]
            lines += [[*start, *(value.item() for value in row)] for row in zip(*columns, strict=True)]
    return table.csv_text(lines)


def _drawings(arms: Sequence[Arm], theme: Theme) -> list[canvas.Drawing]:
    rounds, *costs = plot.COSTS
    drawn = [plot.accuracy(arms, rounds, theme), pareto.pareto(arms, theme)]
    drawn += [plot.accuracy(arms, cost, theme) for cost in costs]
    drawn += [
        bars.memory(arms, theme),
        over_rounds.memory(arms, theme),
        bars.time_split(arms, theme),
    ]
    drawn += [timeline.timeline(arms, theme), over_rounds.bits(arms, theme)]
    return [drawing for drawing in drawn if drawing]


def _markdown(
    lead: str,
    tables: Sequence[table.Grid],
    drawings: Sequence[canvas.Drawing],
    behind: Sequence[table.Grid],
    first: int,
) -> str:
    """Return the report with its first few drawings before the tables."""
    figures = [f"## {d.title}\n\n![{d.alt}]({d.name}.png)\n\n{d.caption}\n" for d in drawings]
    shown, last = ([f"## {grid.title}\n\n{table.to_markdown(grid)}" for grid in grids] for grids in (tables, behind))
    return "\n".join([f"# {_TITLE}\n\n{lead}\n", *figures[:first], *shown, *figures[first:], *last])


def _put(path: Path, *, content: bytes) -> None:
    path.write_bytes(content)
