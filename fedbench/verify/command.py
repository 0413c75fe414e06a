"""The verb `verify`: runs what the chosen claims need, prints the table, and writes the page where one is asked for."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fedbench.base import fsio, terminal
from fedbench.base.errors import EXIT_OK, EXIT_STOPPED, EXIT_USER, FedbenchError
from fedbench.batch import local, sweep
from fedbench.batch.grid import told
from fedbench.batch.show import ShowSweep
from fedbench.run.launch import say
from fedbench.verify import catalogue, memory, page, race, run, table
from fedbench.verify.claims import Claim, Found, Measured, Row, Untold, judge
from fedbench.verify.run import Plan
from fedbench.verify.tasks import Shape


def process(args: argparse.Namespace) -> int:
    """Return the exit code of `fedbench verify`: 0 whatever the verdicts, 85 where a signal stopped it before them."""
    claims = catalogue.choose(args.claims)
    folder = args.results / "verify" / ("quick" if args.quick else "full")
    plans = run.plans(claims, folder, quick=args.quick)
    if args.dry_run:
        _preview(plans, claims, quick=args.quick)
        return EXIT_OK
    found: dict[str, Found] = {}
    for plan in plans:
        run.save(plan)
        unfit = run.unfit(plan)
        if not unfit and _run(plan, args.parallel):
            say("stopped; the same command goes on.")
            return EXIT_STOPPED
        found[plan.task.name] = run.read(plan, unfit)
    rows: list[Row] = []
    origins: list[Mapping[str, Any]] = []
    for claim in claims:
        rows += _weighed(claim, folder, origins, quick=args.quick) if claim.shapes else measured(claim, found)
    if args.page is not None:
        fsio.write_text(args.page, page.render(rows, list(found.values()), origins, quick=args.quick))
    if args.json:
        print(json.dumps([row.tree() for row in rows], indent=2))
    else:
        notes = [
            race.sentence(f"{name}, {task}: {why}") for task, at in found.items() for name, why in at.absent.items()
        ]
        terminal.show(table.for_people(rows, notes), sys.stdout)
    return EXIT_OK


def _run(plan: Plan, parallel: int | None) -> bool:
    """Run what is not done of a plan, with progress on stderr; return whether a signal stopped it."""
    show = ShowSweep(plan.task.name, Console(stderr=True))
    try:
        return run.make(plan, parallel, show).stopped
    finally:
        show.close()


def measured(claim: Claim, found: Mapping[str, Found]) -> list[Row]:
    """Return the rows of a claim on the tasks (by name) that were run; of one that isn't tested, why."""
    if claim.measure is None:
        return [judge(claim, "-", Untold(claim.why))]
    tasks = [found[task.name] for task in claim.tasks if task.name in found]
    if not tasks:
        return [judge(claim, task.name, Untold("not part of --quick")) for task in claim.tasks]
    return [judge(claim, at.task.name, claim.measure(at)) for at in tasks]


def _weighed(claim: Claim, folder: Path, origins: list[Mapping[str, Any]], *, quick: bool) -> list[Row]:
    assert claim.weigh is not None
    rows: list[Row] = []
    for shape in _shapes(claim, quick=quick):
        say(f"memory of {shape.name} ...")
        try:
            peaks, origin = memory.peaks_of(shape, folder / "memory")
        except FedbenchError as error:
            if error.exit_code == EXIT_USER:
                raise
            rows.append(judge(claim, shape.name, Untold(str(error))))
            continue
        origins.append(origin)
        found: Mapping[str, Measured] = claim.weigh(peaks)
        rows += [judge(claim, f"{shape.name}, {way}", value) for way, value in found.items()]
    return rows


def _shapes(claim: Claim, *, quick: bool) -> list[Shape]:
    return [shape for shape in claim.shapes if shape.quick == quick]


def _preview(plans: Sequence[Plan], claims: Sequence[Claim], *, quick: bool) -> None:
    for plan in plans:
        todo = sweep.to_run(plan.wanted) if plan.sweep.folder.exists() else list(plan.wanted.lines)
        for line in todo:
            print(f"{plan.task.name}  {line.run_id}  {told(line.overrides)}", file=sys.stderr)
        lanes = local.lanes_for(todo)
        say(f"{plan.task.name}: {len(todo)} of {len(plan.wanted.lines)} run(s) would start, {lanes} at a time.")
    for name in dict.fromkeys(shape.name for claim in claims for shape in _shapes(claim, quick=quick)):
        say(f"memory: {', '.join(memory.ARMS)} of {name}, each in a process of its own.")
