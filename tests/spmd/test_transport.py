"""The MPI transport and the star on real ranks: sizes, deadlines, agreement, and worlds of the wrong size."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import mpi
import pytest

from fedbench.base.errors import EXIT_FAILURE, EXIT_USER

from transport_ranks import SCENARIOS  # isort: skip

pytestmark = pytest.mark.spmd

RANKS = 3
SCRIPT = Path(__file__).with_name("transport_ranks.py")

#: Fatal scenario -> words that stderr must have.
FATAL = {
    "truncated": ("rank 0", "TRUNCATE"),
    "truncated_rendezvous": (),
    "nobody_agrees": ("After 1 s: rank 2 on ", "did not come to end the round"),
    "silent_cloud": ("After 1 s: rank ", "still waits for rank 0 on ", "to end the round"),
    "crash": ("Fatal Python error: Segmentation fault", "in crash"),
    "flipped_bit": ("rank 0", "Frame of scalars from device 0 (rank 1 on ", "checksum"),
}

JOB = """
[run]
rounds = 1
[method]
name = "fedmezo"
"""

Verdicts = Callable[[], list[dict[str, str]]]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Verdicts:
    """Play all scenarios in one job; return the verdicts of all ranks."""
    folder = tmp_path_factory.mktemp("transport")
    ended = mpi.run(mpi.mpirun(RANKS, sys.executable, SCRIPT, folder), folder / "log")
    found = [
        json.loads(path.read_text()) if (path := folder / f"verdict.{rank}.json").exists() else {}
        for rank in range(RANKS)
    ]

    def checked() -> list[dict[str, str]]:
        assert not ended.left, ended.told()
        assert all(found), ended.told()
        return found

    return checked


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(verdicts: Verdicts, scenario: str) -> None:
    for rank, verdict in enumerate(verdicts()):
        assert verdict.get(scenario) == "ok", f"rank {rank}: {verdict.get(scenario, 'never came so far')}"


@pytest.mark.parametrize("fatal", FATAL)
def test_fatal_scenario_ends_the_job(tmp_path: Path, fatal: str) -> None:
    ended = mpi.run(mpi.mpirun(RANKS, sys.executable, SCRIPT, tmp_path, fatal), tmp_path / "log", deadline_s=90)
    assert ended.code not in (0, EXIT_USER), ended.told()
    assert not ended.left, ended.told()
    for word in FATAL[fatal]:
        assert word in ended.err, ended.told()


def test_another_number_of_ranks_than_asked_for(tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text(JOB)
    words = [sys.executable, "-m", "fedbench", "run", job, "-n", "3", "--results", tmp_path]
    ended = mpi.run(mpi.mpirun(2, *words), tmp_path / "log")
    assert ended.code == EXIT_USER, ended.told()
    assert "-n: found 3; the launcher started 2 rank(s)." in ended.err, ended.told()
    assert "Traceback" not in ended.err, ended.told()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_silent_singleton_is_an_error(tmp_path: Path, variable: str) -> None:
    """A launcher of another library tells of three ranks, but MPI makes each process a world of its own."""
    mpi.launcher()
    job = tmp_path / "job.toml"
    job.write_text(JOB)
    command = [sys.executable, "-m", "fedbench", "run", str(job), "--results", str(tmp_path)]
    ended = mpi.run(command, tmp_path / "log", {variable: "3", **mpi.LAUNCHER_ENVIRONMENT})
    assert ended.code == EXIT_FAILURE, ended.told()
    assert "the world has 1 rank(s), expected 3" in ended.err, ended.told()
    assert "Traceback" not in ended.err, ended.told()
    assert not (tmp_path / "runs").exists()


def test_a_launcher_that_tells_the_wrong_size(tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text(JOB)
    words = ["env", "OMPI_COMM_WORLD_SIZE=5", sys.executable, "-m", "fedbench", "run", job, "--results", tmp_path]
    ended = mpi.run(mpi.mpirun(2, *words), tmp_path / "log")
    assert ended.code not in (0, EXIT_USER), ended.told()
    assert not ended.left, ended.told()
    assert "the world has 2 rank(s), expected 5" in ended.err, ended.told()
    assert not (tmp_path / "runs").exists()
