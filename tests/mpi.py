"""Real MPI jobs for tests: each in a session of its own, with a deadline, its output in files, nothing left behind.

Processes of a job carry a mark in their environment, so that ranks are found and ended
even when their launcher is gone. A missing launcher skips, or fails under
FEDBENCH_REQUIRE_MPI=1.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedbench.run.supervise import LAUNCHER_ENVIRONMENT

ROOT = Path(__file__).parents[1]
DEADLINE_S = 180.0
LEFT_GRACE_S = 2.0
REQUIRE_VARIABLE = "FEDBENCH_REQUIRE_MPI"

#: The interpreter of the second MPI that is tested, in the environment that `make test` makes beside this one.
MPICH_PYTHON = str(Path(f"{sys.prefix}-mpich", "bin", "python"))

#: Variables of the surrounding shell that would reach into a job.
_FOREIGN = ("OMPI_COMM_WORLD", "PMI_", "PMIX_", "SLURM_", "FEDBENCH_FAULT", "PYTHONPATH")
_MARK = "FEDBENCH_TEST_JOB"
#: What prterun of Open MPI 5 says, rarely, on a machine that is busy: no rank was started.
_NEVER_STARTED = "The PMIx server's listener thread failed to start"
_RANK = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def launcher(python: str = sys.executable) -> Path:
    """Return the `mpirun` beside an interpreter, never that of PATH; skip where there is none."""
    path = Path(python).with_name("mpirun")
    if not path.exists():
        reason = f"no MPI launcher: there is no {path}"
        if os.environ.get(REQUIRE_VARIABLE) == "1":
            pytest.fail(f"{reason} ({REQUIRE_VARIABLE}=1)")
        pytest.skip(reason)
    return path


def mpirun(ranks: int, *words: str | Path, python: str = sys.executable) -> list[str]:
    """Return the command line of a job started by hand."""
    return [str(launcher(python)), "-n", str(ranks), *map(str, words)]


def console_script() -> str:
    """Return the `fedbench` beside this interpreter."""
    return str(Path(sys.executable).with_name("fedbench"))


@dataclass(frozen=True)
class Ended:
    """What became of a job; `left` are its processes that were still there LEFT_GRACE_S after it."""

    code: int
    out: str
    err: str
    ended_at: float
    left: tuple[int, ...]

    def told(self) -> str:
        """Return everything for an assertion's message."""
        return f"status {self.code}, left {self.left}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


class Job:
    """A running job in a session of its own."""

    def __init__(self, command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._mark = uuid.uuid4().hex
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(_FOREIGN)}
        by_hand = LAUNCHER_ENVIRONMENT if Path(command[0]).name == "mpirun" else {}
        env = {**inherited, **by_hand, **_ONE_THREAD, **(environment or {}), _MARK: self._mark}
        with open(folder / "stdout", "wb") as out, open(folder / "stderr", "wb") as err:
            self.process = subprocess.Popen(
                list(command),
                env=env,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def err(self) -> str:
        """Return what was printed on stderr so far, without the zero bytes that Open MPI 5 puts between its own texts."""
        return (self._folder / "stderr").read_text(errors="replace").replace("\0", "")

    def ranks(self) -> dict[int, int]:
        """Return the living ranks: rank -> process id."""
        found = {}
        for pid, environment in self._processes():
            numbers = [environment[name] for name in _RANK if name in environment]
            if numbers:
                found[int(numbers[0])] = pid
        return found

    def launchers(self) -> list[int]:
        """Return the ids of the job's living `mpirun` processes (Open MPI's becomes `prterun`)."""
        words = {pid: _read(f"/proc/{pid}/cmdline").split(b"\0")[0] for pid, _ in self._processes()}
        return [pid for pid, word in words.items() if word.endswith((b"mpirun", b"prterun", b"mpiexec.hydra"))]

    def until(self, true: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
        """Wait until `true()`; fail the test where the job ends before it, or it takes too long."""
        end = time.monotonic() + deadline_s
        while not true():
            late = time.monotonic() > end
            if late or self.process.poll() is not None:
                ended = self._close(late=late)
                pytest.fail(f"the job never came to this: {what}\n{ended.told()}")
            time.sleep(0.02)

    def wait(self, deadline_s: float = DEADLINE_S) -> Ended:
        """Return what became of the job; past the deadline everything of it is killed and the test fails."""
        try:
            self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            ended = self._close(late=True)
            pytest.fail(f"the job did not end within {deadline_s:g} s and was killed\n{ended.told()}")
        return self._close(late=False)

    def kill(self) -> None:
        """End everything of the job as a dead machine would: SIGKILL to each of its processes, until none is left."""
        while pids := [pid for pid, _ in self._processes()]:
            for pid in pids:
                _kill(pid, os.kill)
            if self.process.pid in pids:
                self.process.wait()
            time.sleep(0.01)

    def orphans_end(self, deadline_s: float) -> None:
        """Wait until no process of the job is left; `wait` tells those that are still there."""
        end = time.monotonic() + deadline_s
        while self._processes() and time.monotonic() < end:
            time.sleep(0.05)

    def _close(self, *, late: bool) -> Ended:
        """End what is left, at once where the job is late, and return what became of it."""
        ended_at = time.time()
        left = tuple(self._end_leftovers(0.0 if late else LEFT_GRACE_S))
        out = (self._folder / "stdout").read_text(errors="replace")
        return Ended(self.process.wait(), out, self.err, ended_at, left)

    def _end_leftovers(self, grace_s: float) -> list[int]:
        """Return the processes that outlived the job by `grace_s`, after killing them and the job's group."""
        end = time.monotonic() + grace_s
        while (left := [pid for pid, _ in self._processes()]) and time.monotonic() < end:
            time.sleep(0.05)
        for pid in left:
            _kill(pid, os.kill)
        if self.process.poll() is None:
            _kill(self.process.pid, os.killpg)
        return left

    def _processes(self) -> list[tuple[int, dict[str, str]]]:
        """Return the living processes of this job with their environment; zombies are not alive."""
        found = []
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            raw = _read(f"/proc/{entry}/environ")
            if f"{_MARK}={self._mark}".encode() in raw.split(b"\0"):
                pairs = [item.decode(errors="replace").partition("=") for item in raw.split(b"\0")]
                found.append((int(entry), {name: value for name, _, value in pairs}))
        return found


def run(
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    deadline_s: float = DEADLINE_S,
) -> Ended:
    """Run a job to its end; once more where Open MPI's launcher gave up before it had started a rank."""
    ended = Job(command, folder, environment).wait(deadline_s)
    return Job(command, folder, environment).wait(deadline_s) if _NEVER_STARTED in ended.err else ended


def chosen(request: pytest.FixtureRequest, name: str) -> list[Any]:
    """Return the values of a parameter in all tests of the session that have it, so that their jobs start beforehand."""
    params = [getattr(getattr(item, "callspec", None), "params", {}) for item in request.session.items]
    return [found[name] for found in params if name in found]


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def _kill(pid: int, by: Callable[[int, int], None]) -> None:
    try:
        by(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
