"""Entering and leaving the world: how many ranks there must be, MPI started by hand, and no failure left silent.

Whatever one rank dies of, all ranks end, with a non-zero status and a printed cause. A
good run never ends by an abort.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

from fedbench.base.errors import (
    EXIT_FAILURE,
    EXIT_OK,
    EXIT_STOPPED,
    ConfigError,
    FedbenchError,
    NumericsError,
    WireError,
)
from fedbench.comm.base import Transport
from fedbench.comm.loopback import Loopback

#: What launchers tell about the size of the world, in the order in which they are believed.
SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")

#: Where ranks leave their process ids for the supervisor.
PIDS_VARIABLE = "FEDBENCH_PIDS"

#: The file by which the first rank tells a supervisor of srun that all ranks agreed to stop.
STOP_NOTE_VARIABLE = "FEDBENCH_STOP_NOTE"

#: The name that a run must have: who planned it may have been another version of fedbench.
RUN_ID_VARIABLE = "FEDBENCH_RUN_ID"

#: Names the signal that asks ranks to stop, where a library on the site has taken USR2 for itself.
RANK_SIGNAL_VARIABLE = "FEDBENCH_SLURM_RANK_SIGNAL"

#: Signals that ask for an agreed stop, in any rank and (beside them) in a run of one process.
STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
ALONE_SIGNALS = (signal.SIGINT, signal.SIGUSR1)


#: What marks a line for people as fedbench's own.
SAID = "fedbench: "

#: Open MPI's own handler for crashes allocates memory while it prints, so that a rank with a damaged heap
#: hangs in it for ever; without it the rank dies at once and the launcher ends the others.
_NO_CRASH_HANDLER = ("OMPI_MCA_opal_signal", "")

#: Requests to stop that came before a StopFlag listened.
_early_stops: list[int] = []

#: What the launcher gets to pass a printed cause on, before the abort ends it.
_FORWARD_S = 0.2

#: How long an abort may take before the rank leaves without MPI's help.
_ABORT_S = 2.0


def say(line: str) -> None:
    """Print a line for people, marked as fedbench's own, at once."""
    sys.stderr.write(f"{SAID}{line}\n")
    sys.stderr.flush()


def launched_size() -> int | None:
    """Return the world size that a launcher announces, or None without a launcher."""
    for name in SIZE_VARIABLES:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return None


def launched_rank() -> int:
    """Return this process's rank by the launcher's word, before MPI is started; 0 without a launcher."""
    return next((int(os.environ[name]) for name in _RANK_VARIABLES if os.environ.get(name, "").isdigit()), 0)


def enter(expected: int | None) -> Transport:
    """Return the transport of this process; WireError where the world has another size than it must have."""
    launched = launched_size()
    if launched is None:
        return Loopback()
    keep_early_stops()
    _leave_pid()
    os.environ.setdefault(*_NO_CRASH_HANDLER)
    faulthandler.enable()
    must = launched if expected is None else expected
    import mpi4py

    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    from mpi4py import MPI

    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    size = MPI.COMM_WORLD.Get_size()
    if size != must:
        message = (
            f"the world has {size} rank(s), expected {must}. "
            + ("The launcher and mpi4py's MPI library don't fit each other: " if size == 1 else "")
            + f"library: {_library(MPI)}."
        )
        if launched_rank() == 0 or size > 1:
            raise WireError(message)
        raise SystemExit(EXIT_FAILURE)
    from fedbench.comm.mpi import MpiTransport

    return MpiTransport(MPI.COMM_WORLD)


def keep_early_stops() -> None:
    """Keep a stop signal that comes from now on for the StopFlag that listens next.

    One that came before, while its starter had it blocked for this process, comes now.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: _early_stops.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def rank_signal() -> signal.Signals:
    """Return what asks a rank to stop: USR2, or TERM where the site says so because a library has taken USR2."""
    named = os.environ.get(RANK_SIGNAL_VARIABLE, "") or "USR2"
    found = {number.name.removeprefix("SIG"): number for number in STOP_SIGNALS}.get(named)
    if found is None:
        raise ConfigError(f"{RANK_SIGNAL_VARIABLE}: found {named!r}; allowed: USR2 or TERM.")
    return found


def early_stop() -> bool:
    """Return whether a request to stop came before anyone listened, and forget it."""
    found = bool(_early_stops)
    _early_stops.clear()
    return found


def code_for_launcher(code: int) -> int:
    """Return the status that this rank leaves with, where `code` is what all ranks agreed on.

    srun ends the others at the first status that is not 0 (it must, or they would wait for a dead rank for ever), so
    under a supervisor of srun an agreed stop leaves a note and the status 0.
    """
    note = os.environ.get(STOP_NOTE_VARIABLE)
    if code != EXIT_STOPPED or not note:
        return code
    if launched_rank() == 0:
        _touch(note)
    return EXIT_OK


def library(transport: Transport) -> str:
    """Return the MPI library's own words, or 'none' in one process."""
    if isinstance(transport, Loopback):
        return "none (one process)"
    from mpi4py import MPI

    return _library(MPI)


class StopFlag:
    """Set by a signal, read at round boundaries. In one process the second INT or TERM ends it at once.

    `longest_s` is the longest time between two looks, evaluation included: what a request may have to wait.
    """

    def __init__(self) -> None:
        self._set = self._alone = False
        self._urged: list[int] = []
        self._looked_s = time.monotonic()
        self.longest_s = 0.0

    def listen(self, *, alone: bool) -> None:
        """Take the stop signals from now on, and one that this rank got while it was starting."""
        self._alone = alone
        for number in (*STOP_SIGNALS, *(ALONE_SIGNALS if alone else ())):
            signal.signal(number, self._on_signal)
        self._set |= early_stop()

    def __call__(self) -> bool:
        now_s = time.monotonic()
        self.longest_s, self._looked_s = max(self.longest_s, now_s - self._looked_s), now_s
        return self._set

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._set = True
        if self._alone and number in (signal.SIGINT, signal.SIGTERM):
            self._urged.append(number)
            if len(self._urged) > 1:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)


def guard(transport: Transport, body: Callable[[], int], where: Callable[[], str]) -> int:
    """Return the code that all ranks agreed on; anything else that ends `body` ends the world.

    `where` tells the place in the run. In one process an error of the user's kind keeps
    its exit code and prints one line.
    """
    alone = transport.size == 1

    def end(cause: str, trace: str, code: int) -> int:
        """Say why this rank ends, and end the others with it."""
        say(f"{transport.name_of(transport.rank)}, {where()}: {cause}" + (f"\n{trace.rstrip()}" if trace else ""))
        if not isinstance(transport, Loopback):
            if threading.current_thread() is threading.main_thread():  # else the run would go on meanwhile
                time.sleep(_FORWARD_S)
            _abort(code)
        return code

    def on_thread(args: threading.ExceptHookArgs) -> None:
        trace = "".join(traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback))
        name = args.thread.name if args.thread else "unknown"
        end(f"thread {name} died of {args.exc_type.__name__}: {args.exc_value}", trace, EXIT_FAILURE)
        os._exit(EXIT_FAILURE)

    threading.excepthook = on_thread
    try:
        code = body()
    except FedbenchError as error:
        if alone:
            # A divergence is a result, and who reads the log knows it by its name.
            say(f"NumericsError: {error}" if isinstance(error, NumericsError) else str(error))
            return error.exit_code
        return end(f"{type(error).__name__}: {error}", "", EXIT_FAILURE)
    except SystemExit as error:
        return end(f"left by SystemExit({error.code!r}), which no other rank agreed to", "", EXIT_FAILURE)
    except BaseException as error:
        return end(f"{type(error).__name__}: {error}", traceback.format_exc(), EXIT_FAILURE)
    leave(transport)
    return code


def leave(transport: Transport) -> None:
    """End MPI in good order."""
    if isinstance(transport, Loopback):
        return
    from mpi4py import MPI

    MPI.Finalize()


def _abort(code: int) -> None:
    """Abort the world; where MPI itself hangs over it (another thread may be inside), this rank leaves on its own."""
    from mpi4py import MPI

    sys.stdout.flush()
    way_out = threading.Timer(_ABORT_S, os._exit, (code or EXIT_FAILURE,))
    way_out.daemon = True
    way_out.start()
    MPI.COMM_WORLD.Abort(code or EXIT_FAILURE)


def _library(mpi: Any) -> str:
    return str(mpi.Get_library_version()).strip("\0\n ").splitlines()[0]


def _leave_pid() -> None:
    folder = os.environ.get(PIDS_VARIABLE)
    if folder and os.path.isdir(folder):
        _touch(os.path.join(folder, str(os.getpid())))


def _touch(path: str) -> None:
    with open(path, "w", encoding="ascii"):
        return
