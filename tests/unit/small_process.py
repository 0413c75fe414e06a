"""A fresh process with few rows to evaluate: a sweep's worker (argument: DIR) or `fedbench` (arguments: its own).

A sweep that it submits has such workers. A worker dies by SIGKILL, once, when it is to run the line that `DIR/die` names.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from fedbench.__main__ import main
from fedbench.batch import lanes, worker
from fedbench.batch.manifest import Line, Sweep
from fedbench.data import embedded

answer = worker._answer


def answer_or_die(sweep: Sweep, line: Line, done: int) -> dict[str, object]:
    """Run a line, unless it is the one to die in."""
    die = sweep.folder / "die"
    if die.exists() and die.read_text() == line.run_id:
        die.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return answer(sweep, line, done)


if __name__ == "__main__":
    lanes.WORKER = (__file__,)
    embedded.DEV_ROWS, embedded.TEST_ROWS = 48, 64
    if Path(sys.argv[1]).is_dir():
        worker._answer = answer_or_die
        worker.main()
    else:
        sys.exit(main(sys.argv[1:]))
