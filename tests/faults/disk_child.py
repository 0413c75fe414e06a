"""Writers on disks that are too small or read-only: `unshare --mount python disk_child.py FOLDER` prints JSON lines.

Mounts are seen by this process alone and end with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from sweep_files import JOB, finish  # isort: skip

from fedbench.base import rng
from fedbench.batch import failures, sweep
from fedbench.batch.failures import FAILED, Failure
from fedbench.batch.manifest import Sweep
from fedbench.results import collect, reader
from fedbench.run.ckpt import Checkpoint, Store

#: Action -> bytes that it takes, about: disks have from nothing up to a little more than that left.
NEEDED = {"run file": 160_000, "checkpoint": 125_000, "failures.jsonl": 11_000, "all.h5": 580_000}
SIZES = 8


@contextmanager
def tmpfs(place: Path, kib: int) -> Iterator[None]:
    """Mount a small file system for the block."""
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


@contextmanager
def read_only(place: Path) -> Iterator[None]:
    """Make a folder read-only for the block, for root too."""
    subprocess.run(["mount", "--bind", str(place), str(place)], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def filled(place: Path, left_bytes: int) -> None:
    """Fill a file system up to so many bytes."""
    free = os.statvfs(place)
    (place / "ballast").write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - left_bytes)))


def checkpoint(number: int) -> Checkpoint:
    return Checkpoint({"weights/a": np.full(30_000, number, np.float32)}, {"next_round": number})


def make(place: Path) -> Sweep:
    """Return a sweep of three runs, of which two are done and collected, with a checkpoint and a failure."""
    (place / "job.toml").write_text(JOB)
    swept = sweep.make(place / "job.toml", [{}], [0, 1, 2], None, place / "sweep")
    finish(swept, lambda line: 0.5)
    sweep.collect(swept)
    swept.run_file(swept.lines[2]).unlink()
    (swept.folder / collect.NAME).unlink()
    sweep.collect(swept)
    Store(swept.folder / "ckpt" / "x", "config", print).save(checkpoint(1))
    failures.add(swept.folder, Failure(swept.lines[2].run_id, FAILED, "killed"))
    return swept


ACTIONS: dict[str, Callable[[Sweep], object]] = {
    "run file": lambda swept: finish(swept, lambda line: 0.7),
    "checkpoint": lambda swept: Store(swept.folder / "ckpt" / "x", "config", print).save(checkpoint(2)),
    "failures.jsonl": lambda swept: failures.add(swept.folder, Failure(swept.lines[2].run_id, FAILED, "again" * 2000)),
    "all.h5": lambda swept: collect.collect(swept.folder / collect.NAME, sweep.run_files(swept)),
}


def state(swept: Sweep) -> dict[str, object]:
    """Return what is held, as far as a reader can tell."""
    found = Store(swept.folder / "ckpt" / "x", "config", print).newest()
    return {
        "done": [at.line.number for at in sweep.states(swept) if at.state == "done"],
        "collected": len(reader.read_all(swept.folder / collect.NAME)),
        "checkpoint": None if found is None else found.state["next_round"],
        "failure": failures.read(swept.folder)[swept.lines[2].run_id].reason[:10],
        "leftovers": [path.name for path in swept.folder.rglob(".*.tmp")],
    }


def attempt(fault: str, name: str, swept: Sweep) -> None:
    """Print what became of an action: the error's text (None: it went well) and the state after it."""
    told = None
    try:
        ACTIONS[name](swept)
    except OSError as error:
        told = str(error)
    print(json.dumps({"fault": fault, "action": name, "told": told, **state(swept)}), flush=True)


def serve(folder: Path) -> None:
    """Try all actions on disks of keyed random sizes, and in a read-only folder."""
    draw = rng.generator(0, "test-disk")
    for name in ACTIONS:
        for number in range(SIZES):
            place = folder / f"{name}-{number}"
            with tmpfs(place, 8000):
                swept = make(place)
                if name == "all.h5":
                    finish(swept, lambda line: 0.7)
                filled(place, 0 if number == 0 else int(draw.integers(0, 1.3 * NEEDED[name])))
                attempt("full disk", name, swept)
    for name in ACTIONS:
        place = folder / f"ro-{name}"
        place.mkdir()
        swept = make(place)
        if name == "all.h5":
            finish(swept, lambda line: 0.7)
        with read_only(place):
            attempt("read-only folder", name, swept)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
