"""1 = 2 = 4 ranks, and stop + resume = straight run, to the bit, for every method."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import mpi
import numpy as np
import pytest

from fedbench.base.errors import EXIT_OK, EXIT_STOPPED
from fedbench.base.records import DEVICE_COLUMNS, ROUND_COLUMNS, Run
from fedbench.results import reader
from fedbench.run.build import METHODS

from all_methods import (  # isort: skip
    HARD, ROUNDS, STOP_ROUND, STOPPED, STRAIGHT, TREE, VARIANTS, below_edges, job, variants,
)  # fmt: skip

pytestmark = pytest.mark.spmd

SCRIPT = Path(__file__).with_name("all_methods.py")
RANKS = (1, 2, 4)
#: Two edges with a rank each, with two or three each.
TREE_RANKS = (pytest.param(5, id="5"), pytest.param(8, id="8", marks=pytest.mark.slow))

#: Times, and what depends on the number of ranks by its nature; everything else is compared.
FREE_FIGURES = {
    "run_id", "ranks", "wire_bytes", "peak_device_bytes", "round_s_median", "hidden_fraction", "unaccounted_fraction",
}  # fmt: skip
LOGICAL_ROUNDS = [name for name, column in ROUND_COLUMNS.items() if column.unit != "s" and name != "wire_bytes"]
LOGICAL_DEVICES = [name for name, column in DEVICE_COLUMNS.items() if column.unit != "s"]

Read = Callable[[int, str, str], Run]


def play(ranks: int, folder: Path, only: str | None = None, python: str = sys.executable) -> Path:
    """Run all methods on `ranks` ranks, in all variants or one, and check every rank's verdict."""
    folder.mkdir(parents=True)
    words = [python, str(SCRIPT), str(folder), *([only] if only else [])]
    command = words if ranks == 1 else mpi.mpirun(ranks, *words, python=python)
    ended = mpi.run(command, folder / "log", deadline_s=300 + 120 * len(METHODS))  # cores are shared
    assert ended.code == 0, ended.told()
    assert not ended.left, ended.told()
    assert len(list(folder.glob("verdict.*.json"))) == ranks
    straight = {name: {method: [EXIT_OK] for method in METHODS} for name in variants(ranks)}
    resumed = {method: [EXIT_STOPPED, EXIT_OK] for method in METHODS}
    expected = {only: resumed} if only else {**straight, STOPPED: resumed}
    for rank in range(ranks):
        assert json.loads((folder / f"verdict.{rank}.json").read_text()) == expected, f"rank {rank}\n{ended.told()}"
    return folder


def read(folder: Path, ranks: int, variant: str, method: str) -> Run:
    """Return the run file of one method."""
    played = variants(ranks) | {STOPPED: HARD, TREE: below_edges(method)}
    name = job(method, played[variant], ranks).run_id
    return reader.read(folder / variant / "runs" / f"{name}.h5")


def assert_same(found: Run, expected: Run) -> None:
    """Assert that two runs are the same in everything but times and transport."""
    figures, wanted = found.summary.model_dump(), expected.summary.model_dump()
    for name in ("trajectory_sha256", "weights_sha256"):
        assert figures[name] == wanted[name], name
    for table, columns in (("rounds", LOGICAL_ROUNDS), ("devices", LOGICAL_DEVICES)):
        for name in columns:
            np.testing.assert_array_equal(getattr(found, table)[name], getattr(expected, table)[name], name)
    for name in figures.keys() - FREE_FIGURES:
        assert figures[name] == wanted[name], name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Read:
    """Run everything once per number of ranks; return run files by ranks, variant and method."""
    mpi.launcher()
    folder = tmp_path_factory.mktemp("all_methods")
    played: dict[tuple[int, bool], Path] = {}

    def one(ranks: int, variant: str, method: str) -> Run:
        key = ranks, variant == TREE
        place = folder / f"{variant if key[1] else 'star'}-{ranks}"
        if key not in played:
            assert not place.exists(), "an earlier test tells why these runs failed"
            played[key] = play(ranks, place, TREE if key[1] else None)
        return read(played[key], ranks, variant, method)

    return one


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ranks", [*RANKS[1:], pytest.param(8, marks=pytest.mark.slow)])
def test_ranks_change_no_bit(runs: Read, ranks: int, variant: str, method: str) -> None:
    alone, many = runs(1, variant, method), runs(ranks, variant, method)
    assert many.summary.ranks == ranks
    assert many.summary.rounds == ROUNDS
    assert_same(many, alone)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ranks", RANKS)
def test_resume_equals_the_straight_run(runs: Read, ranks: int, method: str) -> None:
    straight, resumed = runs(ranks, "hard", method), runs(ranks, STOPPED, method)
    assert_same(resumed, straight)
    assert resumed.summary.run_id == straight.summary.run_id
    np.testing.assert_array_equal(resumed.rounds["wire_bytes"], straight.rounds["wire_bytes"])
    # The second process played the later rounds alone: its spans begin after the stop.
    assert set(straight.spans["round"]) >= set(range(ROUNDS))
    assert resumed.spans["round"][resumed.spans["round"] >= 0].min() == STOP_ROUND + 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ranks", TREE_RANKS)
def test_edges_progress_and_links_change_no_bit(runs: Read, ranks: int, method: str) -> None:
    """A tree that was stopped and resumed equals the straight run of one process, but for what its edges fetched."""
    alone, tree = runs(1, STRAIGHT, method), runs(ranks, TREE, method)
    assert tree.summary.ranks == ranks
    edges = np.array(tree.rounds["edge_bytes"])
    assert (edges[1:] > 0).all() == (method != "public_only")
    assert (alone.rounds["edge_bytes"] == 0).all()
    np.testing.assert_array_equal(edges % 2, 0)
    tree.rounds["edge_bytes"][:] = 0
    assert_same(tree, alone)


@pytest.mark.parametrize("method", METHODS)
def test_methods_learn_different_things(runs: Read, method: str) -> None:
    """The comparison above would hold for runs that ignore their method or their settings."""
    mine = runs(1, "plain", method).summary
    others = [runs(1, "plain", other).summary.trajectory_sha256 for other in METHODS if other != method]
    assert mine.trajectory_sha256 not in others
    assert mine.weights_sha256 != runs(1, "hard", method).summary.weights_sha256


def test_a_second_mpi_library_changes_no_bit(runs: Read, tmp_path: Path) -> None:
    """Its stopped and resumed runs equal the straight ones of one process."""
    many = play(2, tmp_path / "2", STOPPED, mpi.MPICH_PYTHON)
    for method in METHODS:
        found = read(many, 2, STOPPED, method)
        assert "MPICH" in found.provenance["mpi"].upper()
        assert_same(found, runs(1, "hard", method))
