"""An example of an analysis: accuracy by method and step size over seeds, and paired differences to one method.

    python jobs/analysis.py sweeps/lr [--against fedmezo] [--csv FOLDER]

Reads a sweep, a folder of run files, an all.h5 or one run file, and prints tables.
"""

from __future__ import annotations

import argparse
import sys

from fedbench.base.errors import FedbenchError
from fedbench.results import Tables, open_sweep

LR = "config.method.settings.lr"


def accuracies(sweep: Tables) -> str:
    """Return mean, spread and number of seeds for every method and step size."""
    runs = sweep.runs
    keys = ["method", *([LR] if LR in runs else [])]
    figures = runs.groupby(keys, dropna=False)[["best_accuracy", "rounds_to_target", "uplink_bytes"]]
    wanted = {"best_accuracy": ["mean", "std", "count"], "rounds_to_target": "median", "uplink_bytes": "mean"}
    return figures.agg(wanted).to_string()


def differences(sweep: Tables, against: str) -> str:
    """Return each method's best accuracy minus that of `against`, seed by seed, each at its best step size."""
    best = sweep.runs.groupby(["seed", "method"])["best_accuracy"].max().unstack("method")
    if against not in best:
        return f"(no run of {against}: found {', '.join(best)})"
    return best.sub(best[against], axis=0).drop(columns=against).to_string()


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--against", default="fedmezo", metavar="METHOD")
    parser.add_argument("--csv", metavar="FOLDER", help="write runs, rounds and devices there as CSV")
    args = parser.parse_args()
    try:
        sweep = open_sweep(args.path)
        print(f"{len(sweep.runs)} runs\n\n{accuracies(sweep)}\n\nbest accuracy minus that of {args.against}, by seed:")
        print(differences(sweep, args.against))
        for path in sweep.save(args.csv) if args.csv else ():
            print(path)
    except FedbenchError as error:
        print(f"analysis: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
