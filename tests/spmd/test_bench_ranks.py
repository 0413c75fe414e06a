"""Benchmarks on two ranks: started by themselves, and under the user's own launcher; only rank 0 speaks."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import mpi
import pytest

from fedbench.base.errors import EXIT_OK, EXIT_USER
from fedbench.bench.transport import TURNS

pytestmark = pytest.mark.spmd

BENCH = [sys.executable, "-m", "fedbench", "bench"]
WORDS = [*BENCH, "transport", "--repeats", "2", "--json"]

#: A link on which the embedded model's guide takes about as long as a probe.
STREAMED = ["-n", "2", "--model", "embedded", "--batch", "32", "--length", "32", "--link", "10Mbit/s", "--json"]
#: What `pipeline` says of the device's memory.
MEMORY = {"probe", "with_spc", "without_spc", "coded_guide", "unit", "decoded_units"}
#: What a machine that does other things as well may add to an arm of a tenth of a second.
NOISE = 0.25


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


def of_an_arm(found: dict[str, Any]) -> None:
    """Assert what holds for times of the four arms on any machine."""
    medians = found["medians_s"]
    shorter = min(medians["transfer"], medians["compute"])
    assert medians["transfer"] >= (1 - NOISE) * found["nominal_transfer_s"], "the link is paced"
    assert medians["both"] < medians["sequential"], "something is hidden"
    assert medians["sequential"] > (1 - NOISE) * (medians["transfer"] + medians["compute"])
    assert medians["both"] >= (1 - NOISE) * max(medians["transfer"], medians["compute"])
    assert 0 < found["hidden_fraction"] <= 1
    assert found["over_ideal"] < found["sequential_over_ideal"]
    assert 0 < found["fill_s"] < shorter
    assert 0 <= found["wait_s"] < medians["both"]
    assert sum(found["units_by_codec"].values()) == found["units"]


def test_overlap_hides_the_shorter_of_transfer_and_compute(tmp_path: Path) -> None:
    mpi.launcher()
    ended = mpi.run([*BENCH, "overlap", *STREAMED], tmp_path / "log", deadline_s=120)
    assert ended.code == EXIT_OK, ended.told()
    found = json.loads(ended.out)
    of_an_arm(found)
    assert found["hidden_fraction"] > 0.5
    assert 1 < found["bits_per_entry"] < 32, "the link's rate chose the codecs"
    assert len(found["samples_hidden"]) == found["rounds"] >= 6


def test_the_pipeline_is_measured_by_codec(tmp_path: Path) -> None:
    mpi.launcher()
    ended = mpi.run([*BENCH, "pipeline", *STREAMED], tmp_path / "log", deadline_s=180)
    assert ended.code == EXIT_OK, ended.told()
    found = json.loads(ended.out)
    by_codec = found["by_codec"]
    assert set(by_codec) == {"adaptive", "int8", "int2"}
    assert found["over_ideal"] == by_codec["adaptive"]["over_ideal"]
    for one in by_codec.values():
        of_an_arm(one)
    assert by_codec["int8"]["medians_s"]["transfer"] > by_codec["int2"]["medians_s"]["transfer"]
    assert found["over_sequential"] < 1
    assert set(found["memory_bytes"]) == MEMORY
    assert 1 <= found["memory_bytes"]["decoded_units"] <= 2
