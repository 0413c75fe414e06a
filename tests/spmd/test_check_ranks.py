"""`fedbench check` on a real world: started by itself, and under the user's own launcher; only rank 0 speaks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mpi
import pytest

from fedbench.base.errors import EXIT_OK

pytestmark = pytest.mark.spmd


@pytest.mark.parametrize(("ranks", "by_hand"), [(2, False), (3, True)], ids=["by itself", "by mpirun"])
def test_a_world_is_measured_and_its_rows_are_judged(tmp_path: Path, ranks: int, by_hand: bool) -> None:
    mpi.launcher()
    words = [sys.executable, "-m", "fedbench", "check", "--json", "--results", str(tmp_path / "results")]
    ended = mpi.run(mpi.mpirun(ranks, *words) if by_hand else [*words, "-n", str(ranks)], tmp_path / "log")
    assert ended.code == EXIT_OK, ended.told()
    assert not ended.left, ended.told()
    told = json.loads(ended.out)
    rows = {row["check"]: row for row in told["rows"]}
    assert rows["world"]["value"].startswith(f"{ranks} rank(s) on 1 host(s)")
    assert rows["thread level"]["value"].startswith("MPI_THREAD_")
    (pair,) = told["world"]["pairs"]
    assert 0 < pair["latency_s"] < 1
    assert pair["bytes_per_s"] > 0
    assert 0 <= pair["overlap"] <= 1
    assert len(told["world"]["cores_of_ranks"]) == ranks
    assert min(told["world"]["cores_of_ranks"]) >= 1
    assert not (tmp_path / "results").exists()
