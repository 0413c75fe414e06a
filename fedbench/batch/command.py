"""The verb `sweep`: what each sub-verb does with its words. Text for people goes to stderr, data to stdout."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fedbench.base import config
from fedbench.base.errors import EXIT_FAILURE, EXIT_OK, EXIT_STOPPED, ConfigError, Stopped
from fedbench.batch import failures, grid, manifest, submit, sweep
from fedbench.batch.manifest import Sweep
from fedbench.results import collect, tables
from fedbench.run.launch import say

if TYPE_CHECKING:
    from fedbench.batch import local


def run(args: argparse.Namespace) -> int:
    """Return the exit code of `fedbench sweep SUB_VERB`."""
    return _SUB_VERBS[args.sub_verb](args)


def _make(args: argparse.Namespace) -> int:
    blocking = next((path for path in (args.out, *args.out.parents) if path.exists() and not path.is_dir()), None)
    if blocking is not None:
        raise ConfigError(f"--out {args.out}: {blocking} is a file; allowed: a folder, new or of the same sweep.")
    settings = {".".join(s.path): s.value for s in map(config.parse_setting, args.settings)}
    factors: list[list[dict[str, Any]]] = [
        [{}] if args.grid_file is None else grid.read_arms(args.grid_file),
        *map(grid.parse_grid, args.grid),
    ]
    arms = grid.product(*factors)
    seeds = _seeds(args, arms, settings)
    lines = sweep.plan(args.job, arms, seeds, args.ranks, settings)
    combinations = len(arms) * max(1, len(seeds))
    if len(lines) < combinations:
        say(f"{combinations} combinations name {len(lines)} different runs; each of them stands there once.")
    if args.dry_run:
        for line in lines:
            print(f"{line.number}  {line.run_id}  {grid.told(line.overrides)}", file=sys.stderr)
        say(f"{len(lines)} run(s) would go to {args.out}.")
        return EXIT_OK
    sweep.save(args.job, args.out, lines)
    say(f"{len(lines)} run(s); `fedbench sweep submit {args.out}` sends them to Slurm, with --local it runs them here.")
    print(args.out / manifest.NAME)
    return EXIT_OK


def _seeds(args: argparse.Namespace, arms: list[dict[str, Any]], settings: dict[str, Any]) -> list[int]:
    """Return the seeds from the job's own on; none where the arms bring them."""
    if args.seeds is None and any("run.seed" in arm for arm in arms):
        return []
    tree = config.read(args.job)
    run_table = tree.get("run")
    first = settings.get("run.seed", run_table.get("seed", 0) if isinstance(run_table, dict) else 0)
    if type(first) is not int:  # True is one, and no seed
        raise ConfigError(f"run.seed: found {first!r}; allowed: a whole number from 0. (From {args.job} or --set)")
    return [first + number for number in range(args.seeds or 1)]


def _submit(args: argparse.Namespace) -> int:
    swept = manifest.read(args.folder)
    if not args.local:
        return submit.to_slurm(swept, args)
    if args.site or args.time:
        raise ConfigError(f"{'--site' if args.site else '--time'}: found beside --local; it is for Slurm alone.")
    from fedbench.batch import local

    if args.dry_run:
        lines = sweep.to_run(swept, retry=args.retry)
        lanes = args.parallel or local.lanes_for(lines)
        for line in lines:
            print(f"{line.number}  {line.run_id}  {grid.told(line.overrides)}", file=sys.stderr)
        say(f"{len(lines)} of {len(swept.lines)} run(s) would start, {lanes} at a time.")
        return EXIT_OK
    results = run_shown(swept, args.parallel, retry=args.retry)
    for outcome in results.failed:
        if outcome.state == failures.FAILED:
            say(f"{outcome.line.run_id} failed: {outcome.reason} ({swept.log(outcome.line)})")
    say(_counted(sweep.status(swept)))
    if results.stopped:
        say("stopped; the same command goes on.")
        return EXIT_STOPPED
    return EXIT_FAILURE if results.failed else EXIT_OK


def run_shown(swept: Sweep, parallel: int | None, *, retry: bool = False) -> local.Results:
    """Run what is not done of a sweep, with progress on stderr."""
    from rich.console import Console

    from fedbench.batch import local
    from fedbench.batch.show import ShowSweep

    show = ShowSweep(swept.folder.name, Console(stderr=True))
    try:
        return local.run_local(swept, parallel, show, retry=retry)
    finally:
        show.close()


def _status(args: argparse.Namespace) -> int:
    told = sweep.status(manifest.read(args.folder))
    if args.json:
        print(json.dumps(told, indent=2))
        return EXIT_OK
    print(_counted(told))
    for at in told["runs"]:
        if at["reason"] or at["state"] == "running":
            print(f"{at['line']}  {at['run_id']}  {at['state']}" + (f": {at['reason']}" if at["reason"] else ""))
    return EXIT_OK


def _collect(args: argparse.Namespace) -> int:
    swept = manifest.read(args.folder)
    files = sweep.run_files(swept)
    path = args.folder / collect.NAME
    found = collect.collect(path, files)
    for reason in found.left_out:
        say(reason)
    missing = sum(line.run_id not in found.held for line in swept.lines)
    say(
        f"{len(swept.lines) - missing} of {len(swept.lines)} run(s), {found.new} of them new"
        + (f"; {missing} are not done." if missing else ".")
    )
    print(path)
    for form in ("csv", "parquet"):
        if getattr(args, form):
            for table in tables.open_sweep(args.folder).save(args.folder, form):
                print(table)
    return EXIT_FAILURE if found.left_out else EXIT_OK


def _tune(args: argparse.Namespace) -> int:
    from fedbench.batch import tune

    def finish(swept: Sweep) -> None:
        say(f"the best lies on the edge of the grid; {swept.folder} widens it.")
        if run_shown(swept, args.parallel).stopped:
            raise Stopped("stopped; the same command goes on.")

    trees = tune.tune(manifest.read(args.folder), args.by, finish)
    for tree in trees:
        if tree["on_edge"]:
            say(f"{tree['setting']['method.name']}: the best still lies on the edge of the grid.")
    print(json.dumps(trees, indent=2) if args.json else "\n".join(map(tune.as_toml, trees)))
    return EXIT_OK


def _counted(told: dict[str, Any]) -> str:
    return ", ".join(f"{told[name]} {name}" for name in ("planned", *sweep.STATES))


_SUB_VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "make": _make,
    "submit": _submit,
    "status": _status,
    "collect": _collect,
    "tune": _tune,
}
