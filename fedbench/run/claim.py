"""One process at a run: `RESULTS/ckpt/RUN_ID.lock`, held by rank 0 from before a resume until the run's end.

The lock is the system's, so it is free again however its holder ended, and a file that a killed one left blocks nobody.
Where a file system has no locks, a run goes without and removes nothing that a living writer may still need.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedbench.base.errors import ResultError

#: How long a lock is waited for: a predecessor that was killed a moment ago may still be on its way out.
_PATIENCE_S = 1.0
_ASK_EVERY_S = 0.05


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Hold a run for the block and give whether a lock could be had at all; ResultError where another process holds it."""
    handle = _taken(path)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            with suppress(OSError):
                path.unlink()  # while it is held: who opened it meanwhile finds that it is the lock no more
                path.parent.rmdir()
            os.close(handle)


def _taken(path: Path) -> int | None:
    """Return the open, locked file; None where files can't be locked there."""
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the folder went with the lock of another run
            continue
        except OSError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"pid {os.getpid()} on {os.uname().nodename}".encode(), 0)
                return handle
        except BlockingIOError:
            if time.monotonic() > end:
                holder = os.pread(handle, 200, 0).decode(errors="replace") or "it has not said which"
                os.close(handle)
                raise ResultError(
                    f"another process is at {path.stem} ({holder}); wait for its end, or end it."
                ) from None
            time.sleep(_ASK_EVERY_S)
        except OSError:
            os.close(handle)
            return None
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    """Return whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
