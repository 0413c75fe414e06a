"""The verb `bench`: which benchmark runs, and how its numbers are shown."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from fedbench.base import provenance
from fedbench.base.errors import EXIT_OK, ConfigError, nearest
from fedbench.bench import scaling, scaling_figure
from fedbench.bench.harness import Options
from fedbench.report.table import to_rich

_NAMES = ("zo-step", "perturb", "update", "memory", "codec", "transport", "overlap", "pipeline", "scaling")

#: Benchmark -> its module's name, which has `run(options)`.
BENCHES = {name: name.replace("-", "_") for name in _NAMES}

#: Benchmarks that `all` leaves out: they start many runs of their own.
_APART = {"scaling"}

#: Benchmarks whose options are others where the command line says nothing.
_DEFAULTS = {"scaling": scaling.DEFAULTS}


def run(args: argparse.Namespace) -> int:
    """Run one benchmark, or all; print tables for people, or one JSON object."""
    if args.bench != "all" and args.bench not in BENCHES:
        raise ConfigError(
            f"bench: found {args.bench!r}; allowed: {', '.join([*BENCHES, 'all'])}.{nearest(args.bench, BENCHES)}"
        )
    asked = {field.name: getattr(args, field.name, None) for field in fields(Options)}
    said = {name: value for name, value in asked.items() if value is not None}
    if args.out is not None:
        if args.bench != "scaling":
            raise ConfigError("--out: a figure is drawn by `fedbench bench scaling` alone.")
        scaling_figure.check_path(args.out)
    names = [name for name in BENCHES if name not in _APART] if args.bench == "all" else [args.bench]
    results = {name: one(name, replace(_DEFAULTS.get(name, Options()), **said)) for name in names}
    found = {name: result for name, result in results.items() if result is not None}
    if not found:
        return EXIT_OK  # a rank that has no numbers
    if args.out is not None:
        scaling_figure.write(found["scaling"], args.out)
        print(args.out, file=sys.stderr)
    if args.json:
        print(json.dumps(found if args.bench == "all" else found[args.bench], indent=2))
        return EXIT_OK
    for result in found.values():
        show(result)
    return EXIT_OK


def one(name: str, options: Options) -> dict[str, Any] | None:
    """Return one benchmark's numbers with its options and provenance; None on a rank that has none."""
    print(f"fedbench: bench {name}, {options.model} ...", file=sys.stderr)
    result = importlib.import_module(f"fedbench.bench.{BENCHES[name]}").run(options)
    if result is None:
        return None
    return {"bench": name, "options": options.tree(), **result, "provenance": provenance.collect({})}


def show(result: Mapping[str, Any]) -> None:
    """Print the numbers of one benchmark for people: everything but samples and provenance."""
    from rich.console import Console
    from rich.table import Table

    if result["bench"] == "scaling":
        Console().print(to_rich(scaling_figure.grid(result)))
        return
    table = Table(title=f"bench {result['bench']}: " + ", ".join(f"{k} {v}" for k, v in result["options"].items()))
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, value in _leaves(result):
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in tree.items():
        if name in {"bench", "options", "provenance"} or name.startswith("samples"):
            continue
        if prefix == "" and name == f"threads_{tree['options']['threads']}":
            continue  # stands on top
        if isinstance(value, Mapping):
            rows.extend(_leaves(value, f"{prefix}{name}."))
        else:
            rows.append((prefix + name, value))
    return rows
