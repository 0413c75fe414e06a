"""The verb `export`: a run's tuned weights as a folder that others can load.

The model is made as the run made it, from the config in the run file, and takes the weights that the run kept. The folder
appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fedbench.base import config, fsio
from fedbench.base.errors import ConfigError, ModelError, ResultError
from fedbench.base.records import Run
from fedbench.models import folder, load
from fedbench.results import reader
from fedbench.run import kept
from fedbench.run.build import Built, Job, construct, resolve

#: What a folder says of where its weights come from.
FACTS_FILE = "fedbench.json"


def export(run_file: Path, out: Path) -> list[Path]:
    """Write the folder `out` and return its files; errors of the user's kind where the run or the place does not fit."""
    run = reader.read(run_file)
    weights = kept.read(run_file, run)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out: found {out}, which is there already; allowed: a new or an empty folder.")
    built = construct(_job(run, str(run_file)))
    for tensor in built.trainable:
        if tensor.name not in weights or weights[tensor.name].shape != tuple(tensor.parameter.shape):
            raise ModelError(f"{run_file}: the kept weights don't fit the model: {tensor.name} differs.")
        tensor.assign(weights[tensor.name])
    try:
        fsio.fill_folder(out, partial(_fill, built=built, run=run))
    except OSError as error:
        raise ConfigError(f"--out: found {out}, which can't be written: {error.strerror}.") from None
    return sorted(path for path in out.rglob("*") if path.is_file())


def _job(run: Run, source: str) -> Job:
    """Return the job of a run with the whole model in ordinary memory; ResultError where its keys have changed since."""
    method: Mapping[str, Any] = run.config["method"]
    tree = {**run.config, "method": {"name": method["name"], method["name"]: dict(method["settings"])}}
    job = resolve(config.check(tree, source=source), source)
    if job.run_id != run.summary.run_id:
        raise ResultError(f"{source}: this version of fedbench makes {job.run_id} of its config; run the job again.")
    model = job.config.model.model_copy(update={"device": "cpu", "mapped": False})
    return replace(job, config=job.config.model_copy(update={"model": model}))


def _fill(place: Path, *, built: Built, run: Run) -> None:
    section, part = built.job.config.model, built.trainable.part
    origin = load.origin_of(section.name)
    head = origin.head(built.job.config.data.head)
    folder.write(place, folder.Tuned(built.cut, origin, head, part, section, built.splits))
    facts = {
        "run_id": run.summary.run_id,
        "method": run.summary.method,
        "seed": run.summary.seed,
        "base_model": section.name,
        "trained": part,
        "head": head,
        "classes": list(built.splits.label_names),
        "label_words": built.splits.label_words and list(built.splits.label_words),
        "template": built.job.config.data.template,
        "max_length": built.job.config.data.max_length,
        "test_accuracy": run.summary.final_accuracy,
        "weights_sha256": run.summary.weights_sha256,
    }
    (place / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
