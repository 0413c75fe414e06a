"""The log of one line's Slurm task, `logs/slurm-<offset>-<index>.log`: how it is written, and how a run's end is read off.

Every line carries the restart number, since a requeued task writes to the same file. What a task that was killed can't
say is read off Slurm's own words and the last line. A log never says that a run is done.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from fedbench.batch import failures

#: What is read of a log's end.
_TAIL_BYTES = 1 << 16
_STARTS, _ENDED = "fedbench: task starts ", "fedbench: task ended: "
_MARKED = re.compile(r"^\d+\| ", re.MULTILINE)
_PRINTED = re.compile(r"^\d+\| (.*\S)", re.MULTILINE)
_SAID = re.compile(rf"^(?:\d+\| )?{_ENDED}(\w+)(?:: )?(.*)$", re.MULTILINE)
_NAME = re.compile(r"slurm-(\d+)-(\d+)\.log")
_KILLED = re.compile(r"^(?:slurmstepd|srun)[^:]*: .*?((?:CANCELLED|KILLED|oom).*?)[ *]*$", re.MULTILINE | re.IGNORECASE)
_AT = re.compile(r" AT \S+")

#: What Python or the batch script says where there is no task to mark it; what bash tells of a killed child is left out.
_NO_TASK = re.compile(r"^(?!\d+\| ).*(?:No module named|Error: |: line \d+: (?! *\d)).*$", re.MULTILINE)


class End(NamedTuple):
    """How a task ended by its log: `state` is stopped, diverged or failed, `reason` one line, `at` in seconds UTC."""

    state: str
    reason: str
    at: float


def marked(restart: int, line: str) -> str:
    """Return a line with its restart number."""
    return f"{restart}| {line}"


def starts(job: str, host: str, run_id: str, restart: int) -> str:
    """Return a task's first line."""
    return f"{_STARTS}{run_id}, job {job} on {host}, restart {restart}"


def ended(state: str, reason: str) -> str:
    """Return a task's last line."""
    return f"{_ENDED}{state}{': ' if reason else ''}{reason}"


def newest(folder: Path) -> dict[int, Path]:
    """Return line number -> the log that was written last."""
    found: dict[int, tuple[int, Path]] = {}
    logs = folder / "logs"
    for entry in os.scandir(logs) if logs.is_dir() else ():
        match = _NAME.fullmatch(entry.name)
        if match:
            number, at = int(match[1]) + int(match[2]), entry.stat().st_mtime_ns
            if number not in found or at > found[number][0]:
                found[number] = at, Path(entry.path)
    return {number: path for number, (_, path) in found.items()}


def end(path: Path) -> End:
    """Return how the last start in a log ended; one that says nothing of its end was killed, or never became a task."""
    with path.open("rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        handle.seek(max(0, size - _TAIL_BYTES))
        text = handle.read().decode(errors="replace").replace("\0", "")
    _, started, last = text.rpartition(_STARTS)
    at = path.stat().st_mtime
    lost = list(_NO_TASK.finditer(last))
    if lost and not _SAID.search(last, lost[-1].end()):
        return End(failures.FAILED, lost[-1][0].strip(), at)
    said, killed = _SAID.findall(last), _KILLED.findall(_MARKED.sub("", last))
    if said and not (killed and said[-1][0] == failures.FAILED):  # a task that outlives its run knows less than Slurm
        state, reason = said[-1]
        return End(state, reason, at)
    lines = [line for line in _PRINTED.findall(last) if not line.startswith(_ENDED) and not _KILLED.match(line)]
    if not (started or lines or killed):
        rest = [line.strip() for line in last.splitlines() if line.strip()]
        return End(failures.FAILED, rest[-1] if rest else "ended before it said a word", at)
    how = f"ended by Slurm: {_AT.sub('', killed[-1])}" if killed else "killed"
    return End(failures.FAILED, how + (f"; it last said: {lines[-1]}" if lines else ", at its start"), at)
