"""Faults from outside the product: read by every Python of a job when this folder is on PYTHONPATH.

`FEDBENCH_FAULT=KIND:RANK:PLACE` makes one rank misbehave at one place (PLACES); the moment
goes to the file named by `FEDBENCH_FAULT_MARK`. `FEDBENCH_FAULT_SMALL=1` makes the embedded
task's evaluation splits small. `FEDBENCH_FAULT_CLOCK=STEP:CALLS` sets the wall clock STEP seconds on after so many
looks at it, and back again after as many more, and so on. Without these variables nothing happens.
"""

from __future__ import annotations

import datetime
import importlib.abc
import importlib.machinery
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

Change = Callable[[Any], None]

#: Who tells a process its rank, mpirun or srun; the last is for jobs without a launcher, whose only process is its own.
RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", "FEDBENCH_FAULT_ALONE")

#: The round at whose start `round` strikes.
ROUND = 1
PAUSE_S = 0.25

#: Place -> module and function of it that the fault comes before.
PLACES = {
    "round": ("fedbench.run.runner", "Runner._exchange"),
    "rounds": ("fedbench.run.runner", "Runner.play"),
    "agree": ("fedbench.comm.star", "Star.agree"),
    "build": ("fedbench.run.execute", "construct"),
    "import": ("fedbench.run.execute", None),
    "write": ("fedbench.results.writer", "write"),
}


def _raise() -> None:
    raise RuntimeError("injected fault")


def _thread() -> None:
    threading.Thread(target=_raise, name="injected").start()


def _disk_full() -> None:
    raise OSError(28, "No space left on device (injected fault)")


def _user_error() -> None:
    from fedbench.base.errors import DataError

    raise DataError("injected: this rank alone finds no data.")


def _signal(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


KINDS: dict[str, Callable[[], None]] = {
    "raise": _raise,
    "exit0": lambda: sys.exit(0),
    "exit3": lambda: sys.exit(3),
    "thread": _thread,
    "_exit0": lambda: os._exit(0),
    "_exit3": lambda: os._exit(3),
    "kill9": _signal(signal.SIGKILL),
    "sigint": _signal(signal.SIGINT),
    "stop": _signal(signal.SIGSTOP),
    "full": _disk_full,
    "user": _user_error,
    "note": lambda: None,
    "pause": lambda: time.sleep(PAUSE_S),
    "hang": lambda: time.sleep(600),
}


class _Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets the normal finder load one module, and changes it afterwards."""

    def __init__(self, module: str, change: Change) -> None:
        self._module, self._change = module, change
        self._loader: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self._module:
            return None
        sys.meta_path.remove(self)
        spec = next(s for f in sys.meta_path if (s := f.find_spec(name, path, target)) is not None)
        self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._change(module)


def _before(function: str | None, kind: str, place: str) -> Change:
    """Return the change that puts a fault before a function of a module, or at its import."""

    def change(module: Any) -> None:
        if function is None:
            _strike(kind)
            return
        owner = module
        *parents, last = function.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        original = getattr(owner, last)

        def struck(*args: Any, **keywords: Any) -> Any:
            if place != "round" or args[1].number == ROUND:
                _strike(kind)
            return original(*args, **keywords)

        setattr(owner, last, struck)

    return change


def _strike(kind: str) -> None:
    path = os.environ.get("FEDBENCH_FAULT_MARK")
    if path:
        with open(path, "a", encoding="ascii") as file:
            file.write(f"{time.time()}\n")
    KINDS[kind]()


def _small(module: Any) -> None:
    module.DEV_ROWS, module.TEST_ROWS = 48, 64


def _stepping(step_s: float, calls: int) -> None:
    """Let Python's wall clocks jump; a look at the clock by C code is not among them."""
    looks, read, read_ns = itertools.count(1), time.time, time.time_ns

    def ahead() -> float:
        return step_s if next(looks) // calls % 2 else 0.0

    class Stepped(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return super().now(tz) + datetime.timedelta(seconds=ahead())

    time.time = lambda: read() + ahead()
    time.time_ns = lambda: read_ns() + int(ahead() * 1e9)
    datetime.datetime = Stepped  # type: ignore[misc]


def _install() -> None:
    if os.environ.get("FEDBENCH_FAULT_CLOCK"):
        step, calls = os.environ["FEDBENCH_FAULT_CLOCK"].split(":")
        _stepping(float(step), int(calls))
    if os.environ.get("FEDBENCH_FAULT_SMALL"):
        sys.meta_path.insert(0, _Changed("fedbench.data.embedded", _small))
    wanted = os.environ.get("FEDBENCH_FAULT")
    if not wanted:
        return
    kind, ranks, place = wanted.split(":")
    mine = next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), None)
    if mine is not None and ranks in (mine, "all"):
        module, function = PLACES[place]
        sys.meta_path.insert(0, _Changed(module, _before(function, kind, place)))


_install()
