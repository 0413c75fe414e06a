"""`bench transport` on two ranks: started by itself, and under the user's own launcher; only rank 0 speaks."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import mpi
import pytest

from fedbench.base.errors import EXIT_OK, EXIT_USER
from fedbench.bench.transport import TURNS

pytestmark = pytest.mark.spmd

WORDS = [sys.executable, "-m", "fedbench", "bench", "transport", "--repeats", "2", "--json"]


@pytest.mark.parametrize("by_hand", [False, True], ids=["by itself", "by mpirun"])
def test_ratios_of_every_size_come_from_rank_0_alone(tmp_path: Path, by_hand: bool) -> None:
    mpi.launcher()
    ended = mpi.run(mpi.mpirun(2, *WORDS) if by_hand else [*WORDS, "-n", "2"], tmp_path / "log")
    assert ended.code == EXIT_OK, ended.told()
    assert not ended.left, ended.told()
    found = json.loads(ended.out)
    assert set(found["by_mib"]) == {str(size) for size in TURNS}
    ratios = [one["ratio_pingpong"]["value"] for one in found["by_mib"].values()]
    assert found["ratio_pingpong"] == min(ratios)
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios)
    assert all(len(samples) == 2 and min(samples) > 0 for samples in found["samples_s"].values())


def test_one_rank_has_nobody_to_talk_to(tmp_path: Path) -> None:
    ended = mpi.run([*WORDS, "-n", "1"], tmp_path / "log")
    assert ended.code == EXIT_USER, ended.told()
    assert "found -n 1; messages are measured between 2 ranks or more" in ended.err, ended.told()
