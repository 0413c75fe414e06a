"""From the lines of a sweep to Slurm arrays: names, indices, resources, and the sbatch lines that send them.

Line number = offset + array index, where an offset is a multiple of the site's MaxArraySize. The name of an array
tells sweep and offset, so the queue alone says which lines wait or run, whatever became of the submit that sent them.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from fedbench.base.errors import FedbenchError
from fedbench.batch import manifest, scheduler
from fedbench.batch.manifest import Line, Sweep
from fedbench.batch.scheduler import Queued
from fedbench.batch.site import Site
from fedbench.run.launch import say

#: The batch scripts, a part of the package.
SCRIPTS = Path(__file__).with_name("slurm")

#: Folder of the sweep: its presence says that the sweep was sent to Slurm.
FOLDER = "slurm"


class Array(NamedTuple):
    """One array: its sbatch words and the lines that it runs."""

    words: tuple[str, ...]
    lines: tuple[Line, ...]


def name_of(sweep: Sweep) -> str:
    """Return how the sweep's jobs are called: by its manifest and its place, since a copied sweep is another one."""
    told = f"{manifest.sha256(sweep.folder)} {sweep.folder.resolve()}"
    return f"fedbench-{hashlib.sha256(told.encode()).hexdigest()[:10]}"


def in_queue(sweep: Sweep) -> dict[int, Queued]:
    """Return line number -> its job in Slurm's queue; nothing where the sweep was never sent there.

    FedbenchError where the queue can't be read. A machine without Slurm has no word of it: people are told.
    """
    if not (sweep.folder / FOLDER).is_dir():
        return {}
    if not scheduler.is_here():
        say("what waits or runs in Slurm is not known here (no squeue); a run at work is told by its lease alone.")
        return {}
    own = re.compile(rf"{name_of(sweep)}-(\d+)")
    found: dict[int, Queued] = {}
    for job in scheduler.queue():
        match = own.fullmatch(job.name)
        if match is not None and job.task is not None:
            found[int(match[1]) + job.task] = job
    return found


def plan(sweep: Sweep, lines: Iterable[Line], site: Site, limit: int) -> list[Array]:
    """Return the arrays that run `lines`: one for each stretch of `limit` line numbers and each shape of a run."""

    def shape(line: Line) -> tuple[int, int, int]:
        return line.number // limit * limit, line.ranks, line.threads

    return [
        Array(tuple(_sbatch(sweep, members, site, offset)), members)
        for (offset, _, _), group in groupby(sorted(lines, key=lambda line: (shape(line), line.number)), shape)
        for members in (tuple(group),)
    ]


def collector(sweep: Sweep, jobs: Sequence[str], site: Site) -> list[str]:
    """Return the sbatch words of the job that collects when all of `jobs` have ended, however they did."""
    folder = sweep.folder.resolve()
    after = "afterany:" + ":".join(jobs)
    return [
        "sbatch",
        "--parsable",
        f"--job-name={name_of(sweep)}-collect",
        f"--dependency={after},singleton",  # one collection at a time, also where no lock reaches over hosts
        "--ntasks=1",
        *_time(site),
        f"--output={_plain(folder)}/logs/slurm-collect.log",
        *site.sbatch,
        str(SCRIPTS / "collect.sbatch"),
        sys.executable,
        _file(site),
        str(folder),
    ]


def ranges(numbers: Iterable[int]) -> str:
    """Return ascending numbers as 0-3,7."""
    parts = []
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        stretch = [number for _, number in run]
        parts.append(f"{stretch[0]}-{stretch[-1]}" if len(stretch) > 1 else str(stretch[0]))
    return ",".join(parts)


def _sbatch(sweep: Sweep, lines: Sequence[Line], site: Site, offset: int) -> list[str]:
    folder, ranks, threads = sweep.folder.resolve(), lines[0].ranks, lines[0].threads
    return [
        "sbatch",
        "--parsable",
        f"--job-name={name_of(sweep)}-{offset}",
        f"--array={ranges(line.number - offset for line in lines)}%{site.throttle}",
        f"--nodes={_nodes(ranks, threads, site)}",
        f"--ntasks={ranks}",
        f"--cpus-per-task={threads}",
        *_time(site),
        f"--signal=B:{site.shell_signal}@{site.warn_s}",
        f"--output={_plain(folder)}/logs/slurm-{offset}-%a.log",
        *site.sbatch,
        str(SCRIPTS / "sweep.sbatch"),
        sys.executable,
        _file(site),
        str(folder),
        str(offset),
        manifest.sha256(sweep.folder),
    ]


def _nodes(ranks: int, threads: int, site: Site) -> int:
    if not site.cpus_per_node:
        return 1
    if threads > site.cpus_per_node:
        raise FedbenchError(
            f"run.threads = {threads} is more than the {site.cpus_per_node} CPUs of a node. (From {site.file})"
        )
    return -(-ranks // (site.cpus_per_node // threads))


def _time(site: Site) -> list[str]:
    return [f"--time={site.time}"] if site.time else []


def _plain(path: Path) -> str:
    """Return a path for sbatch, which replaces what follows a % in it."""
    return str(path).replace("%", "%%")


def _file(site: Site) -> str:
    return str(site.file or "")
