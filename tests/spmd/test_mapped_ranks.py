"""Weights in a working file per rank: the bits of resident ones on any number of ranks, and nothing left in scratch."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import mpi
import pytest
from all_methods import STOPPED, job
from mapped_methods import METHODS, VARIANTS

from fedbench.base.errors import EXIT_OK, EXIT_STOPPED
from fedbench.base.records import Run
from fedbench.results import reader

pytestmark = pytest.mark.spmd

SCRIPT = Path(__file__).with_name("mapped_methods.py")

JOB = """
method = { name = "fedmezo" }
run = { rounds = 100000, eval_every = 100000 }
model = { mapped = true }
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Run everything on 1 and on 2 ranks; return the folder of each."""
    played = {}
    for ranks in (1, 2):
        folder = played[ranks] = tmp_path_factory.mktemp(f"mapped_{ranks}")
        words = [sys.executable, str(SCRIPT), str(folder)]
        ended = mpi.run(words if ranks == 1 else mpi.mpirun(ranks, *words), folder / "log", deadline_s=240)
        assert ended.code == 0, ended.told()
        assert not ended.left, ended.told()
        expected = {name: {method: [EXIT_OK] for method in METHODS} for name in VARIANTS}
        expected[STOPPED] = {method: [EXIT_STOPPED, EXIT_OK] for method in METHODS}
        for rank in range(ranks):
            assert json.loads((folder / f"verdict.{rank}.json").read_text()) == expected, ended.told()
    return played


def read(folders: dict[int, Path], ranks: int, name: str, method: str) -> Run:
    """Return the run file of one method."""
    run_id = job(method, VARIANTS.get(name, VARIANTS["mapped"]), ranks).run_id
    return reader.read(folders[ranks] / name / "runs" / f"{run_id}.h5")


@pytest.mark.parametrize("method", METHODS)
def test_a_mapped_run_is_the_resident_one_on_any_ranks(folders: dict[int, Path], method: str) -> None:
    expected = read(folders, 1, "resident", method).summary
    for ranks in (1, 2):
        for name in (*VARIANTS, STOPPED):
            found = read(folders, ranks, name, method).summary
            assert found.trajectory_sha256 == expected.trajectory_sha256, (ranks, name)
            assert found.weights_sha256 == expected.weights_sha256, (ranks, name)


def test_every_rank_tells_its_phases_and_the_weights_that_it_holds(folders: dict[int, Path]) -> None:
    tables = {name: read(folders, 2, name, "fedmezo").memory for name in VARIANTS}
    for table in tables.values():
        phases = list(zip(table["rank"].tolist(), table["phase"].tolist(), strict=True))
        assert phases == [(0, p) for p in ("import", "load", "train", "evaluate")] + [
            (1, p) for p in ("import", "load", "train")
        ]
    held = {name: table["weights_bytes"][table["phase"] == "train"] for name, table in tables.items()}
    assert (held["mapped"] < held["resident"] / 2).all()


def test_nothing_is_left_in_scratch(folders: dict[int, Path]) -> None:
    for folder in folders.values():
        assert (folder / "mapped" / "scratch").is_dir()
        assert not [path for path in folder.rglob("scratch/*")]


def test_a_killed_rank_leaves_nothing_in_scratch(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(JOB)
    words = [mpi.console_script(), "run", str(tmp_path / "job.toml"), "-n", "2", "--results", str(tmp_path / "results")]
    running = mpi.Job(words, tmp_path / "log")
    running.until(lambda: any(mapped(pid) for pid in running.ranks().values()), "a rank maps its weights", 60)
    for pid in running.ranks().values():
        os.kill(pid, signal.SIGKILL)
    ended = running.wait()
    assert ended.code != 0
    assert not list((tmp_path / "results" / "scratch").iterdir())


def mapped(pid: int) -> bool:
    """Return whether a process maps a working file."""
    try:
        return "scratch/" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False
