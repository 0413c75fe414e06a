"""An example of an analysis: accuracy by arm over seeds, and paired differences to one method or arm.

    python jobs/analysis.py sweeps/lr [--against fedmezo] [--csv FOLDER]

Reads a sweep, a folder of run files, an all.h5 or one run file, and prints tables.
"""

from __future__ import annotations

import argparse
import math
import sys

from fedbench.base.errors import ConfigError, FedbenchError, nearest
from fedbench.results import Tables, open_sweep


def accuracies(sweep: Tables) -> str:
    """Return mean, spread and number of seeds for every arm; a run that does not reach the target needs inf rounds."""
    runs = sweep.runs.fillna({"rounds_to_target": math.inf})
    figures = runs.groupby(["method", "arm"])[["best_accuracy", "rounds_to_target", "uplink_bytes"]]
    wanted = {"best_accuracy": ["mean", "std", "count"], "rounds_to_target": "median", "uplink_bytes": "mean"}
    return figures.agg(wanted).to_string()


def differences(sweep: Tables, against: str) -> str:
    """Return each method's best accuracy minus that of `against`, seed by seed.

    Of a method's arms the one counts that is best on the dev split over all seeds; the accuracies are those on test.
    """
    runs = sweep.runs
    dev = runs["run_id"].map(sweep.rounds.groupby("run_id")["dev_accuracy"].max())
    best = dict(dev.groupby([runs["method"], runs["arm"]]).mean().groupby("method").idxmax())
    names = [*best, *(arm for arm in runs["arm"].unique() if arm not in best)]
    if against not in names:
        raise ConfigError(f"--against: found {against!r}; allowed: {', '.join(names)}.{nearest(against, names)}")
    base = best[against][1] if against in best else against
    shown = runs[runs["arm"].isin([base, *(arm for _, arm in best.values())])]
    wide = shown.pivot_table(index="seed", columns="arm", values="best_accuracy")
    return str(wide.sub(wide[base], axis=0).drop(columns=base).to_string())


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--against", default="fedmezo", metavar="NAME", help="method or arm (default: fedmezo)")
    parser.add_argument("--csv", metavar="FOLDER", help="write runs, rounds and devices there as CSV")
    args = parser.parse_args()
    try:
        sweep = open_sweep(args.path)
        paired = differences(sweep, args.against)
        print(f"{len(sweep.runs)} runs\n\n{accuracies(sweep)}\n\nbest accuracy minus that of {args.against}, by seed:")
        print(paired)
        for path in sweep.save(args.csv) if args.csv else ():
            print(path)
    except FedbenchError as error:
        print(f"analysis: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
