"""`fedbench run -n`: starts `mpirun` or `srun` on the same command and answers for what becomes of it.

The launcher's status is never trusted alone: the run is done when its file is complete.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from fedbench.base.errors import EXIT_FAILURE, EXIT_OK, EXIT_STOPPED, EXIT_USER, ConfigError
from fedbench.run import launch, parent
from fedbench.run.launch import PIDS_VARIABLE, SAID, STOP_NOTE_VARIABLE, say

#: What Open MPI's wheel wants from root on a small machine; other launchers ignore them.
LAUNCHER_ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
#: Signals by which people and batch systems end a program.
_ENDING = (signal.SIGTERM, signal.SIGINT)

_GRACE_S = 2.0
#: How often a request is looked for, and how many such moments lie between two looks for living ranks.
_TICK_S, _TICKS_A_LOOK = 0.1, 20
#: A launcher ends soon after its last rank.
_LOST_S = 20.0
_RULE = "-----------------"

#: What srun says of its own; like mpirun's banners it is shown only where no rank told its cause.
_SRUN = ("srun: ", "slurmstepd")


def mpirun() -> Path:
    """Return the launcher beside the interpreter; ConfigError where there is none."""
    path = Path(sys.executable).with_name("mpirun")
    if not path.exists():
        raise ConfigError(
            f"-n: there is no mpirun beside {Path(sys.executable).name}. Install one (pip install 'fedbench[mpi]'), "
            f"or start the job with the site's own: mpirun -n RANKS fedbench run JOB."
        )
    return path


def srun(launcher: str, ranks: int, threads: int) -> list[str]:
    """Return the words that start a Slurm step whose ranks find each other by the plugin that `launcher` names."""
    if shutil.which("srun") is None:
        raise ConfigError(
            f"run.launcher: found '{launcher}', but there is no srun here. Allowed without Slurm: 'mpirun'."
        )
    # Without --kill-on-bad-exit the ranks of MPICH wait for a killed one for ever.
    plugin = launcher.removeprefix("srun-")
    return ["srun", f"--mpi={plugin}", "--kill-on-bad-exit=1", f"--ntasks={ranks}", f"--cpus-per-task={threads}"]


def start_words(launcher: str, ranks: int, threads: int) -> list[str]:
    """Return the words before a command that start it on `ranks` ranks; ConfigError where `launcher` is not here."""
    return [str(mpirun()), "-n", str(ranks)] if launcher == "mpirun" else srun(launcher, ranks, threads)


def supervise(
    arguments: Sequence[str], ranks: int, threads: int, is_done: Callable[[], bool], launcher: str = "mpirun"
) -> int:
    """Run `fedbench ARGUMENTS` on `ranks` ranks and return the exit code of the whole."""
    code = on_ranks("fedbench", arguments, ranks, threads, launcher)
    if code in (EXIT_USER, EXIT_STOPPED):
        return code
    if code == EXIT_OK and not is_done():
        say("the launcher ended with status 0, but there is no complete run file: the run failed.")
        return EXIT_FAILURE
    return code


def on_ranks(module: str, arguments: Sequence[str], ranks: int, threads: int, launcher: str = "mpirun") -> int:
    """Run `python -m MODULE ARGUMENTS` on `ranks` ranks and return the launcher's exit code; no rank outlives it."""
    start = start_words(launcher, ranks, threads)
    with tempfile.TemporaryDirectory(prefix="fedbench-") as pids:
        environment = {**LAUNCHER_ENVIRONMENT, **os.environ, PIDS_VARIABLE: pids, "OMP_NUM_THREADS": str(threads)}
        command = [*start, sys.executable, "-m", module, *arguments]
        if launcher == "mpirun":
            return _watch(command, environment, Path(pids))
        note = Path(pids, "stopped")
        code = _watch(command, environment | _for_srun(launcher) | {STOP_NOTE_VARIABLE: str(note)}, Path(pids))
        return EXIT_STOPPED if note.exists() else code


def _for_srun(launcher: str) -> dict[str, str]:
    """Return what a step needs beside the environment.

    MPICH names shared memory by job and step. A requeued job has the same names again, and what killed ranks left
    behind under them ends the new ones, so a restarted job goes without.
    """
    restarted = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    return {"MPIR_CVAR_NOLOCAL": "1"} if launcher == "srun-pmi2" and restarted else {}


def _watch(command: Sequence[str], environment: Mapping[str, str], pids: Path) -> int:
    asks: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        """Note what came, no more: a second signal may come while the first is handled, so nothing may wait or lock."""
        asks.append(number)

    request = launch.rank_signal()
    before = {s: signal.signal(s, on_signal) for s in (*_ENDING, signal.SIGUSR1, signal.SIGUSR2)}
    if launch.early_stop():
        asks.append(signal.SIGUSR2)
    over = threading.Event()
    voices = _Voices()
    with subprocess.Popen(
        command,
        env=dict(environment),
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        pass_fds=parent.descriptors(),
    ) as process:
        assert process.stderr is not None
        pump = threading.Thread(target=voices.pass_on, args=(process.stderr,), name="stderr", daemon=True)
        care = threading.Thread(target=_care, args=(process.pid, pids, request, asks, over), name="care", daemon=True)
        pump.start()
        care.start()
        try:
            code = process.wait()
        finally:
            over.set()
            _end_orphans(pids)
            for number, handler in before.items():
                signal.signal(number, handler)
        pump.join(_GRACE_S)
    voices.close(code)
    if code < 0:
        say(f"the launcher was ended by {signal.Signals(-code).name}.")
    return code if code >= 0 else 128 - code


def _care(launcher: int, pids: Path, request: int, asks: Sequence[int], over: threading.Event) -> None:
    """Ask every rank once to stop when there is an ask, those that still start as soon as they can take it.

    A second ask by a person ends the launcher with all ranks, and so does a launcher that has lost all of them: Open
    MPI's waits for ever where MPI_Init fails. USR1 and USR2 only ask: a batch system sends TERM to everyone while its
    script passes a request on.
    """
    asked, seen_s = set[int](), time.monotonic()
    for tick in itertools.count():
        if asks or tick % _TICKS_A_LOOK == 0:
            living = _living(pids)
            if living or not any(pids.glob("[0-9]*")):
                seen_s = time.monotonic()
            for pid in living if asks else ():
                if pid not in asked:
                    _send(pid, request)
                    asked.add(pid)
        if over.wait(_TICK_S):
            return
        lost = time.monotonic() - seen_s > _LOST_S
        if lost or sum(ask in _ENDING for ask in asks) > 1:
            if lost:
                say(f"no rank has been there for {_LOST_S:g} s, but the launcher goes on: it is ended.")
            _send(launcher, signal.SIGTERM, os.killpg)
            if not over.wait(_GRACE_S):
                _send(launcher, signal.SIGKILL, os.killpg)
            return


class _Voices:
    """The ranks' stderr, passed on line by line; the launcher's own banner is held back until it is needed."""

    def __init__(self) -> None:
        self._explained = False
        self._banner: list[str] = []

    def pass_on(self, lines: IO[str]) -> None:
        """Pass everything but banners on until the stream ends."""
        in_banner = False
        for raw in lines:
            line = raw.replace("\0", "")  # Open MPI 5 sends a zero byte after each of its own texts
            if line.startswith(_RULE):
                in_banner = not in_banner
            if in_banner or line.startswith((_RULE, *_SRUN)):
                self._banner.append(line)
                continue
            self._explained |= line.startswith(f"{SAID}rank ")
            sys.stderr.write(line)
            sys.stderr.flush()

    def close(self, code: int) -> None:
        """Print the banners unless a rank told its cause, or all ranks left with a code that they agreed on."""
        if not self._explained and code not in (EXIT_OK, EXIT_USER, EXIT_STOPPED):
            sys.stderr.writelines(self._banner)


def _living(pids: Path) -> list[int]:
    """Return the recorded ranks that still run fedbench."""
    found = []
    for path in pids.glob("[0-9]*"):
        command = Path("/proc", path.name, "cmdline")
        try:
            if b"fedbench" in command.read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


def _end_orphans(pids: Path) -> None:
    """End ranks that outlived the launcher: politely, then not."""
    left = _living(pids)
    if not left:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        end = time.monotonic() + _GRACE_S
        for pid in left:
            _send(pid, number)
        while left and time.monotonic() < end:
            time.sleep(0.05)
            left = _living(pids)


def _send(pid: int, number: int, by: Callable[[int, int], None] = os.kill) -> None:
    try:
        by(pid, number)
    except ProcessLookupError:
        return
