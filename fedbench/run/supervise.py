"""`fedbench run -n`: starts `mpirun` on the same command and answers for what becomes of it.

The launcher's status is never trusted alone: the run is done when its file is complete.
"""

from __future__ import annotations

import os
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
from fedbench.run.launch import PIDS_VARIABLE, say

#: What Open MPI's wheel wants from root on a small machine; other launchers ignore them.
LAUNCHER_ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
_GRACE_S = 2.0
_RULE = "-----------------"


def mpirun() -> Path:
    """Return the launcher beside the interpreter; ConfigError where there is none."""
    path = Path(sys.executable).with_name("mpirun")
    if not path.exists():
        raise ConfigError(
            f"-n: there is no mpirun beside {Path(sys.executable).name}. Install one (pip install 'fedbench[mpi]'), "
            f"or start the job with the site's own: mpirun -n RANKS fedbench run JOB."
        )
    return path


def supervise(arguments: Sequence[str], ranks: int, threads: int, is_done: Callable[[], bool]) -> int:
    """Run `fedbench ARGUMENTS` on `ranks` ranks and return the exit code of the whole."""
    launcher = mpirun()
    with tempfile.TemporaryDirectory(prefix="fedbench-") as pids:
        environment = {**LAUNCHER_ENVIRONMENT, **os.environ, PIDS_VARIABLE: pids, "OMP_NUM_THREADS": str(threads)}
        command = [str(launcher), "-n", str(ranks), sys.executable, "-m", "fedbench", *arguments]
        code = _watch(command, environment, Path(pids))
    if code in (EXIT_USER, EXIT_STOPPED):
        return code
    if code == EXIT_OK and not is_done():
        say("the launcher ended with status 0, but there is no complete run file: the run failed.")
        return EXIT_FAILURE
    return code


def _watch(command: Sequence[str], environment: Mapping[str, str], pids: Path) -> int:
    with subprocess.Popen(
        command,
        env=dict(environment),
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        asked = 0

        def on_signal(number: int, frame: FrameType | None) -> None:
            nonlocal asked
            asked += 1
            if asked > 1:
                os.killpg(process.pid, signal.SIGTERM)
                return
            for pid in _living(pids):
                os.kill(pid, signal.SIGUSR2)

        before = {s: signal.signal(s, on_signal) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
        assert process.stderr is not None
        pump = threading.Thread(target=_pass_on, args=(process.stderr,), name="stderr", daemon=True)
        pump.start()
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            _end_orphans(pids)
        pump.join(_GRACE_S)
    return code if code >= 0 else 128 - code


def _pass_on(lines: IO[str]) -> None:
    """Pass the ranks' stderr on; the launcher's own banner is dropped when a cause was printed before it."""
    explained, banner = False, []
    in_banner = False
    for line in lines:
        if line.startswith(_RULE):
            in_banner = not in_banner
            banner.append(line)
        elif in_banner:
            banner.append(line)
        else:
            explained |= line.startswith("fedbench: ")
            sys.stderr.write(line)
            sys.stderr.flush()
    if not explained:
        sys.stderr.writelines(banner)


def _living(pids: Path) -> list[int]:
    """Return the recorded ranks that still run fedbench."""
    found = []
    for path in pids.iterdir():
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


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
