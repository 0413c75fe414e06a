"""A real run on three ranks leaves a whole trace: every rank, round, layer and unit, and times that add up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mpi
import numpy as np
import pytest

from fedbench.base.lanes import lanes
from fedbench.base.records import Run
from fedbench.results import reader

pytestmark = pytest.mark.spmd

RANKS, ROUNDS, KEPT, LAYERS = 3, 6, 4, 6

JOB = f"""
method = {{ name = "cooperllm" }}
run = {{ rounds = {ROUNDS}, eval_every = 3 }}
federation = {{ devices = 4, batch_size = 4 }}
results = {{ trace_rounds = {KEPT} }}
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run file of one run."""
    folder = tmp_path_factory.mktemp("trace")
    (folder / "job.toml").write_text(JOB)
    words = [sys.executable, "-m", "fedbench", "run", str(folder / "job.toml"), "--results", str(folder)]
    ended = mpi.run(mpi.mpirun(RANKS, *words), folder / "log", {"PYTHONPATH": str(mpi.ROOT)})
    assert ended.code == 0, ended.told()
    return Path(ended.out.strip())


@pytest.fixture(scope="module")
def run(path: Path) -> Run:
    return reader.read(path)


def test_every_rank_has_the_newest_rounds(run: Run) -> None:
    found = [(lane.rank, lane.round) for lane in lanes(run.spans)]
    assert found == [(rank, number) for rank in range(RANKS) for number in range(ROUNDS - KEPT, ROUNDS)]


def test_ranks_do_their_parts_layer_by_layer_and_unit_by_unit(run: Run) -> None:
    layers = ["embed", *(f"layer {i}" for i in range(1, LAYERS + 1)), "head"]
    for lane in lanes(run.spans):
        did = {kind: lane.unit[lane.kind == kind].tolist() for kind in np.unique(lane.kind).tolist()}
        plan = [unit for unit in did["encode" if lane.rank == 0 else "decode"] if unit.startswith("plan/")]
        assert len(plan) == len(set(plan)) > LAYERS, lane.rank
        if lane.rank == 0:
            assert did["cloud"] == ["plan", "ahead", "combine"]
            assert ("evaluate" in did) == ((lane.round + 1) % 3 == 0)
            assert "compute" not in did
        else:
            hosted = [f"device {device}" for device in range(4) if 1 + device % 2 == lane.rank]
            assert [unit for unit in did["compute"] if unit.startswith("device")] == hosted
            assert [unit for unit in did["compute"] if not unit.startswith("device")] == layers * len(hosted)
            assert "reply/scalars" in did["decode"]
        assert "agreement" in did["wait"]
        assert "" not in did["wait"], "every wait says for what"
        waits = lane.kind == "wait"
        assert lane.own_s[waits].sum() == pytest.approx((lane.end_s - lane.start_s)[waits].sum()), (
            "no wait is in another"
        )


def test_spans_lie_in_their_round_and_rounds_last_as_long_everywhere(run: Run) -> None:
    lengths: dict[int, list[float]] = {}
    for lane in lanes(run.spans):
        assert (lane.start_s >= 0).all()
        assert (lane.end_s <= lane.round_s + 1e-9).all()
        covered = (lane.end_s - lane.start_s)[lane.depth == 0].sum()
        assert 0.75 * lane.round_s < covered <= lane.round_s + 1e-9
        assert lane.own_s.sum() == pytest.approx(covered)
        lengths.setdefault(lane.round, []).append(lane.round_s)
    assert 0 <= run.summary.unaccounted_fraction < 0.25, "2 % on a machine that does nothing else"
    for number, found in lengths.items():
        assert max(found) < 1.5 * min(found), number


def test_memory_is_known_for_every_rank_and_round(run: Run) -> None:
    table = run.memory_rounds
    rows = list(zip(table["rank"].tolist(), table["round"].tolist(), strict=True))
    assert rows == [(rank, number) for rank in range(RANKS) for number in range(ROUNDS)]
    assert (table["peak_bytes"] >= table["resident_bytes"]).all()
    assert table["resident_bytes"].min() > 50e6
    trained = run.memory["phase"] == "train"
    for rank in range(RANKS):
        peak = run.memory["peak_bytes"][trained & (run.memory["rank"] == rank)][0]
        assert peak >= table["peak_bytes"][table["rank"] == rank].max()


def test_the_verb_makes_a_trace_of_it(path: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    words = [sys.executable, "-m", "fedbench", "trace", str(path), "--out", str(out)]
    ended = mpi.run(words, tmp_path / "log", {"PYTHONPATH": str(mpi.ROOT)})
    assert ended.code == 0, ended.told()
    assert ended.out == f"{out}\n"
    events = json.loads(out.read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == len(run.spans["rank"])
    assert {event["pid"] for event in events if event["ph"] == "X"} == set(range(RANKS))
    assert sum(event["ph"] == "C" for event in events) == RANKS * KEPT
