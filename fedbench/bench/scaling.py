"""`bench scaling`: one job on 1, 2, 4, ... ranks, each a real run under the launcher of `fedbench run -n`.

    throughput(R) = devices / round_s        efficiency(R) = throughput(R) / (R throughput(1))

strong: the devices of a round are the same for every R; weak: so many for each rank that hosts devices. Rank 0 of a world
is the cloud and hosts none, so R - 1 ranks do: `efficiency_of_device_ranks` divides by max(1, R - 1) instead of R. Runs of
one repetition lie side by side in alternating order; a sample is a run's median round, warm-up rounds left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedbench.base.errors import EXIT_OK, ConfigError, FedbenchError
from fedbench.base.records import Run
from fedbench.bench import harness
from fedbench.bench.harness import Options
from fedbench.results import reader
from fedbench.run import launch, supervise

#: What is measured unless the command line says otherwise.
DEFAULTS = Options(model="embedded", batch=8, threads=1, ranks=8)

#: Devices of a strong run, and of a weak one for each rank that hosts any.
DEVICES = 8

ROUNDS, WARM_UP = 14, 4

_JOB = """# The job of `fedbench bench scaling`; devices and ranks are set for each run.
[run]
rounds = {rounds}
eval_every = {rounds}
threads = {threads}
[federation]
batch_size = {batch}
[method]
name = "cooperllm"
[results]
trace_rounds = 0
"""


class Point(NamedTuple):
    """A run to make: how many ranks, how many devices."""

    ranks: int
    devices: int


def run(options: Options) -> dict[str, Any]:
    """Return efficiencies by kind and ranks, what they are made of, and all samples in seconds."""
    if launch.launched_size() is not None:
        raise ConfigError("bench scaling starts its own worlds: run it without a launcher.")
    if options.model != "embedded":
        raise ConfigError(
            f"--model: found {options.model!r}; allowed for scaling: embedded. For a job of your own: "
            "fedbench sweep make JOB.toml --grid run.ranks=1,2,4 (docs/scaling.md)."
        )
    if options.ranks > 1:
        supervise.mpirun()
    kinds = points(options.ranks)
    every = list(dict.fromkeys(point for own in kinds.values() for point in own))
    runs: dict[Point, list[Run]] = {point: [] for point in every}
    with tempfile.TemporaryDirectory(prefix="fedbench-scaling-") as name:
        folder = Path(name)
        text = _JOB.format(rounds=ROUNDS, threads=options.threads, batch=options.batch)
        (folder / "job.toml").write_text(text, encoding="utf-8")
        for repetition in range(options.repeats):
            for point in every if repetition % 2 == 0 else reversed(every):
                runs[point].append(_one(folder, point, repetition))
                launch.say(f"repetition {repetition + 1}, {point.ranks} rank(s), {point.devices} devices: done")
    return figures(kinds, runs, len(os.sched_getaffinity(0)), options.threads)


def points(most: int) -> dict[str, list[Point]]:
    """Return the runs of each kind for 1, 2, 4, ... ranks up to `most`, itself included."""
    sizes = sorted({*(2**k for k in range(most.bit_length())), most})
    return {
        "strong": [Point(ranks, DEVICES) for ranks in sizes],
        "weak": [Point(ranks, DEVICES * hosts(ranks)) for ranks in sizes],
    }


def hosts(ranks: int) -> int:
    """Return how many ranks host devices."""
    return max(1, ranks - 1)


def figures(
    kinds: Mapping[str, Sequence[Point]], runs: Mapping[Point, Sequence[Run]], cores: int, threads: int
) -> dict[str, Any]:
    """Return everything that is printed; FedbenchError where ranks changed a result."""
    for point, own in runs.items():
        hashes = {
            run.summary.trajectory_sha256 for other in runs if other.devices == point.devices for run in runs[other]
        }
        if len(hashes) > 1:
            raise FedbenchError(
                f"bench scaling: {point.devices} devices gave {len(hashes)} trajectories on {own[0].summary.ranks} ranks."
            )
    samples = {point: [_round_s(run) for run in own] for point, own in runs.items()}
    first = {kind: own[0] for kind, own in kinds.items()}
    ratios = {
        kind: {
            str(point.ranks): harness.ratio(
                [s * point.devices / first[kind].devices for s in samples[first[kind]]], samples[point]
            )
            for point in own
        }
        for kind, own in kinds.items()
    }
    return {
        "efficiency": _divided(ratios, lambda ranks: ranks),
        "efficiency_of_device_ranks": _divided(ratios, hosts),
        "speedup": {kind: {ranks: r["value"] for ranks, r in own.items()} for kind, own in ratios.items()},
        "round_s": {k: {str(p.ranks): float(np.median(samples[p])) for p in own} for k, own in kinds.items()},
        "cloud_s": {k: {str(p.ranks): _cloud_s(runs[p]) for p in own} for k, own in kinds.items()},
        "devices": {kind: {str(point.ranks): point.devices for point in own} for kind, own in kinds.items()},
        "oversubscribed": [point.ranks for point in kinds["strong"] if point.ranks * threads > cores],
        "cores": cores,
        "samples_intervals": ratios,
        "samples_s": {kind: {str(point.ranks): samples[point] for point in own} for kind, own in kinds.items()},
    }


def _divided(ratios: Mapping[str, Mapping[str, Any]], by: Any) -> dict[str, dict[str, float]]:
    """Return speed-ups over what would be ideal."""
    return {kind: {ranks: r["value"] / by(int(ranks)) for ranks, r in own.items()} for kind, own in ratios.items()}


def _one(folder: Path, point: Point, repetition: int) -> Run:
    """Make one run and return its record; FedbenchError with what it printed where it fails."""
    settings = (f"federation.devices={point.devices}",)
    words = [sys.executable, "-m", "fedbench", "run", str(folder / "job.toml"), "-n", str(point.ranks)]
    words += ["--results", str(folder / str(repetition)), *(w for s in settings for w in ("--set", s))]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    if ran.returncode != EXIT_OK:
        raise FedbenchError(f"bench scaling: the run on {point.ranks} rank(s) failed:\n{ran.stderr.strip()}")
    return reader.read(Path(ran.stdout.strip().splitlines()[-1]))


def _round_s(run: Run) -> float:
    """Return the median seconds of a round, without evaluation and warm-up."""
    return float(np.median(run.rounds["round_s"][1 + WARM_UP :]))


def _cloud_s(runs: Sequence[Run]) -> float:
    """Return the median seconds of a round that the cloud computes while devices may wait."""
    return float(np.median([np.median(run.rounds["cloud_s"][1 + WARM_UP :]) for run in runs]))
