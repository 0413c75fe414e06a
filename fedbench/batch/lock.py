"""Who is at work in a sweep: one submit at a time (`DIR/lock`), one process for each run (`DIR/leases/<run_id>`).

The locks are the system's, so they are free again however their holders ended; a file that a killed one left blocks
nobody. Where a file system has no locks, everyone goes without.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from fedbench.base.errors import ConfigError

#: How long a lock is waited for: whoever asks for the state of a sweep holds it for a moment.
_PATIENCE_S = 0.5

#: State of a run, and why it is not started, where another process has its lease.
ELSEWHERE = ("running", "another process is at it")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the sweep's lock for the block; ConfigError where another process does."""
    with (folder / "lock").open("a") as handle:
        if not _taken(handle):
            raise ConfigError(f"{folder}: another submit is at work there (see fedbench sweep status {folder}).")
        yield


@contextmanager
def lease(folder: Path, run_id: str) -> Iterator[int | None]:
    """Hold a run's lease for the block and yield its descriptor, or None where another process has it.

    A child that is given the descriptor holds the lease as long as it lives, whatever becomes of this process.
    """
    path = folder / "leases" / run_id
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as opened:
        while True:
            handle = opened.enter_context(path.open("a"))
            if not _taken(handle):
                yield None
                return
            if _is_at(handle, path):
                break  # else its last holder removed it just now
        yield handle.fileno()
    with suppress(FileNotFoundError), path.open() as handle:  # not while a child still holds it
        if _take(handle, fcntl.LOCK_EX) and _is_at(handle, path):
            path.unlink()


def running(folder: Path) -> set[str]:
    """Return the runs whose leases are held."""
    leases = folder / "leases"
    return {path.name for path in leases.iterdir() if _is_held(path)} if leases.is_dir() else set()


def _taken(handle: IO[str]) -> bool:
    end = time.monotonic() + _PATIENCE_S
    while not (taken := _take(handle, fcntl.LOCK_EX)) and time.monotonic() < end:
        time.sleep(_PATIENCE_S / 10)
    return taken


def _is_held(path: Path) -> bool:
    try:
        with path.open() as handle:
            return not _take(handle, fcntl.LOCK_SH)
    except FileNotFoundError:  # its holder has ended just now
        return False


def _is_at(handle: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _take(handle: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
