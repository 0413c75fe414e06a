"""Why runs of a sweep failed: `DIR/failures.jsonl`, the newest line of a run counts.

A run that diverged is a result: run again it would diverge again, so it is not. Anything else that ends a run (killed,
out of memory, no disk, missing data) may be mended and is tried again by the next submit.
"""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import NamedTuple

from fedbench.base import fsio, identity

NAME = "failures.jsonl"
DIVERGED, FAILED = "diverged", "failed"

#: The error that makes a failure a result: losses or weights left the finite numbers, or nothing but zeros came back.
DIVERGENCE = "NumericsError"
_SAID = "fedbench: "

#: What Open MPI's launcher says of a rank that a signal ended, over two lines.
_SIGNALLED = re.compile(r"process rank (\d+) with PID \d+ on node (\S+) exited on\s+signal (\d+)")


class Failure(NamedTuple):
    """One failed run: `kind` is diverged or failed, `reason` one line, `at` when it was (seconds, UTC)."""

    run_id: str
    kind: str
    reason: str
    at: float = 0.0


def read(folder: Path) -> dict[str, Failure]:
    """Return run_id -> its newest failure; a damaged line is a lost note, and its run counts as not run."""
    path = folder / NAME
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    return {failure.run_id: failure for failure in map(_parsed, lines) if failure is not None}


def add(folder: Path, failure: Failure) -> None:
    """Append a failure; only who holds the sweep's lock does this."""
    path = folder / NAME
    before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if before and not before.endswith("\n"):
        before += "\n"
    fsio.write_text(path, f"{before}{identity.canonical_json(failure._asdict())}\n")


def _parsed(line: str) -> Failure | None:
    try:
        failure = Failure(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return None
    typed = isinstance(failure.run_id, str) and isinstance(failure.reason, str) and isinstance(failure.at, int | float)
    return failure if typed and failure.kind in (DIVERGED, FAILED) else None


def of_log(text: str, code: int) -> tuple[str, str]:
    """Return kind and reason by what a run printed and its exit code (negative: a signal).

    A signal leaves a run no last word, so what it printed before is not the reason.
    """
    lines = [line.strip() for line in text.splitlines() if any(map(str.isalpha, line))]
    numerical = [line for line in lines if f"{DIVERGENCE}: " in line]
    if numerical:
        return DIVERGED, numerical[0].partition(f"{DIVERGENCE}: ")[2]
    if code < 0:
        return FAILED, f"ended by {signal.Signals(-code).name}"
    killed = _SIGNALLED.search(text)
    if killed:
        return FAILED, "rank {} on {} exited on signal {}".format(*killed.groups())
    said = [line.removeprefix(_SAID) for line in lines if line.startswith(_SAID)]
    return FAILED, next(iter([*said[-1:], *lines[-1:]]), f"ended with status {code}")
