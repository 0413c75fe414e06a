"""One Slurm task: `python -m fedbench.batch.task sweep DIR OFFSET MANIFEST_SHA256 INDEX`, or `... run JOB [words]`.

It starts `fedbench run`, passes a request to stop on once, marks what is printed with the restart number, and decides
when the run has ended whether Slurm shall start it again. It computes nothing itself and believes no exit code: a run
is done by its file.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple, TypeVar

from fedbench.base.errors import EXIT_FAILURE, EXIT_OK, EXIT_STOPPED, ConfigError, FedbenchError
from fedbench.base.words import Parser
from fedbench.batch import failures, lock, manifest, scheduler, site, tasklog
from fedbench.results import reader
from fedbench.run import arguments, parent
from fedbench.run.launch import RUN_ID_VARIABLE, SIZE_VARIABLES, say

_T = TypeVar("_T")

#: Between tries where a command of Slurm's fails: a controller that is busy or starts anew has no answer for a while.
PAUSES_S = (2.0, 8.0)


class Task(NamedTuple):
    """What runs: the words of `fedbench`, the run's name, the folder of its files, and which of them tell how far it is."""

    words: Sequence[str]
    run_id: str
    folder: Path
    run_file: Path
    checkpoints: Path


class Child:
    """`fedbench run` as a child: it is asked to stop once, by USR2, whenever the request comes."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._asked = False
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def run(self, words: Sequence[str], run_id: str, restart: int, lease: int) -> tuple[int, list[str]]:
        """Return the exit code (negative: a signal) and the newest lines that were printed; it holds the lease as well."""
        newest: list[str] = []
        with self._started(words, run_id, lease) as process:
            self._process = process
            if self._asked:
                process.send_signal(signal.SIGUSR2)
            assert process.stdout is not None
            for line in process.stdout:
                print(tasklog.marked(restart, line.rstrip()), flush=True)
                newest = [*newest[-99:], line]
            return process.wait(), newest

    def _started(self, words: Sequence[str], run_id: str, lease: int) -> subprocess.Popen[str]:
        """Start `fedbench` with the request to stop blocked, until it can take it: unblocked it would end Python."""
        mine = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        process = subprocess.Popen(
            [sys.executable, "-m", "fedbench", *words],
            env={key: value for key, value in os.environ.items() if key not in SIZE_VARIABLES}
            | parent.environment(lease)
            | {RUN_ID_VARIABLE: run_id},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            pass_fds=(lease,),
        )
        signal.pthread_sigmask(signal.SIG_SETMASK, mine)
        return process

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first, self._asked = not self._asked, True
        if first and self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR2)


def perform(task: Task, child: Child) -> int:
    """Run a task to its end and return its exit code: 0 done, 85 stopped (and perhaps requeued), else failed."""
    job, restart = scheduler.own_job(), scheduler.restarts()

    def tell(line: str) -> None:
        print(tasklog.marked(restart, line), flush=True)

    with lock.lease(task.folder, task.run_id) as lease:
        if lease is None:
            say(f"another process is at {task.run_id}; this task leaves it alone.")
            return EXIT_OK
        tell(tasklog.starts(job, os.uname().nodename, task.run_id, restart))
        before = _mark(task.checkpoints)
        code, newest = child.run(task.words, task.run_id, restart, lease)
        if reader.is_done(task.run_file, task.run_id):
            tell(tasklog.ended("done", ""))
            return EXIT_OK
        if code == EXIT_STOPPED:
            fresh = _mark(task.checkpoints) not in (None, before)
            why_not = refusal(job, restart, site.of_environment(os.environ).restarts, fresh=fresh)
            tell(tasklog.ended("stopped", why_not or f"requeued for restart {restart + 1}"))
            if not why_not:
                try:
                    _patiently(lambda: scheduler.requeue(job))
                except FedbenchError as error:
                    tell(tasklog.ended("stopped", f"not requeued: {error}"))
            return EXIT_STOPPED
        kind, reason = failures.of_log("".join(newest), code)
        tell(tasklog.ended(kind, reason))
        return code if code > 0 else EXIT_FAILURE


def refusal(
    job: str, restart: int, bound: int, *, fresh: bool, running: Callable[[str], bool] = scheduler.is_running
) -> str:
    """Return why a run that stopped resumably is not requeued, or an empty string where it is.

    A restart without progress or without end burns what the user pays for, and one of a job that is being cancelled
    or requeued by someone else would undo what they asked for.
    """
    if not job:
        return "not requeued: there is no Slurm job here"
    if not fresh:
        return "not requeued: no checkpoint is newer than this start"
    if restart >= bound:
        return f"not requeued: {restart} restarts are the most that are allowed"
    try:
        return "" if _patiently(lambda: running(job)) else "not requeued: Slurm is ending the job"
    except FedbenchError as error:
        return f"not requeued: {error}"


def of_sweep(folder: Path, offset: int, sha256: str, index: int) -> Task:
    """Return the task of a line; ConfigError where the manifest is not the one that was submitted."""
    if manifest.sha256(folder) != sha256:
        raise ConfigError(
            f"{folder / manifest.NAME}: not the manifest that this task was submitted with; nothing is run. "
            f"`fedbench sweep submit {folder}` submits what is there now."
        )
    line = manifest.read_line(folder, offset + index)
    swept = manifest.Sweep(folder, (line,))
    return Task(swept.run_words(line), line.run_id, folder, swept.run_file(line), folder / "ckpt" / line.run_id)


def of_run(words: Sequence[str]) -> Task:
    """Return the task of the words of `fedbench run`."""
    from fedbench.run import command

    parser = Parser(prog="fedbench")
    arguments.add(parser.verbs("verb"), command.run)
    options, job = command.planned(parser.parse_args(["run", *words]))
    folder = options.results
    return Task(["run", *words], job.run_id, folder, options.run_file(job), folder / "ckpt" / job.run_id)


def main(words: Sequence[str]) -> int:
    """Return the exit code of a task."""
    child = Child()
    try:
        if words[0] == "run":
            return perform(of_run(words[1:]), child)
        folder, offset, sha256, index = words[1:]
        return perform(of_sweep(Path(folder), int(offset), sha256, int(index)), child)
    except FedbenchError as error:
        print(tasklog.marked(scheduler.restarts(), tasklog.ended(failures.FAILED, str(error))), flush=True)
        return error.exit_code


def _mark(checkpoints: Path) -> tuple[int, int] | None:
    """Return what changes with every checkpoint, whatever the clocks of hosts and disks say; None without one."""
    latest = checkpoints / "LATEST"
    if not latest.exists():
        return None
    told = latest.stat()
    return told.st_ino, told.st_mtime_ns


def _patiently(ask: Callable[[], _T]) -> _T:
    """Return Slurm's answer; FedbenchError where it has none after several tries."""
    for pause_s in PAUSES_S:
        try:
            return ask()
        except FedbenchError:
            time.sleep(pause_s)
    return ask()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
