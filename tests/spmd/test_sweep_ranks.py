"""A sweep over ranks on this machine: several ranks are launched, one runs in a worker, and both give the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedbench.batch import local, sweep
from fedbench.batch.manifest import Sweep
from fedbench.results import reader

pytestmark = pytest.mark.spmd

JOB = """
method = { name = "fedmezo" }
run = { rounds = 2, eval_every = 100 }
federation = { devices = 3, batch_size = 2 }
model = { trainable = "head" }
data = { public_per_class = 4 }
"""


def test_lines_of_one_and_of_two_ranks_are_both_run_and_a_divergence_is_told_from_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # there is no srun
    job = tmp_path / "job.toml"
    job.write_text(JOB)
    srun = {"run.ranks": 2, "run.launcher": "srun-pmix"}  # it is for Slurm, and names no run
    arms = [{"run.ranks": 1}, srun, {"run.ranks": 2, "method.lr": 1e30, "run.rounds": 4}]
    swept = sweep.make(job, arms, [], None, tmp_path / "out")
    results = local.run_local(swept, 1)
    assert [outcome.state for outcome in results.outcomes] == ["done", "done", "diverged"], results
    one, two = (reader.read(swept.run_file(line)).summary for line in swept.lines[:2])
    assert (one.ranks, two.ranks) == (1, 2)
    assert one.trajectory_sha256 == two.trajectory_sha256
    assert "not a finite number" in results.outcomes[2].reason
    assert not results.failed


def until(met: Callable[[], bool], what: str) -> None:
    """Return when something holds; fail after a minute and a half."""
    end = time.monotonic() + 90
    while not met():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.1)


def started(tmp_path: Path) -> tuple[Sweep, subprocess.Popen[bytes]]:
    """Return a sweep of one long run of two ranks, and the submit that is at it."""
    job = tmp_path / "job.toml"
    job.write_text(JOB)
    swept = sweep.make(job, [{"run.ranks": 2, "run.rounds": 4000}], [], None, tmp_path / "out")
    words = [sys.executable, "-m", "fedbench", "sweep", "submit", str(swept.folder), "--local"]
    submit = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = swept.log(swept.lines[0])
    until(lambda: log.exists() and "start, dev" in log.read_text(), "the run starts")
    return swept, submit


def state(swept: Sweep) -> str:
    """Return the state of the only run."""
    return sweep.states(swept)[0].state


def test_a_run_of_two_ranks_stops_when_its_submit_is_killed_and_is_not_started_twice(tmp_path: Path) -> None:
    swept, submit = started(tmp_path)
    submit.kill()
    submit.wait()
    assert state(swept) == "running"
    assert local.run_local(swept).outcomes == ()
    until(lambda: state(swept) != "running", "the run ends")
    assert state(swept) == "resumable"
    assert "stopped after round" in swept.log(swept.lines[0]).read_text()


def child_of(pid: int) -> int:
    """Return the only child of a process."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())


def test_a_lease_lives_as_long_as_ranks_do(tmp_path: Path) -> None:
    """Submit and supervisor are killed: nobody is left to stop the ranks, so the launcher holds the lease."""
    swept, submit = started(tmp_path)
    threads = [int(task.name) for task in Path(f"/proc/{submit.pid}/task").iterdir()]
    children = [Path(f"/proc/{submit.pid}/task/{thread}/children").read_text() for thread in threads]
    supervisor = int("".join(children))
    launcher = child_of(supervisor)
    try:
        os.kill(supervisor, signal.SIGSTOP)
        submit.kill()
        submit.wait()
        os.kill(supervisor, signal.SIGKILL)
        time.sleep(1)
        assert state(swept) == "running"
    finally:
        os.kill(launcher, signal.SIGTERM)
    until(lambda: state(swept) != "running", "the lease is free")
