"""What is asked of Slurm and told to it, by the site's own commands: the queue, its limits, jobs sent and requeued.

A command that fails is an error that quotes it. Nothing here knows what a sweep is, and no answer is taken for the end
of a run: a run is done by its file alone.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

from fedbench.base.errors import ConfigError, FedbenchError

#: How long a command of Slurm's may take; a controller that is busy answers late.
_PATIENCE_S = 60.0

#: States of a job that waits. In any other that squeue shows it holds a node.
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}


#: What every job waits for at times; anything else is worth a word.
_ORDINARY = {"None", "Resources", "Priority", "JobArrayTaskLimit", "BeginTime", "Cleaning"}


class Queued(NamedTuple):
    """A job in the queue, one per element of an array; `task` is None outside arrays, `why` what it is held by."""

    name: str
    job: str
    task: int | None
    waits: bool
    why: str


def is_here() -> bool:
    """Return whether this machine has Slurm's commands."""
    return shutil.which("squeue") is not None


def queue() -> list[Queued]:
    """Return the caller's jobs that wait or run."""
    found = []
    for row in _said("squeue", "--noheader", "--array", "--me", "--format=%j|%F|%K|%T|%r").splitlines():
        name, job, task, state, why = row.strip().split("|", 4)
        waits = state in _WAITING
        found.append(
            Queued(
                name, job, int(task) if task.isdigit() else None, waits, why if waits and why not in _ORDINARY else ""
            )
        )
    return found


def max_array_size() -> int:
    """Return the site's MaxArraySize: an array's indices are below it."""
    text = _said("scontrol", "show", "config")
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", text, re.MULTILINE)
    if match is None or int(match[1]) < 1:
        raise ConfigError(
            f"MaxArraySize: {match[1] if match else 'not named'} in `scontrol show config`: no arrays here."
        )
    return int(match[1])


def send(words: Sequence[str]) -> str:
    """Run an sbatch command line with --parsable and return the job's number."""
    return _said(*words).strip().partition(";")[0]


def own_job() -> str:
    """Return the job that this process belongs to, an array's element as ARRAY_TASK, or an empty string.

    A number alone would name the whole array where the element has the array's own number.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def restarts() -> int:
    """Return how often the job of this process was requeued before."""
    count = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdigit() else 0


def is_running(job: str) -> bool:
    """Return whether Slurm lets a job run on: not where it is being cancelled, requeued or has exceeded its time."""
    return _said("squeue", "--noheader", f"--jobs={job}", "--format=%T").split() == ["RUNNING"]


def requeue(job: str) -> None:
    """Send a running job back into the queue; Slurm ends its processes."""
    _said("scontrol", "requeue", job)


def _said(*words: str) -> str:
    """Return what a command prints; FedbenchError where it fails."""
    try:
        ran = subprocess.run(
            words,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise ConfigError(
            f"{words[0]}: no such command, so there is no Slurm here. `--local` runs a sweep on this machine."
        ) from None
    except subprocess.TimeoutExpired:
        raise FedbenchError(f"{words[0]} gave no answer in {_PATIENCE_S:g} s.") from None
    if ran.returncode != 0:
        said = (ran.stderr.strip() or ran.stdout.strip()).replace("\n", "; ")
        raise FedbenchError(f"{words[0]} failed with status {ran.returncode}: {said}. (It was: {shlex.join(words)})")
    return ran.stdout
