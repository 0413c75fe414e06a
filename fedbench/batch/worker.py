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
import sys
from pathlib import Path
from typing import Any

from fedbench.base import account
from fedbench.base.errors import EXIT_OK, FedbenchError, NumericsError
from fedbench.batch import failures, lock, manifest
from fedbench.batch.manifest import Line, Sweep
from fedbench.comm.loopback import Loopback
from fedbench.run import launch, parent
from fedbench.run.execute import Execution
from fedbench.run.memory import Memory


def serve(sweep: Sweep) -> None:
    """Run the lines that stdin names until it ends; answers go to what was stdout when this began."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        for done, text in enumerate(iter(sys.stdin.readline, "")):
            launch.keep_early_stops()
            answers.write(json.dumps(_answer(sweep, sweep.lines[int(text)], done)) + "\n")
            answers.flush()


def _answer(sweep: Sweep, line: Line, before: int) -> dict[str, Any]:
    """Return exit code, kind and reason of the failure (empty where the log tells), and resident bytes, after a run that
    this process makes after `before` others.
    """
    _print_to(sweep.log(line))
    with lock.lease(sweep.folder, line.run_id) as lease:
        code, kind, reason = _ended(sweep, line, before) if lease is not None else (EXIT_OK, *lock.ELSEWHERE)
    account.give_back_free_memory()
    return {"code": code, "kind": kind, "reason": reason, "resident_bytes": account.resident_bytes()}


def _ended(sweep: Sweep, line: Line, before: int) -> tuple[int, str, str]:
    """Run a line and return its exit code, and kind and reason of the error that ended it."""
    found: list[FedbenchError] = []
    transport = Loopback()
    execution = Execution(transport, Memory(), before)

    def body() -> int:
        """Return the run's exit code, and keep the error that it ended with."""
        try:
            return execution(lambda _: line.job(), sweep.options(line))
        except FedbenchError as error:
            found.append(error)
            raise

    code = launch.guard(transport, body, execution.where)
    launch.keep_early_stops()
    if not found:
        return code, "", ""
    return code, failures.DIVERGED if isinstance(found[0], NumericsError) else failures.FAILED, str(found[0])


def _print_to(log: Path) -> None:
    """Let all that this process prints go to the end of `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.close(handle)


def main() -> None:
    """Serve the sweep whose folder is the only argument."""
    faulthandler.enable()
    launch.keep_early_stops()
    parent.stop_with_parent()
    serve(manifest.read(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
