"""A process that runs many one-rank lines of a sweep one after another, to spare each of them the imports.

`python -m fedbench.batch.worker DIR` reads line numbers from stdin and answers each with one line of JSON; what a run
prints goes to its log. A run takes the path of `fedbench run`, with an Execution, a clock and a transport of its own,
and has the bits of a run in a fresh process. Its memory phases are not those of a fresh process: earlier runs have
left their heap and caches, so provenance tells how many (`runs_before`), and reports draw no memory of such a run.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from fedbench.base import account
from fedbench.base.errors import FedbenchError
from fedbench.batch import manifest
from fedbench.batch.manifest import Line, Sweep
from fedbench.comm.loopback import Loopback
from fedbench.run import launch
from fedbench.run.execute import Execution
from fedbench.run.memory import Memory

_LOOK_EVERY_S = 0.5


def serve(sweep: Sweep) -> None:
    """Run the lines that stdin names until it ends; answers go to what was stdout when this began."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        for done, text in enumerate(iter(sys.stdin.readline, "")):
            launch.keep_early_stops()
            answers.write(json.dumps(_answer(sweep, sweep.lines[int(text)], done)) + "\n")
            answers.flush()


def _answer(sweep: Sweep, line: Line, done: int) -> dict[str, Any]:
    """Run a line after `done` others; return exit code, name of the error that ended it (or null), its message, and
    resident bytes after it.
    """
    _print_to(sweep.log(line))
    found: list[FedbenchError] = []
    transport = Loopback()
    execution = Execution(transport, Memory(), done)

    def body() -> int:
        """Return the run's exit code, and keep the error that it ended with."""
        try:
            return execution(lambda _: line.job(), sweep.options(line))
        except FedbenchError as error:
            found.append(error)
            raise

    code = launch.guard(transport, body, execution.where)
    launch.keep_early_stops()
    account.give_back_free_memory()
    error = found[0] if found else None
    return {
        "code": code,
        "error": type(error).__name__ if error else None,
        "message": str(error) if error else "",
        "resident_bytes": account.resident_bytes(),
    }


def _print_to(log: Path) -> None:
    """Let all that this process prints go to the end of `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.close(handle)


def _stop_with_parent() -> None:
    """Let this process stop, as by a signal, when the one that started it is gone: nobody would know of its run."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_EVERY_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def main() -> None:
    """Serve the sweep whose folder is the only argument."""
    faulthandler.enable()
    launch.keep_early_stops()
    _stop_with_parent()
    serve(manifest.read(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
