"""The words of `fedbench run`. It imports nothing heavy and runs nothing."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from fedbench.base.words import Verbs, positive


def add(verbs: Verbs, process: Callable[[argparse.Namespace], int]) -> None:
    """Add the verb `run`; it is answered by `process`."""
    run = verbs.add(
        "run",
        "one run, written to DIR/runs/RUN_ID.h5",
        "fedbench run jobs/demo.toml -n 3 --set method.name=fedmezo --set run.rounds=50",
        "Run one job and print the path of its run file.",
    )
    run.add_argument("job", type=Path, metavar="JOB.toml")
    run.add_argument("-n", dest="ranks", type=positive, metavar="RANKS", help="ranks; started alone, run starts mpirun")
    run.add_argument("--set", dest="settings", action="append", default=[], metavar="key=value", help="override a key")
    run.add_argument("--results", type=Path, metavar="DIR", help="results folder (default: results.dir of the job)")
    run.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, where there is one")
    run.add_argument("--force", action="store_true", help="run again even if the run file is complete")
    run.add_argument("--dry-run", action="store_true", help="check config, data and model, and print what would run")
    run.set_defaults(process=process)
