"""Runs jobs/demo.toml once per arm under a real mpirun, prints the tables and writes the report.

    python jobs/demo.py [--results results/demo] [--seed 0]

Two arms at a time, each on two ranks: the cloud, and one process that hosts the devices.
Runs that are done are not run again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from fedbench.base.records import Run
from fedbench.report import arms, build, compare, table
from fedbench.results import reader
from fedbench.run.supervise import LAUNCHER_ENVIRONMENT, mpirun

JOB = Path(__file__).resolve().with_name("demo.toml")
RANKS = 2
PARALLEL = 2


class Arm(NamedTuple):
    """One run: method, rounds, rounds between evaluations, other settings, rounds from the start that are all evaluated."""

    method: str
    rounds: int
    eval_every: int
    settings: tuple[str, ...] = ()
    eval_first: int = 0


#: Longest first, so that the two lanes end together. FedMeZO stands twice: with the step size that gives the best
#: mean dev accuracy, and with the one of the same grid that reaches the target first (docs/demo.md).
ARMS = (
    Arm("fedmezo", 80, 5),
    Arm("cooperllm_plus", 16, 4, ("data.public=embedded:poor",)),
    Arm("cooperllm", 25, 5, eval_first=5),
    Arm("fedspzo", 16, 4, eval_first=5),
    Arm("cooperllm_plus", 16, 4, eval_first=5),
    Arm("fedmezo", 40, 4, ("method.fedmezo.lr=0.0046",)),
    Arm("fedavg", 20, 2),
    Arm("public_only", 20, 5, eval_first=5),
    Arm("cooperllm", 20, 5, ("data.public_labels=shuffled",)),
    Arm("cooperllm", 20, 5, ("data.public=embedded:poor",)),
    Arm("public_only", 20, 5, ("data.public=embedded:poor",)),
)

#: Columns that the tables need where nothing tells how wide the terminal is.
WIDTH = 110


def run_arm(arm: Arm, results: Path, seed: int) -> Path:
    """Return the run file of one arm; SystemExit with its output where it failed."""
    settings = [
        f"method.name={arm.method}",
        f"run.rounds={arm.rounds}",
        f"run.eval_every={arm.eval_every}",
        f"run.eval_first={arm.eval_first}",
        f"run.seed={seed}",
        *arm.settings,
    ]
    words = [word for setting in settings for word in ("--set", setting)]
    command = [str(mpirun()), "-n", str(RANKS), sys.executable, "-m", "fedbench", "run", str(JOB), *words]
    done = subprocess.run(
        [*command, "--results", str(results)],
        check=False,
        capture_output=True,
        text=True,
        env={**LAUNCHER_ENVIRONMENT, **os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return Path(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Run all arms, print the tables, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/demo"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    console, start = Console(stderr=True), time.monotonic()

    def finish(arm: Arm) -> Run:
        run = reader.read(run_arm(arm, args.results, args.seed))
        label = " ".join((arm.method, *arm.settings))
        console.print(f"{time.monotonic() - start:5.0f} s  {label}: best accuracy {run.summary.best_accuracy:.3f}")
        return run

    with ThreadPoolExecutor(PARALLEL) as pool:
        runs = list(pool.map(finish, ARMS))
    out = Console(width=None if sys.stdout.isatty() else WIDTH)
    rich = [run for run in runs if run.config["data"]["public"] == "embedded"]
    poor = [run for run in runs if run not in rich]
    out.print(table.demo_table(rich))
    out.print(table.demo_table([*poor, runs[0]]))  # FedMeZO reads no public set: one run stands for both
    full = arms.group(rich)
    for reference in compare.references(full):
        out.print(table.to_rich(compare.compare_grid(reference, full)))
    for path in build.build([args.results / "runs"], args.results / "report"):
        if path.name == "index.html":
            out.print(f"report: {path}")


if __name__ == "__main__":
    main()
