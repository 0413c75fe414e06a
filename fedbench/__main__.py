"""The command line: `fedbench VERB`, the same as `python -m fedbench VERB`.

Only parsers are built here; each verb has one function that returns an exit code. Text
for people goes to stderr, data to stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fedbench.base.errors import EXIT_FAILURE, EXIT_OK, EXIT_STOPPED, ConfigError, FedbenchError
from fedbench.base.words import Parser, Verbs, positive
from fedbench.batch import arguments
from fedbench.run import arguments as run_arguments


def process_run(args: argparse.Namespace) -> int:
    """`fedbench run`; a request to stop that comes while it imports is kept."""
    from fedbench.run import launch, parent

    launch.keep_early_stops()
    parent.stop_with_parent()
    from fedbench.run.command import run

    return run(args)


def process_show(args: argparse.Namespace) -> int:
    """`fedbench show`."""
    from fedbench.results import reader

    run = reader.read(args.file)
    if args.json:
        print(run.summary.model_dump_json(indent=2))
        return EXIT_OK
    from rich.console import Console

    from fedbench.report.summary import summary_table

    Console().print(summary_table(run))
    return EXIT_OK


def process_report(args: argparse.Namespace) -> int:
    """`fedbench report`."""
    from fedbench.base import terminal
    from fedbench.report import build
    from fedbench.report.table import demo_table
    from fedbench.results import folder

    written = build.build(args.paths, args.out, args.baseline)
    terminal.show(demo_table(folder.load(args.paths)[0]), sys.stderr)
    for path in written:
        print(path)
    return EXIT_OK


def process_bench(args: argparse.Namespace) -> int:
    """`fedbench bench`."""
    from fedbench.bench.command import run

    return run(args)


def process_sweep(args: argparse.Namespace) -> int:
    """`fedbench sweep make`, `submit`, `status`, `collect` and `tune`."""
    from fedbench.batch.command import run

    return run(args)


def process_check(args: argparse.Namespace) -> int:
    """`fedbench check`."""
    from fedbench.bench.check import run

    return run(args)


def process_verify(args: argparse.Namespace) -> int:
    """`fedbench verify`."""
    from fedbench.verify.command import process

    return process(args)


def process_trace(args: argparse.Namespace) -> int:
    """`fedbench trace`."""
    from fedbench.base import fsio
    from fedbench.report import trace
    from fedbench.results import reader

    content = trace.to_json(reader.read(args.file))
    try:
        fsio.write_text(args.out, content)
    except OSError as error:
        raise ConfigError(f"--out: {error}") from None
    print(args.out)
    return EXIT_OK


def process_export(args: argparse.Namespace) -> int:
    """`fedbench export`."""
    from fedbench.run.export import export

    for path in export(args.file, args.out):
        print(path)
    return EXIT_OK


def process_methods(args: argparse.Namespace) -> int:
    """`fedbench methods`."""
    from fedbench.run.build import METHODS

    for name, method in METHODS.items():
        print(f"{name:14} {method.summary}")
        for key, field in method.settings_type.model_fields.items():
            print(
                f"    {key} = {json.dumps(field.default)}" + (f"  # {field.description}" if field.description else "")
            )
    return EXIT_OK


def parser() -> Parser:
    """Return the parser tree."""
    root = Parser(prog="fedbench", description="Federated fine-tuning without backpropagation on devices, under MPI.")
    root.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    verbs = root.verbs("verb")
    run_arguments.add(verbs, process_run)
    for add in (_show, _report, _trace, _export, _bench, _check, _verify, _methods):
        add(verbs)
    arguments.add(verbs, process_sweep)
    return root


def _show(verbs: Verbs) -> None:
    show = verbs.add("show", "one run's summary", "fedbench show results/demo/runs/cooperllm-0123456789ab.h5 --json")
    show.add_argument("file", type=Path, metavar="FILE")
    show.add_argument("--json", action="store_true", help="machine-readable")
    show.set_defaults(process=process_show)


def _report(verbs: Verbs) -> None:
    report = verbs.add(
        "report",
        "tables, figures and a page over any number of runs",
        "fedbench report results/demo/runs --out results/demo/report",
    )
    report.add_argument(
        "paths", type=Path, nargs="+", metavar="PATH", help="run files, an all.h5 of a sweep, or folders of them"
    )
    report.add_argument("--out", type=Path, default=Path("report"), metavar="DIR", help="default: report")
    report.add_argument("--baseline", metavar="ARM", help="method or name of the arm that the others are paired with")
    report.set_defaults(process=process_report)


def _trace(verbs: Verbs) -> None:
    trace = verbs.add(
        "trace",
        "a run's spans for Perfetto or Chrome, one lane per rank",
        "fedbench trace results/runs/cooperllm-0123456789ab.h5 --out trace.json",
        "Write the newest rounds of a run as a trace that https://ui.perfetto.dev and about:tracing open.",
    )
    trace.add_argument("file", type=Path, metavar="FILE")
    trace.add_argument("--out", type=Path, required=True, metavar="T.json", help="where the trace goes")
    trace.set_defaults(process=process_trace)


def _export(verbs: Verbs) -> None:
    export = verbs.add(
        "export",
        "a run's tuned weights as a folder of transformers or peft",
        "fedbench export results/runs/cooperllm-0123456789ab.h5 --out tuned",
        "Write the tuned weights of a run that kept them (results.save_weights = true) as a folder of transformers, for "
        "LoRA of peft. The data and the model of the run must be at hand.",
    )
    export.add_argument("file", type=Path, metavar="FILE")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    export.set_defaults(process=process_export)


def _bench(verbs: Verbs) -> None:
    bench = verbs.add(
        "bench",
        "micro-benchmarks, each beside its reference",
        "fedbench bench zo-step --model opt-125m --batch 16 --length 64 --json",
        "Measure one part of fedbench beside its reference in the same process.",
    )
    names = "zo-step, perturb, update, memory, codec, transport, overlap, pipeline, scaling, or all (but scaling)"
    bench.add_argument("bench", metavar="NAME", help=names)
    bench.add_argument("-n", dest="ranks", type=positive, metavar="RANKS", help="ranks, where messages are measured")
    bench.add_argument("--threads", type=positive, metavar="T", help="threads whose figures stand on top (default: 2)")
    bench.add_argument("--model", metavar="M", help="a model's name, or a known shape (default: opt-125m)")
    bench.add_argument("--batch", type=positive, metavar="B", help="rows of a batch (default: 16)")
    bench.add_argument("--length", type=positive, metavar="L", help="tokens of a row (default: 64)")
    bench.add_argument("--trainable", metavar="T", help="the part that is trained (default: full)")
    bench.add_argument("--link", metavar="L", help="a link's rate, such as 100Mbit/s")
    bench.add_argument("--repeats", type=positive, metavar="R", help="repetitions (default: 6)")
    bench.add_argument("--json", action="store_true", help="machine-readable, with all samples")
    bench.add_argument("--out", type=Path, metavar="FIGURE", help="scaling: draw it there, as .png or .svg")
    bench.set_defaults(process=process_bench)


def _check(verbs: Verbs) -> None:
    check = verbs.add(
        "check",
        "is this machine fit: ranks, messages, results folder, clocks, cores, GPUs, Slurm, versions",
        "fedbench check --results results    (under a launcher: mpirun -n 4 fedbench check)",
        "Look at this machine and print what was found, what is needed and what to do. Exit code 0: fit, 1: not.",
    )
    check.add_argument("-n", dest="ranks", type=positive, metavar="RANKS", help="ranks of its own world (default: 2)")
    check.add_argument("--threads", type=positive, default=1, metavar="T", help="threads of a rank (default: 1)")
    check.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    check.add_argument("--json", action="store_true", help="machine-readable, with all samples")
    check.set_defaults(process=process_check)


def _verify(verbs: Verbs) -> None:
    verify = verbs.add(
        "verify",
        "test the published claims",
        "fedbench verify cooperllm fedspzo --quick",
        "Run the jobs behind published claims with their controls and print claim, measured value, goal and verdict. "
        "What is done already is not run again.",
    )
    verify.add_argument("claims", nargs="*", metavar="CLAIM", help="names, or beginnings of names (default: all)")
    verify.add_argument("--quick", action="store_true", help="fewer seeds, shorter runs, no text")
    verify.add_argument("--json", action="store_true", help="machine-readable")
    verify.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    verify.add_argument("--page", type=Path, metavar="FILE.md", help="write the page on claims there as well")
    verify.add_argument("--parallel", type=positive, metavar="K", help="runs at a time (default: as many as fit)")
    verify.add_argument("--dry-run", action="store_true", help="print what would run")
    verify.set_defaults(process=process_verify)


def _methods(verbs: Verbs) -> None:
    methods = verbs.add("methods", "the methods and their settings", "fedbench methods")
    methods.set_defaults(process=process_methods)


def main(words: Sequence[str]) -> int:
    """Return the exit code of a command line."""
    args = parser().parse_args(words)
    try:
        code: int = args.process(args)
    except FedbenchError as error:
        if args.debug:
            raise
        print(f"fedbench: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("fedbench: stopped by INT; the same command goes on.", file=sys.stderr)
        return EXIT_STOPPED
    except BrokenPipeError:
        return EXIT_OK
    except OSError as error:
        if args.debug:
            raise
        print(f"fedbench: {error}", file=sys.stderr)
        return EXIT_FAILURE
    return code


def entry() -> None:
    """Console script."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    entry()
