"""What ties `fedbench run` to the process of a sweep that starts it: it stops when that is gone, and holds its lease.

A run that nobody started in this way is tied to nothing.
"""

from __future__ import annotations

import os
import signal
import threading
import time

#: Names the process that started a run, and the descriptor of the run's lease, which that process has locked.
_PARENT_VARIABLE, _LEASE_VARIABLE = "FEDBENCH_PARENT", "FEDBENCH_LEASE"

_LOOK_EVERY_S = 0.5


def environment(lease: int | None = None) -> dict[str, str]:
    """Return what ties a child to this process; it must be given the descriptor `lease` as well."""
    leased = {} if lease is None else {_LEASE_VARIABLE: str(lease)}
    return {_PARENT_VARIABLE: str(os.getpid()), **leased}


def descriptors() -> tuple[int, ...]:
    """Return what a launcher must be given, so that the lease is held as long as there are ranks."""
    lease = os.environ.get(_LEASE_VARIABLE)
    return (int(lease),) if lease else ()


def stop_with_parent() -> None:
    """Let this process stop, as by a signal, when the one that started it is gone: nobody would know of its run."""
    parent = os.environ.pop(_PARENT_VARIABLE, "")

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(_LOOK_EVERY_S)
        os.kill(os.getpid(), signal.SIGTERM)

    if parent:
        threading.Thread(target=watch, name="parent", daemon=True).start()
