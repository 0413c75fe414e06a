"""A sweep over ranks on this machine: several ranks are launched, one runs in a worker, and both give the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbench.batch import local, sweep
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
    tmp_path: Path,
) -> None:
    job = tmp_path / "job.toml"
    job.write_text(JOB)
    arms = [{"run.ranks": 1}, {"run.ranks": 2}, {"run.ranks": 2, "method.lr": 1e30, "run.rounds": 4}]
    swept = sweep.make(job, arms, [], None, tmp_path / "out")
    results = local.run_local(swept, 1)
    assert [outcome.state for outcome in results.outcomes] == ["done", "done", "diverged"], results
    one, two = (reader.read(swept.run_file(line)).summary for line in swept.lines[:2])
    assert (one.ranks, two.ranks) == (1, 2)
    assert one.trajectory_sha256 == two.trajectory_sha256
    assert "not a finite number" in results.outcomes[2].reason
    assert not results.failed
