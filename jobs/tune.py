"""Tunes the step size of every method of a job on the dev split: the same grid size, seed and rounds for all.

    python jobs/tune.py [--job jobs/demo.toml] [--seed 1000] [--rounds 100] [--methods ...] [--results results/tune]

Seeds of the tuning are not those of the demo. A method's best step size is the one with the
best mean over its evaluations of dev accuracy (or, for short horizons, dev loss). The whole
curve is printed, and a best value on the edge of a grid widens the grid. Runs that are done
are not run again.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fedbench.base.stats import mean_sd
from fedbench.results import reader

HERE = Path(__file__).resolve().parent

#: Middle of each method's grid, unless --middle says otherwise.
MIDDLE = {"fedavg": 0.1, "fedmezo": 2e-3, "fedspzo": 2e-3, "cooperllm": 0.3, "public_only": 0.1}

#: What a run that diverged ends with.
DIVERGED = ("not a finite number", "exactly zero", "backpropagation step is")


def dev_score(job: Path, results: Path, settings: dict[str, str], by: str) -> float:
    """Return one run's mean over its evaluations of dev accuracy or of minus the dev loss; -inf where it diverged."""
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    done = subprocess.run(
        [sys.executable, "-m", "fedbench", "run", str(job), *words, "--results", str(results)],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        if any(words in done.stderr for words in DIVERGED):
            return -math.inf
        raise SystemExit(done.stderr)
    rounds = reader.read(Path(done.stdout.strip())).rounds
    return float(np.nanmean(rounds["dev_accuracy"] if by == "accuracy" else -rounds["dev_loss"]))


def tune(method: str, args: argparse.Namespace) -> tuple[str, dict[float, float]]:
    """Return the settings line of the best step size and the curve lr -> score."""
    curve: dict[float, float] = {}
    middle = round(args.per_decade * math.log10(args.middle.get(method, MIDDLE[method])))
    wanted = range(middle - args.points // 2, middle + args.points // 2 + 1)
    while True:
        lrs = [float(f"{10 ** (k / args.per_decade):.2g}") for k in wanted]
        todo = [lr for lr in lrs if lr not in curve]
        jobs = [
            {
                "method.name": method,
                f"method.{method}.lr": f"{lr:g}",
                "run.seed": str(seed),
                "run.rounds": str(args.rounds),
                "run.eval_every": str(args.eval_every),
            }
            for lr in todo
            for seed in args.seeds
        ]
        with ThreadPoolExecutor(args.parallel) as pool:
            scores = list(pool.map(lambda settings: dev_score(args.job, args.results, settings, args.by), jobs))
        for index, lr in enumerate(todo):
            own = scores[index * len(args.seeds) : (index + 1) * len(args.seeds)]
            curve[lr] = mean_sd(own).mean
            print(f"{method:12} lr {lr:<8g} dev {curve[lr]:.4g}", file=sys.stderr, flush=True)
        best = max(curve, key=lambda lr: curve[lr])
        if min(curve) < best < max(curve):
            return f"[method.{method}]\nlr = {best:g}", dict(sorted(curve.items()))
        wanted = range(wanted[0] - 2, wanted[0]) if best == min(curve) else range(wanted[-1] + 1, wanted[-1] + 3)


def _middle(text: str) -> tuple[str, float]:
    method, _, lr = text.partition("=")
    return method, float(lr)


def main() -> None:
    """Tune and print `[method.<name>]` tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, default=HERE / "demo.toml")
    parser.add_argument("--methods", nargs="+", default=list(MIDDLE), choices=list(MIDDLE))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1000])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--eval-every", type=int, default=5)
    parser.add_argument("--points", type=int, default=7, help="values of the grid before it is widened")
    parser.add_argument("--per-decade", type=int, default=3)
    parser.add_argument("--middle", nargs="+", type=_middle, default={}, metavar="METHOD=LR", help="other grid middles")
    parser.add_argument("--by", default="accuracy", choices=("accuracy", "loss"), help="what counts on the dev split")
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("results/tune"))
    args = parser.parse_args()
    args.middle = dict(args.middle)
    for method in args.methods:
        table, curve = tune(method, args)
        points = ", ".join(f"{lr:g}: {score:.4g}" for lr, score in curve.items())
        print(f"# score on dev by lr: {points}\n{table}\n", flush=True)


if __name__ == "__main__":
    main()
