"""Fabricated run files for the lines of a sweep: the tests of tuning and collecting need no training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from synthetic_runs import make_run

from fedbench.base.records import Run
from fedbench.batch import failures, sweep
from fedbench.batch.failures import DIVERGED, Failure
from fedbench.batch.manifest import Line, Sweep
from fedbench.results import writer

JOB = '[run]\nrounds = 4\neval_every = 2\nseed = 1000\n[method]\nname = "fedmezo"\n'


def run_of(line: Line, dev_accuracy: float = 0.5) -> Run:
    """Return a run of a line whose dev accuracy is the same at all evaluations, its dev loss 1 less that."""
    run = make_run(rounds=line.config["run"]["rounds"])
    evaluated = ~np.isnan(run.rounds["dev_accuracy"])
    run.rounds["dev_accuracy"] = np.where(evaluated, dev_accuracy, np.nan)
    run.rounds["dev_loss"] = np.where(evaluated, 1 - dev_accuracy, np.nan)
    told = {"run_id": line.run_id, "method": line.method, "seed": line.seed}
    return replace(run, config=dict(line.config), summary=run.summary.model_copy(update=told))


def finish(swept: Sweep, dev_accuracy: Callable[[Line], float | None]) -> int:
    """Write what is not done of a sweep, a run without accuracy as diverged; return how many that were."""
    lines = sweep.to_run(swept)
    for line in lines:
        accuracy = dev_accuracy(line)
        if accuracy is None:
            failures.add(swept.folder, Failure(line.run_id, DIVERGED, "nan"))
        else:
            writer.write(swept.run_file(line), run_of(line, accuracy))
    return len(lines)


def finished(folder: Path) -> Sweep:
    """Return a sweep of three seeds, all done, whose accuracy rises with the seed."""
    job = folder / "job.toml"
    job.write_text(JOB)
    swept = sweep.make(job, [{}], [0, 1, 2], None, folder / "out")
    finish(swept, lambda line: 0.5 + line.seed / 10)
    return swept
