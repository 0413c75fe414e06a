"""The words of `fedbench sweep`: one small function per sub-verb. It imports nothing heavy and runs nothing."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from fedbench.base.words import Parser, Verbs, positive

_EXAMPLE = """fedbench sweep make jobs/demo.toml --grid method.name=fedmezo,fedspzo --grid method.lr=x0.46,x1,x2.2 --out sweeps/a
  fedbench sweep submit sweeps/a --local"""


def add(verbs: Verbs, process: Callable[[argparse.Namespace], int]) -> None:
    """Add the verb `sweep` with its sub-verbs; all are answered by `process`."""
    sweep = verbs.add("sweep", "many runs from one job: made, run, watched, collected, tuned", _EXAMPLE)
    inner = sweep.verbs("sub_verb")
    for one in (_make, _submit, _status, _collect, _tune):
        one(inner).set_defaults(process=process)


def _make(verbs: Verbs) -> Parser:
    make = verbs.add(
        "make",
        "the manifest: one line per run",
        "fedbench sweep make jobs/demo.toml --grid method.name=fedmezo,cooperllm --seeds 3 --out sweeps/a",
        "Write DIR/manifest.jsonl: the product of all grids and seeds, every run checked. method.<setting> means the "
        "active method's own; x0.46 is a multiple of the job's value.",
    )
    make.add_argument("job", type=Path, metavar="JOB.toml")
    make.add_argument("--grid", action="append", default=[], metavar="key=v1,v2", help="vary a key; may be repeated")
    make.add_argument("--grid-file", type=Path, metavar="FILE.toml", help="[[arm]] tables, for what is no product")
    make.add_argument("--set", dest="settings", action="append", default=[], metavar="key=value", help="override a key")
    make.add_argument("--seeds", type=positive, metavar="N", help="seeds from run.seed on (default: 1)")
    make.add_argument("-n", dest="ranks", type=positive, metavar="RANKS", help="ranks of every run")
    make.add_argument("--out", type=Path, required=True, metavar="DIR", help="the sweep's folder")
    make.add_argument("--dry-run", action="store_true", help="check all runs and print them, and write nothing")
    return make


def _submit(verbs: Verbs) -> Parser:
    submit = verbs.add(
        "submit",
        "run what is not done, as Slurm arrays or here",
        "fedbench sweep submit sweeps/a --time 01:00:00\n  fedbench sweep submit sweeps/a --local --parallel 2",
        "Send every line whose run file is not complete, and that is not in the queue, to Slurm, and a job that collects. "
        "A run that diverged is a result and is left alone.",
    )
    submit.add_argument("folder", type=Path, metavar="DIR")
    submit.add_argument("--local", action="store_true", help="run them on this machine instead")
    submit.add_argument(
        "--site", type=Path, metavar="FILE", help="the site's values (default: site.env where it is there)"
    )
    submit.add_argument("--time", metavar="T", help="time limit of a task, as sbatch takes it")
    submit.add_argument(
        "--parallel",
        type=positive,
        metavar="K",
        help="runs at a time (default: the site's; here: what fits on the cores)",
    )
    submit.add_argument("--retry", action="store_true", help="run again what diverged")
    submit.add_argument("--dry-run", action="store_true", help="print the sbatch lines, or what would run")
    return submit


def _status(verbs: Verbs) -> Parser:
    status = verbs.add("status", "how far a sweep is, and why runs failed", "fedbench sweep status sweeps/a --json")
    status.add_argument("folder", type=Path, metavar="DIR")
    status.add_argument("--json", action="store_true", help="machine-readable, with every run")
    return status


def _collect(verbs: Verbs) -> Parser:
    collect = verbs.add("collect", "all complete runs in one file, DIR/all.h5", "fedbench sweep collect sweeps/a")
    collect.add_argument("folder", type=Path, metavar="DIR")
    collect.add_argument("--csv", action="store_true", help="also runs.csv, rounds.csv and devices.csv")
    collect.add_argument("--parquet", action="store_true", help="the same as Parquet")
    return collect


def _tune(verbs: Verbs) -> Parser:
    tune = verbs.add(
        "tune",
        "the best step sizes of a finished grid",
        "fedbench sweep tune sweeps/lr --by loss",
        "Print [method.<name>] tables for the job file. Where the best lies on the edge, the grid is widened and run.",
    )
    tune.add_argument("folder", type=Path, metavar="DIR")
    tune.add_argument("--by", choices=("accuracy", "loss"), default="accuracy", help="what counts on the dev split")
    _add_parallel(tune)
    tune.add_argument("--json", action="store_true", help="machine-readable, as DIR/tune.json")
    return tune


def _add_parallel(parser: Parser) -> None:
    parser.add_argument(
        "--parallel", type=positive, metavar="K", help="runs at a time (default: cores // (ranks * threads))"
    )
