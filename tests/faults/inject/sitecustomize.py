"""Faults from outside the product: read by every Python of a job when this folder is on PYTHONPATH.

`FEDBENCH_FAULT=KIND:RANK:PLACE` makes one rank misbehave at one place: the start of round 1
(`round`), while the job is built (`build`), or before the run file is written (`write`). The
moment of the fault goes to the file named by `FEDBENCH_FAULT_MARK`. Without the variable
nothing happens.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import signal
import sys
import threading
import time
from types import ModuleType
from typing import Any

ROUND = 1
#: Place -> module, attribute of it (dotted) that the fault comes before, and whether only a round counts.
PLACES = {
    "round": ("fedbench.run.runner", "Runner.play"),
    "build": ("fedbench.run.execute", "construct"),
    "write": ("fedbench.results.writer", "write"),
}


def _raise() -> None:
    raise RuntimeError("injected fault")


def _thread() -> None:
    threading.Thread(target=_raise, name="injected").start()


def _disk_full() -> None:
    raise OSError(28, "No space left on device (injected fault)")


KINDS = {
    "raise": _raise,
    "exit0": lambda: sys.exit(0),
    "exit3": lambda: sys.exit(3),
    "thread": _thread,
    "_exit0": lambda: os._exit(0),
    "_exit3": lambda: os._exit(3),
    "kill9": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "sigint": lambda: os.kill(os.getpid(), signal.SIGINT),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "full": _disk_full,
    "pause": lambda: time.sleep(0.2),
}


class _Patch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets the normal finders load one module, and puts the fault before one of its functions."""

    def __init__(self, module: str, attribute: str, kind: str) -> None:
        self._module, self._attribute, self._kind = module, attribute, kind
        self._loader: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None:
            raise ImportError(f"{name} is not there to be patched")
        self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        owner: Any = module
        *parents, last = self._attribute.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        original = getattr(owner, last)

        def patched(*args: Any, **keywords: Any) -> Any:
            if self._attribute != "Runner.play" or args[1] == ROUND or self._kind == "pause":
                _mark()
                KINDS[self._kind]()
            return original(*args, **keywords)

        setattr(owner, last, patched)


def _mark() -> None:
    path = os.environ.get("FEDBENCH_FAULT_MARK")
    if path:
        with open(path, "a", encoding="ascii") as file:
            file.write(f"{time.time()}\n")


def _install() -> None:
    wanted = os.environ.get("FEDBENCH_FAULT")
    if not wanted:
        return
    kind, rank, place = wanted.split(":")
    mine = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK"))
    if mine == rank:
        module, attribute = PLACES[place]
        sys.meta_path.insert(0, _Patch(module, attribute, kind))


_install()
