"""Sweeps on a real Slurm: stopped, requeued, killed, out of time, started by each launcher; in the end nothing is lost."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import cluster
import pytest

pytestmark = pytest.mark.slurm

#: Rounds of the lines of the array, and what becomes of each: 0 runs out of time, 1 is requeued by hand, 2 is killed.
ROUNDS = (180, 60, 61, 20)

#: Launchers beside mpirun, which the array has.
LAUNCHERS = ("srun-pmix", "srun-pmi2")


def python_of(launcher: str) -> str:
    """Return the interpreter whose MPI library `launcher` can start; skip where there is none."""
    if launcher != "srun-pmi2":
        return sys.executable
    found = os.environ.get("FEDBENCH_MPICH_PYTHON", "")
    if not found:
        pytest.skip("srun --mpi=pmi2 starts MPICH; FEDBENCH_MPICH_PYTHON names no interpreter that has it")
    return found


@pytest.fixture(scope="module", autouse=True)
def _slurm() -> Iterator[None]:
    cluster.require()
    yield
    cluster.cancel_all()


@pytest.fixture(scope="module")
def array(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the sweep of ROUNDS and its array, sent before anything else is asked of Slurm."""
    folder = tmp_path_factory.mktemp("array")
    sweep = cluster.make(folder, "sweep", "--grid", f"run.rounds={','.join(map(str, ROUNDS))}")
    (folder / "site.env").write_text("FEDBENCH_SLURM_TIME=10\nFEDBENCH_SLURM_WARN_S=20\n")
    job = cluster.array_of(cluster.fedbench("sweep", "submit", "sweep", "--parallel", "2", folder=folder))
    cluster.limit(f"{job}_0", minutes=1)
    return sweep, job


@pytest.fixture(scope="module")
def hand(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the trajectory of JOB, made by hand."""
    folder = tmp_path_factory.mktemp("hand")
    (config,) = cluster.configs(cluster.make(folder, "sweep")).values()
    return cluster.by_hand(folder, config, "job")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_warning_stops_a_run_and_its_task_requeues_itself(
    array: tuple[Path, str], hand: str, tmp_path: Path, launcher: str
) -> None:
    """Slurm's warning goes to the batch shell alone, here by scancel; the run is made by that launcher both times."""
    python = python_of(launcher)
    sweep = cluster.make(tmp_path, "sweep", "--set", f"run.launcher={launcher}", python=python)
    job = cluster.array_of(cluster.fedbench("sweep", "submit", "sweep", folder=tmp_path, python=python))
    cluster.until(lambda: "start, dev" in cluster.log(sweep, 0), "the run starts", sweep)
    cluster.slurm("scancel", "--batch", "--signal=USR1", f"{job}_0")
    cluster.until(lambda: cluster.over(job), "the array is over", sweep)
    told = cluster.log(sweep, 0)
    assert "0| fedbench: task ended: stopped: requeued for restart 1" in told, told
    assert "1| fedbench: task ended: done" in told, told
    cluster.until(lambda: (sweep / "all.h5").exists(), "the collecting job has run", sweep)
    assert list(cluster.trajectories(sweep / "all.h5").values()) == [hand]


def test_an_array_with_a_kill_a_requeue_and_no_time_is_completed_and_nothing_is_lost(array: tuple[Path, str]) -> None:
    sweep, job = array
    folder, run_ids = sweep.parent, list(cluster.configs(sweep))
    again = cluster.fedbench("sweep", "submit", "sweep", folder=folder)
    assert "0 of 4 run(s) sent" in again, "what waits or runs was sent twice"
    for line, words in ((1, ("scontrol", "requeue")), (2, ("scancel", "--full", "--signal=KILL"))):
        cluster.until(lambda line=line: "start, dev" in cluster.log(sweep, line), f"line {line} starts", sweep)
        cluster.slurm(*words, f"{job}_{line}")
    cluster.until(
        lambda: "1| fedbench: task starts" in cluster.log(sweep, 0), "what is out of time starts again", sweep
    )
    cluster.limit(f"{job}_0", minutes=10)
    cluster.until(lambda: cluster.over(job), "the array is over", sweep)

    assert "0| fedbench: task ended: stopped: requeued for restart 1" in cluster.log(sweep, 0)
    assert "1| fedbench: task starts" in cluster.log(sweep, 1), "the requeued run was not started again"
    before = cluster.status(sweep)
    assert before["runs"][2]["state"] == "failed", before
    assert before["runs"][2]["reason"].startswith("killed; it last said: "), before
    assert before["done"] + before["failed"] + before["resumable"] + before["missing"] == 4

    left = sum(run["state"] != "done" for run in before["runs"])
    told = cluster.fedbench("sweep", "submit", "sweep", folder=folder)
    assert f"{left} of 4 run(s) sent" in told
    second = cluster.array_of(told)
    cluster.until(lambda: cluster.over(second), "the second array is over", sweep)
    cluster.until(lambda: cluster.status(sweep)["done"] == 4, "all runs are done", sweep)
    assert "0 of 4 run(s) sent" in cluster.fedbench("sweep", "submit", "sweep", folder=folder)

    cluster.fedbench("sweep", "collect", "sweep", folder=folder)
    collected = cluster.trajectories(sweep / "all.h5")
    assert sorted(collected) == sorted(run_ids), "a run is lost, or counted twice"
    for run_id, config in cluster.configs(sweep).items():
        assert collected[run_id] == cluster.by_hand(folder, config, run_id), run_id
