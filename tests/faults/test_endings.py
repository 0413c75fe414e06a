"""Ends that are no crash of a rank: requests to stop, lost launchers, stopped processes, full disks, users' errors.

And runs that are done already, which must not be run again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import mpi
import pytest

from fedbench.base.errors import EXIT_OK, EXIT_STOPPED, EXIT_USER
from fedbench.results import reader
from fedbench.run import supervise

from ledger import Ledger  # isort: skip
from small_job import FAULT_DEADLINE_S, faulty, run_files, strikes, write_job  # isort: skip

pytestmark = [pytest.mark.spmd, pytest.mark.faults]

RANKS = 3
#: Rounds of a job whose every round takes `PAUSE_S`: long enough to be caught in the middle.
LONG = 24
#: `comm.deadline_s` of jobs in which a rank stands still: more than a first round takes on a busy machine. In an
#: agreement ranks other than 0 wait twice as long.
STOPPED_DEADLINE_S = 8.0

#: Tells the only process of a job which rank the fault is for.
ALONE = {"FEDBENCH_FAULT_ALONE": "0"}

Form = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def _needs_launcher() -> None:
    mpi.launcher()


def supervised(job: Path, folder: Path, *more: str) -> list[str]:
    """Return the command line of a job that fedbench starts and supervises."""
    return [mpi.console_script(), "run", str(job), "-n", str(RANKS), "--results", str(folder), *more]


def by_hand(job: Path, folder: Path, *more: str) -> list[str]:
    """Return the command line of a job under the user's own `mpirun`."""
    return mpi.mpirun(RANKS, mpi.console_script(), "run", job, "--results", folder, *more)


def in_the_middle(tmp_path: Path, kind: str = "pause", rank: int = 0, place: str = "rounds") -> mpi.Job:
    """Return a supervised long job that has played a round or more."""
    job, mark = write_job(tmp_path, rounds=LONG), tmp_path / "mark"
    running = mpi.Job(supervised(job, tmp_path), tmp_path / "log", faulty(kind, rank, place, mark))
    running.until(lambda: strikes(mark) >= (3 if place == "rounds" else 1), "it is in the middle")
    return running


def own_lines(ended: mpi.Ended) -> list[str]:
    """Return what fedbench itself said."""
    return [line for line in ended.err.splitlines() if line.startswith("fedbench: ")]


def assert_failed(ended: mpi.Ended, folder: Path, since: float | None = None) -> None:
    """Assert that a job ended as a failure, soon, and left neither a process nor a run file."""
    assert ended.code not in (EXIT_OK, EXIT_USER, EXIT_STOPPED), ended.told()
    assert not ended.left, ended.told()
    assert not run_files(folder), ended.told()
    if since is not None:
        assert ended.ended_at - since < FAULT_DEADLINE_S, ended.told()


def test_stop_request_to_the_supervisor_and_resume(tmp_path: Path) -> None:
    """TERM ends with 85 and a checkpoint; what goes on from it equals the run that was never stopped."""
    running = in_the_middle(tmp_path)
    running.process.send_signal(signal.SIGTERM)
    ended = running.wait()
    assert ended.code == EXIT_STOPPED, ended.told()
    assert not ended.left, ended.told()
    assert not run_files(tmp_path), ended.told()
    assert len(own_lines(ended)) == 1, ended.told()
    assert "stopped after round" in ended.err, ended.told()
    assert "prterun" not in ended.err, ended.told()
    (latest,) = (tmp_path / "ckpt").glob("*/LATEST")
    resumed = mpi.run(supervised(tmp_path / "job.toml", tmp_path, "--resume"), tmp_path / "log2", faulty())
    assert resumed.code == EXIT_OK, resumed.told()
    assert not latest.exists()
    straight = mpi.run(supervised(tmp_path / "job.toml", tmp_path / "straight"), tmp_path / "log3", faulty())
    assert straight.code == EXIT_OK, straight.told()
    found, wanted = (reader.read(Path(e.out.strip())).summary for e in (resumed, straight))
    assert found.run_id == wanted.run_id
    assert found.trajectory_sha256 == wanted.trajectory_sha256
    assert found.weights_sha256 == wanted.weights_sha256


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_other_stop_requests_to_the_supervisor(tmp_path: Path, number: signal.Signals) -> None:
    running = in_the_middle(tmp_path)
    running.process.send_signal(number)
    ended = running.wait()
    assert ended.code == EXIT_STOPPED, ended.told()
    assert not ended.left, ended.told()
    assert list((tmp_path / "ckpt").glob("*/LATEST")), ended.told()
    assert "Traceback" not in ended.err, ended.told()


def test_stop_request_to_one_rank_by_hand(tmp_path: Path) -> None:
    """USR2 to any rank under the user's own `mpirun` stops all of them at the same round."""
    job, mark = write_job(tmp_path, rounds=LONG), tmp_path / "mark"
    running = mpi.Job(by_hand(job, tmp_path), tmp_path / "log", faulty("pause", 0, "rounds", mark))
    running.until(lambda: strikes(mark) >= 3, "it is in the middle")
    os.kill(running.ranks()[2], signal.SIGUSR2)
    ended = running.wait()
    assert ended.code == EXIT_STOPPED, ended.told()
    assert not ended.left, ended.told()
    assert list((tmp_path / "ckpt").glob("*/LATEST")), ended.told()


def test_stop_request_while_ranks_are_starting(tmp_path: Path) -> None:
    """A request that comes before any rank can take it is not lost."""
    job = write_job(tmp_path, rounds=LONG)
    running = mpi.Job(supervised(job, tmp_path), tmp_path / "log", faulty("pause", 0, "rounds"))
    running.until(lambda: bool(running.launchers()), "the launcher runs")
    running.process.send_signal(signal.SIGTERM)
    ended = running.wait()
    assert ended.code == EXIT_STOPPED, ended.told()
    assert "stopped after round 1;" in ended.err, ended.told()
    assert not ended.left, ended.told()


@pytest.mark.parametrize("place", ["import", "build"])
def test_stop_request_while_one_process_is_starting(tmp_path: Path, place: str) -> None:
    job, mark = write_job(tmp_path, rounds=LONG), tmp_path / "mark"
    command = [mpi.console_script(), "run", str(job), "--results", str(tmp_path)]
    running = mpi.Job(command, tmp_path / "log", {**faulty("note", 0, place, mark), **ALONE})
    running.until(lambda: bool(strikes(mark)), "it is starting")
    running.process.send_signal(signal.SIGTERM)
    ended = running.wait()
    assert ended.code == EXIT_STOPPED, ended.told()
    assert "stopped after round 1;" in ended.err, ended.told()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_request_ends_one_process_at_once(tmp_path: Path, number: signal.Signals) -> None:
    """The first is a request that a run in the middle of a round can't follow yet; USR2 after it asks no louder."""
    job, mark = write_job(tmp_path, rounds=LONG), tmp_path / "mark"
    command = [mpi.console_script(), "run", str(job), "--results", str(tmp_path)]
    running = mpi.Job(command, tmp_path / "log", {**faulty("hang", 0, "round", mark), **ALONE})
    running.until(lambda: bool(strikes(mark)), "it hangs")
    for first in (number, signal.SIGUSR2):
        running.process.send_signal(first)
        time.sleep(0.5)
        assert running.process.poll() is None
    running.process.send_signal(number)
    ended = running.wait(deadline_s=20.0)
    assert ended.code == -number, ended.told()
    assert not run_files(tmp_path)


def test_signals_that_come_together_do_not_hang_the_supervisor() -> None:
    """A request is passed on by a script while the batch system sends TERM: the second comes while the first is handled."""
    watched = """
import os, signal, sys, tempfile, threading
from pathlib import Path
from fedbench.run import supervise

start = threading.Thread.start

def struck(thread):
    if sys._getframe(1).f_code.co_name == "on_signal":
        threading.Thread.start = start
        os.kill(os.getpid(), signal.SIGUSR2)
    start(thread)

threading.Thread.start = struck
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
with tempfile.TemporaryDirectory() as pids:
    sys.exit(supervise._watch(["sleep", "1.5"], dict(os.environ), Path(pids)))
"""
    ended = subprocess.run([sys.executable, "-c", watched], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == EXIT_OK, ended.stderr
    assert not ended.stderr


def test_ranks_that_fail_in_mpi_init_end_the_job(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    ended = mpi.run(supervised(job, tmp_path), tmp_path / "log", {**faulty(), "OMPI_MCA_pml": "none-of-this-name"})
    assert ended.code not in (EXIT_OK, EXIT_STOPPED, EXIT_USER), ended.told()
    assert "An error occurred in MPI_Init" in ended.err, ended.told()
    assert "Traceback" not in ended.err, ended.told()
    assert not ended.left, ended.told()


def test_a_launcher_that_goes_on_without_ranks_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Open MPI's, on a busy machine, waits for ever where MPI_Init fails, and does not follow TERM."""
    monkeypatch.setattr(supervise, "_LOST_S", 0.5)
    monkeypatch.setattr(supervise, "_GRACE_S", 0.5)
    (tmp_path / "999999999").touch()  # what a rank left that is gone
    since = time.monotonic()
    code = supervise._watch(["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"], dict(os.environ), tmp_path)
    assert code == 128 + signal.SIGKILL
    assert time.monotonic() - since < 20.0
    told = capfd.readouterr().err
    assert "no rank has been there for 0.5 s, but the launcher goes on: it is ended." in told


def test_second_request_ends_at_once(tmp_path: Path) -> None:
    """A rank that never comes to the end of its round doesn't keep the others."""
    running = in_the_middle(tmp_path, "hang", 1, "round")
    running.process.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    assert running.process.poll() is None
    since = time.time()
    running.process.send_signal(signal.SIGTERM)
    assert_failed(running.wait(), tmp_path, since)


def test_killed_launcher_leaves_no_ranks(tmp_path: Path) -> None:
    running = in_the_middle(tmp_path)
    (launcher,) = running.launchers()
    assert len(running.ranks()) == RANKS
    since = time.time()
    os.kill(launcher, signal.SIGKILL)
    assert_failed(running.wait(), tmp_path, since)


class Standstill(NamedTuple):
    """One job in which a rank is stopped without dying: which one, where, under which form of launch."""

    form: Form
    rank: int
    place: str


STANDSTILLS = {
    "supervised-rank0-round": Standstill(supervised, 0, "round"),
    "supervised-rank1-round": Standstill(supervised, 1, "round"),
    "supervised-rank0-agreement": Standstill(supervised, 0, "agree"),
    "supervised-rank1-agreement": Standstill(supervised, 1, "agree"),
    "by-hand-rank1-round": Standstill(by_hand, 1, "round"),
}


def stand_still(cell: Standstill, folder: Path) -> tuple[mpi.Ended, Path]:
    """Return what became of the job of a cell, and its folder."""
    job = write_job(folder, deadline_s=STOPPED_DEADLINE_S)
    environment = faulty("stop", cell.rank, cell.place, folder / "mark")
    return mpi.run(cell.form(job, folder), folder / "log", environment), folder


@pytest.fixture(scope="module")
def stopped_jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[tuple[mpi.Ended, Path]]]]:
    """Start the jobs with a stopped rank, two at a time, since they mostly wait."""
    folder = tmp_path_factory.mktemp("stopped")
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(stand_still, cell, folder / name) for name, cell in STANDSTILLS.items()}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", STANDSTILLS)
def test_stopped_rank_is_named_after_the_deadline(
    stopped_jobs: dict[str, Future[tuple[mpi.Ended, Path]]], name: str, ledger: Ledger
) -> None:
    """A rank that is stopped without dying (SIGSTOP, swap) is missed, and the job ends."""
    (ended, folder), cell = stopped_jobs[name].result(), STANDSTILLS[name]
    told = any("WireError: After " in line for line in own_lines(ended))
    noticed = ended.code not in (EXIT_OK, EXIT_USER, EXIT_STOPPED) and not ended.left
    ledger.note("SIGSTOP of a rank", noticed=noticed, cause=told, counted=len(run_files(folder)))
    assert strikes(folder / "mark") == 1, ended.told()
    assert_failed(ended, folder, float((folder / "mark").read_text()) + 2 * STOPPED_DEADLINE_S)
    causes = [line for line in own_lines(ended) if "WireError: After " in line]
    assert causes, ended.told()
    missing = {("round", 1): "device 0 (rank 1 on ", ("agree", 1): "rank 1 on "}.get(
        (cell.place, cell.rank), "rank 0 on "
    )
    assert missing in causes[0].partition("WireError: After ")[2], ended.told()


def test_full_disk_at_the_end_is_a_failure(tmp_path: Path) -> None:
    """Device ranks have left by then: the error of rank 0 alone must make the whole a failure."""
    mark = tmp_path / "mark"
    ended = mpi.run(supervised(write_job(tmp_path), tmp_path), tmp_path / "log", faulty("full", 0, "write", mark))
    assert strikes(mark) == 1
    assert_failed(ended, tmp_path)
    assert "fedbench: rank 0 on " in ended.err, ended.told()
    assert "No space left on device" in ended.err, ended.told()


@pytest.mark.parametrize(
    ("kind", "place"), [("raise", "build"), ("exit0", "build"), ("_exit0", "build"), ("raise", "import")]
)
def test_rank_that_dies_before_the_first_message(tmp_path: Path, kind: str, place: str) -> None:
    mark = tmp_path / "mark"
    ended = mpi.run(supervised(write_job(tmp_path), tmp_path), tmp_path / "log", faulty(kind, 1, place, mark))
    assert strikes(mark) == 1
    assert_failed(ended, tmp_path, float(mark.read_text()))


def test_launcher_speaks_where_nobody_else_does(tmp_path: Path) -> None:
    """News of fedbench's own don't hide the launcher's words on a killed rank."""
    command = supervised(write_job(tmp_path), tmp_path, "--resume")
    ended = mpi.run(command, tmp_path / "log", faulty("kill9", 1))
    assert_failed(ended, tmp_path)
    assert "starting fresh" in ended.err, ended.told()
    assert "signal 9" in ended.err, ended.told()


USER_ERRORS = {
    "unknown key": (["--set", "run.round=3"], "run.round: unknown key."),
    "wrong value": (["--set", "federation.devices=0"], "federation.devices: found 0;"),
    "no such data": (["--set", "data.private=/nowhere/at/all"], "/nowhere/at/all"),
    "no such model": (["--set", "model.name=/nowhere/at/all"], "/nowhere/at/all"),
    "method and model": (["--set", "method.name=fedspzo", "--set", "model.trainable=head"], "fedspzo"),
}


def forms_and_errors() -> list[object]:
    """Return all forms with all errors; two of them under the user's own `mpirun` do for the default run."""
    quick = {(by_hand, "unknown key"), (by_hand, "no such data")} | {(supervised, error) for error in USER_ERRORS}
    return [
        pytest.param(form, error, marks=() if (form, error) in quick else (pytest.mark.slow,))
        for form in (supervised, by_hand)
        for error in USER_ERRORS
    ]


@pytest.mark.parametrize(("form", "error"), forms_and_errors())
def test_users_error_is_one_message(tmp_path: Path, form: Form, error: str) -> None:
    more, words = USER_ERRORS[error]
    ended = mpi.run(form(write_job(tmp_path), tmp_path, *more), tmp_path / "log", faulty())
    assert_users_error(ended, tmp_path, words)


def test_users_error_of_one_rank_is_agreed_on(tmp_path: Path) -> None:
    """A data set that one host alone lacks: all ranks leave with the code of a user's error, and one speaks."""
    ended = mpi.run(by_hand(write_job(tmp_path), tmp_path), tmp_path / "log", faulty("user", 2, "build"))
    assert_users_error(ended, tmp_path, "this rank alone finds no data")


def test_a_checkpoint_of_another_format_is_the_users_error_on_all_ranks(tmp_path: Path) -> None:
    """Rank 0 alone reads it; all leave with the code of a user's error, and one speaks."""
    running = in_the_middle(tmp_path)
    running.process.send_signal(signal.SIGTERM)
    assert running.wait().code == EXIT_STOPPED
    (latest,) = (tmp_path / "ckpt").glob("*/LATEST")
    path = latest.with_name(f"{latest.read_text()}.json")
    head = json.loads(path.read_text())["head"] | {"format": 1}
    digest = hashlib.sha256(json.dumps(head).encode()).hexdigest()
    path.write_text(json.dumps({"head_sha256": digest, "head": head}))
    ended = mpi.run(supervised(tmp_path / "job.toml", tmp_path, "--resume"), tmp_path / "log2", faulty())
    assert_users_error(ended, tmp_path, "checkpoint format 1; this version reads 3")


def test_a_second_job_at_the_same_run_is_refused(tmp_path: Path) -> None:
    """What a killed supervisor left may still be at work: the run has one writer, and the second one ends at once."""
    job, mark = write_job(tmp_path, rounds=2000), tmp_path / "mark"
    running = mpi.Job(supervised(job, tmp_path), tmp_path / "log", faulty("note", 0, "rounds", mark))
    running.until(lambda: strikes(mark) >= 1, "it is in the middle")
    second = mpi.run(supervised(job, tmp_path, "--resume"), tmp_path / "log2", faulty())
    assert_users_error(second, tmp_path, "another process is at ")
    assert re.search(rf"\(pid {running.ranks()[0]} on ", second.err), second.told()
    assert running.process.poll() is None
    running.kill()


def assert_users_error(ended: mpi.Ended, folder: Path, words: str) -> None:
    """Assert exit 2 and exactly one line of fedbench's own, which has `words`."""
    assert ended.code == EXIT_USER, ended.told()
    assert not ended.left, ended.told()
    (line,) = own_lines(ended)
    assert words in line, ended.told()
    assert "Traceback" not in ended.err, ended.told()
    assert ended.out == "", ended.told()
    assert not run_files(folder)


def test_done_run_prints_its_path(tmp_path: Path) -> None:
    """Whatever the form, a run that is done is not touched; a damaged file in its place is put aside."""
    job = write_job(tmp_path)
    first = mpi.run(supervised(job, tmp_path), tmp_path / "log", faulty())
    assert first.code == EXIT_OK, first.told()
    (path,) = run_files(tmp_path)
    written = path.stat().st_mtime_ns
    for form in (supervised, by_hand):
        again = mpi.run(form(job, tmp_path), tmp_path / form.__name__, faulty("raise", 1))
        assert again.code == EXIT_OK, again.told()
        assert again.out == f"{path}\n", again.told()
        assert path.stat().st_mtime_ns == written
    path.write_bytes(path.read_bytes()[:-100])
    anew = mpi.run(by_hand(job, tmp_path), tmp_path / "anew", faulty())
    assert anew.code == EXIT_OK, anew.told()
    assert "is not a complete run; it was moved to" in anew.err, anew.told()
    assert reader.read(path).summary.complete
    assert [p.parent.name for p in run_files(tmp_path)].count("bad") == 1


def test_alone_on_one_rank_a_stop_request_is_kept_too(tmp_path: Path) -> None:
    """No launcher at all: the same codes, the same checkpoint."""
    job = write_job(tmp_path, rounds=2000)
    command = [sys.executable, "-m", "fedbench", "run", str(job), "--results", str(tmp_path)]
    running = mpi.Job(command, tmp_path / "log", faulty())
    running.until(lambda: "start, dev accuracy" in running.err, "it has started")
    running.process.send_signal(signal.SIGINT)
    ended = running.wait()
    assert ended.code == EXIT_STOPPED, ended.told()
    assert list((tmp_path / "ckpt").glob("*/LATEST")), ended.told()
