"""The whole way of a sweep by its documented commands: two tasks killed, one requeued, sent again, collected, reported.

FEDBENCH_ACCEPTANCE_SET adds words to `sweep make`, such as `--set run.rounds=5`, for a quick look.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path

import cluster
import pytest

from fedbench.results import reader

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

JOB = Path(__file__).parents[2] / "jobs" / "demo.toml"
METHODS = ("cooperllm", "fedmezo", "fedavg")
SEEDS = 4

#: Whole runs of the demo's job, three at a time.
DEADLINE_S = 3600.0

#: Array task -> how it is struck once it has started.
STRIKES = {
    1: ("scancel", "--full", "--signal=KILL"),
    4: ("scontrol", "requeue"),
    6: ("scancel", "--full", "--signal=KILL"),
}


def test_twelve_of_twelve_runs_equal_those_made_by_hand(tmp_path: Path) -> None:
    cluster.require()
    words = shlex.split(os.environ.get("FEDBENCH_ACCEPTANCE_SET", ""))

    def command(line: str) -> str:
        return cluster.fedbench(*shlex.split(line), folder=tmp_path, small=False, deadline_s=DEADLINE_S)

    def until(true: Callable[[], object], what: str) -> None:
        cluster.until(true, what, sweep, DEADLINE_S)

    grid = f"--grid method.name={','.join(METHODS)} --seeds {SEEDS} {shlex.join(words)}"
    command(f"sweep make {JOB} {grid} --out results/s1")
    sweep = tmp_path / "results" / "s1"
    job = cluster.array_of(command("sweep submit results/s1 --parallel 3"))
    for line, strike in STRIKES.items():
        until(lambda line=line: "start, dev" in cluster.log(sweep, line), f"line {line} starts")
        cluster.slurm(*strike, f"{job}_{line}")
    until(lambda: cluster.over(job), "the first array is over")
    states = {run["line"]: run["state"] for run in cluster.status(sweep)["runs"]}
    assert {line for line, state in states.items() if state != "done"} == {1, 6}, states
    assert "1| fedbench: task ended: done" in cluster.log(sweep, 4)

    again = cluster.array_of(command("sweep submit results/s1"))
    until(lambda: cluster.over(again), "the second array is over")
    command("sweep collect results/s1")
    told = command("report results/s1/all.h5 --out results/s1/report")
    assert "index.html" in told

    collected = cluster.trajectories(sweep / "all.h5")
    assert len(collected) == len(METHODS) * SEEDS
    for method in METHODS:
        for seed in range(SEEDS):
            own = f"--set method.name={method} --set run.seed={seed} {shlex.join(words)} --results hand"
            path = command(f"run {JOB} {own}").splitlines()[0]
            by_hand = reader.read(tmp_path / path).summary
            assert collected[by_hand.run_id] == by_hand.trajectory_sha256, (method, seed)
