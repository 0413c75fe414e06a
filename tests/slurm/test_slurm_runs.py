"""Sweeps and single runs on a real Slurm: stopped, requeued, killed, out of time, by each launcher; nothing is lost."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import cluster
import mpi
import pytest

from fedbench.results import reader

pytestmark = pytest.mark.slurm

#: Rounds of the lines of the array, and what becomes of each: 0 runs out of time, 1 is requeued by hand, 2 is killed.
ROUNDS = (180, 60, 61, 20)

#: Launcher beside mpirun (which the array has) -> the interpreter whose MPI library it can start.
PYTHONS = {"srun-pmix": sys.executable, "srun-pmi2": mpi.MPICH_PYTHON}


@pytest.fixture(scope="module", autouse=True)
def _slurm() -> Iterator[None]:
    cluster.require()
    yield
    cluster.cancel_all()


@pytest.fixture(scope="module")
def hung(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the sweep of one run that hangs in its second round, past a minute of time, and its array."""
    folder = tmp_path_factory.mktemp("hung")
    sweep = cluster.make(folder, "sweep")
    (folder / "site.env").write_text("FEDBENCH_SLURM_TIME=1\nFEDBENCH_SLURM_WARN_S=20\n")
    return sweep, cluster.array_of(cluster.fedbench("sweep", "submit", "sweep", folder=folder, fault="hang:0:round"))


def test_an_array_with_a_kill_a_requeue_and_no_time_is_completed_and_nothing_is_lost(
    tmp_path: Path, hung: tuple[Path, str]
) -> None:
    folder = tmp_path
    sweep = cluster.make(folder, "sweep", "--grid", f"run.rounds={','.join(map(str, ROUNDS))}")
    run_ids = list(cluster.configs(sweep))
    (folder / "site.env").write_text("FEDBENCH_SLURM_TIME=10\nFEDBENCH_SLURM_WARN_S=20\n")
    job = cluster.array_of(cluster.fedbench("sweep", "submit", "sweep", folder=folder))
    cluster.limit(f"{job}_0", minutes=1)
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
    assert "; it last said: " in before["runs"][2]["reason"], before
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


def test_a_run_that_hangs_past_its_time_is_ended_told_as_such_and_made_by_the_next_submit(
    hung: tuple[Path, str],
) -> None:
    """It can't follow the warning, so Slurm ends it the hard way; the array test before this one runs meanwhile."""
    sweep, job = hung
    cluster.until(lambda: cluster.over(job), "Slurm ends the run", sweep)
    (run,) = cluster.status(sweep)["runs"]
    assert run["state"] == "failed", run
    assert "DUE TO TIME LIMIT" in run["reason"], run
    assert not list(sweep.glob("runs/*")), "a run that was cut off left a run file"
    again = cluster.array_of(cluster.fedbench("sweep", "submit", "sweep", folder=sweep.parent))
    cluster.until(lambda: cluster.over(again), "the second array is over", sweep)
    assert cluster.status(sweep)["done"] == 1


@pytest.fixture(scope="module")
def hand(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the trajectory of JOB, made by hand."""
    folder = tmp_path_factory.mktemp("hand")
    (config,) = cluster.configs(cluster.make(folder, "sweep")).values()
    return cluster.by_hand(folder, config, "job")


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Return launcher -> the sweep of one run that it makes, and its array, and the same of `single`, a run without one.

    All are sent together to save time, and each is warned when it has started.
    """
    found = {}
    for launcher, python in PYTHONS.items():
        if Path(python).exists():
            folder = tmp_path_factory.mktemp(launcher)
            sweep = cluster.make(folder, "sweep", "--set", f"run.launcher={launcher}", python=python)
            told = cluster.fedbench("sweep", "submit", "sweep", folder=folder, python=python)
            found[launcher] = sweep, cluster.array_of(told)
    folder = tmp_path_factory.mktemp("single")
    found["single"] = folder, cluster.single(folder)
    for name, (sweep, job) in found.items():
        cluster.until(lambda sweep=sweep: "start, dev" in cluster.log(sweep, 0), "the run starts", sweep)
        cluster.slurm("scancel", "--batch", "--signal=USR1", job if name == "single" else f"{job}_0")
    return found


@pytest.mark.parametrize("launcher", PYTHONS)
def test_a_warning_stops_a_run_of_srun_and_its_task_requeues_itself(
    sent: dict[str, tuple[Path, str]], hand: str, launcher: str
) -> None:
    """Slurm's warning goes to the batch shell alone, here by scancel; srun makes the run both times."""
    mpi.launcher(PYTHONS[launcher])
    sweep, job = sent[launcher]
    cluster.until(lambda: cluster.over(job), "the array is over", sweep)
    told = cluster.log(sweep, 0)
    assert "0| fedbench: task ended: stopped: requeued for restart 1" in told, told
    assert "1| fedbench: task ended: done" in told, told
    cluster.until(lambda: (sweep / "all.h5").exists(), "the collecting job has run", sweep)
    assert list(cluster.trajectories(sweep / "all.h5").values()) == [hand]


def test_a_run_without_a_sweep_that_is_warned_requeues_itself_and_ends_as_made_by_hand(
    sent: dict[str, tuple[Path, str]], hand: str
) -> None:
    folder, job = sent["single"]
    cluster.until(lambda: cluster.over(job), "the job is over", folder)
    told = cluster.log(folder, 0)
    assert "0| fedbench: task ended: stopped: requeued for restart 1" in told, told
    assert "1| fedbench: task ended: done" in told, told
    (path,) = (folder / "results" / "runs").glob("*.h5")
    assert reader.read(path).summary.trajectory_sha256 == hand
