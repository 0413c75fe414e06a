"""One submit at a time per sweep, and what it is running: `DIR/lock` and `DIR/running.json`.

The lock is the system's, so it is free again however its holder ended. What a dead holder left in the list is not
believed.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fedbench.base import fsio
from fedbench.base.errors import ConfigError

#: How long a lock is waited for: whoever asks for the state of a sweep holds it for a moment.
_PATIENCE_S = 0.5


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the sweep's lock for the block; ConfigError where another process does."""
    with (folder / "lock").open("a") as handle:
        end = time.monotonic() + _PATIENCE_S
        while not (taken := _take(handle)) and time.monotonic() < end:
            time.sleep(_PATIENCE_S / 10)
        if not taken:
            raise ConfigError(f"{folder}: another submit is at work there (see fedbench sweep status {folder}).")
        note(folder, ())
        try:
            yield
        finally:
            (folder / "running.json").unlink(missing_ok=True)


def note(folder: Path, run_ids: Iterable[str]) -> None:
    """Say which runs the holder of the lock is running."""
    fsio.write_text(folder / "running.json", json.dumps({"pid": os.getpid(), "runs": sorted(run_ids)}))


def running(folder: Path) -> set[str]:
    """Return the runs that a living submit is running."""
    lock, path = folder / "lock", folder / "running.json"
    if not lock.exists() or not path.exists():
        return set()
    with lock.open() as handle:
        if _take(handle):
            return set()
    try:
        return set(json.loads(path.read_text(encoding="utf-8"))["runs"])
    except FileNotFoundError:  # it ended between the two looks
        return set()
    except (ValueError, KeyError, TypeError):  # damaged: nothing is believed of it
        return set()


def _take(handle: IO[str]) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
