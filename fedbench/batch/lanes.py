"""One lane of a sweep on this machine: the processes that run its lines, one line at a time.

One-rank lines share a worker process; a line of several ranks is a `fedbench run -n` of its own. What becomes of a
line is read off its run file and its error, never off an exit code alone. No file of the sweep is written here but
logs and job files.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import IO, Any, NamedTuple

from fedbench.base.errors import EXIT_OK, EXIT_STOPPED
from fedbench.batch import failures, lock
from fedbench.batch.manifest import Line, Sweep
from fedbench.results import reader
from fedbench.run import parent
from fedbench.run.launch import SIZE_VARIABLES

#: A worker that holds more than this after a run is replaced by a fresh one.
WORKER_BYTES = 2 << 30

#: How Python starts a worker, the sweep's folder apart.
WORKER = ("-m", "fedbench.batch.worker")


class Outcome(NamedTuple):
    """What became of one line: `state` is done, diverged, failed, stopped, or running: another process has its lease."""

    line: Line
    state: str
    reason: str
    wall_s: float


class Lane:
    """Runs lines, one at a time; `stop` may be called from another thread."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._stopping = False
        self._child: subprocess.Popen[str] | None = None
        self._threads = 0

    def run(self, line: Line) -> Outcome:
        """Return what became of a line."""
        log = self._sweep.log(line)
        log.parent.mkdir(parents=True, exist_ok=True)
        start, before = time.monotonic(), log.stat().st_size if log.exists() else 0
        with log.open("a", encoding="utf-8") as printed:
            code, kind, reason = self._in_worker(line, printed) if line.ranks == 1 else self._launched(line, printed)
        wall_s = time.monotonic() - start
        if reader.is_done(self._sweep.run_file(line), line.run_id):
            return Outcome(line, "done", "", wall_s)
        if code == EXIT_STOPPED or self._stopping:
            return Outcome(line, "stopped", "stopped by a signal", wall_s)
        if not kind:
            with log.open("rb") as handle:
                handle.seek(before)
                kind, reason = failures.of_log(handle.read().decode(errors="replace"), code)
        return Outcome(line, kind, reason, wall_s)

    def stop(self, *, now: bool) -> None:
        """Ask the line at hand to stop at a round boundary, or `now`; no new one is started.

        A launched line is sent TERM either way: the second makes its supervisor end the ranks, which would outlive it.
        """
        self._stopping = True
        child = self._child
        if child is not None and child.poll() is None:
            child.send_signal(signal.SIGKILL if now and child.stdin is not None else signal.SIGTERM)

    def close(self) -> None:
        """End the worker."""
        if self._child is not None:
            self._child.communicate()
            self._child = None

    def _in_worker(self, line: Line, printed: IO[str]) -> tuple[int, str, str]:
        """Return exit code, kind and reason of a line that the worker runs; a dead worker's code is that of its death."""
        if self._child is not None and self._threads != line.threads:
            self.close()
        if self._child is None:
            self._start([*WORKER, str(self._sweep.folder)], line, printed)
        worker = self._child
        assert worker is not None
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            worker.stdin.write(f"{line.number}\n")
            worker.stdin.flush()
            answer = worker.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.close()
            return worker.returncode, "", ""
        told: dict[str, Any] = json.loads(answer)
        if told["resident_bytes"] > WORKER_BYTES:
            self.close()
        return told["code"], told["kind"], told["reason"]

    def _launched(self, line: Line, printed: IO[str]) -> tuple[int, str, str]:
        """Return the exit code of a line that `fedbench run -n` launches; kind and reason are in its log.

        `run.launcher` is about an allocation of Slurm's; without one there is mpirun alone.
        """
        self.close()
        with lock.lease(self._sweep.folder, line.run_id) as lease:
            if lease is None:
                return EXIT_OK, *lock.ELSEWHERE
            words = [*self._sweep.run_words(line), "--set", "run.launcher=mpirun"]
            self._start(["-m", "fedbench", *words], line, printed, lease)
            child = self._child
            assert child is not None
            code = child.wait()
        self._child = None
        return code, "", ""

    def _start(self, words: list[str], line: Line, printed: IO[str], lease: int | None = None) -> None:
        """Start a child in a session of its own, so that a Ctrl-C reaches it through `stop` alone.

        One that runs a single line holds its `lease` with this process; a worker is told its lines by a pipe.
        """
        piped = lease is None
        environment = {key: value for key, value in os.environ.items() if key not in SIZE_VARIABLES}
        self._threads = line.threads
        self._child = subprocess.Popen(
            [sys.executable, *words],
            env=environment | parent.environment(lease) | {"OMP_NUM_THREADS": str(line.threads)},
            stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
            stdout=subprocess.PIPE if piped else printed,
            stderr=printed,
            text=True,
            start_new_session=True,
            pass_fds=() if lease is None else (lease,),
        )
        if self._stopping:  # `stop` may have come before there was a child
            self._child.send_signal(signal.SIGTERM)
