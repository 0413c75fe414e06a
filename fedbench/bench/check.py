"""The verb `check`: is this machine fit for fedbench? One table, and what to do about every line that is not.

Started alone it starts a small world of its own by the launcher that `fedbench run -n` uses; under a user's launcher it
looks at that world, and rank 0 speaks.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any, TextIO

from fedbench.base import provenance
from fedbench.base.errors import EXIT_FAILURE, EXIT_OK, ConfigError, FedbenchError
from fedbench.bench import fit, fit_disk, fit_host, fit_slurm, fit_world, ranks
from fedbench.bench.fit import Row
from fedbench.bench.harness import Options
from fedbench.run import launch, supervise

_RANKS = 2

#: What to do where there is no world: without a launcher of its own, with one, and under the user's.
_ALONE = "pip install 'fedbench[mpi]', or start it by the site's own: mpirun -n 2 fedbench check"
_BROKEN = (
    "the launcher is there, but its ranks became no world: see MPI's own message, and check OMPI_MCA_* and the like in the "
    "environment, and the network's provider"
)
_STARTED = (
    "use the launcher of the MPI library that mpi4py was built for; in Slurm srun --mpi=pmix for Open MPI, --mpi=pmi2 for "
    "MPICH, or mpirun inside the allocation"
)

#: How long the world of `check` may take before it is ended.
_DEADLINE_S = 180.0


def run(args: argparse.Namespace) -> int:
    """Return 0 where this machine is fit, 1 where it is not; the table or its JSON goes to stdout."""
    launched = launch.launched_size()
    asked = launched or args.ranks or _RANKS
    found, world = _world(asked, args.threads)
    if launch.launched_rank() > 0:
        return EXIT_OK
    here = asked if found is None else max(found["hosts"].count(host) for host in found["hosts"])
    rows = [*world, *fit_disk.rows(args.results), *fit_host.rows(here, args.threads), *fit_slurm.rows()]
    fit_here = fit.is_fit(rows)
    if args.json:
        tree = {"fit": fit_here, "rows": fit.as_json(rows), "world": found, "provenance": provenance.collect({})}
        print(json.dumps(tree, indent=2))
    else:
        _show(rows)
    return EXIT_OK if fit_here else EXIT_FAILURE


def _world(asked: int, threads: int) -> tuple[dict[str, Any] | None, list[Row]]:
    """Return what the ranks found and its rows; nothing and one failing row where they are no world."""
    if asked == 1:
        return None, [Row("world", "1 rank: not looked at", "2 ranks or more", "warn", "start 2 or more: -n 2")]
    needed, launched, heard = f"{asked} rank(s) that find each other", launch.launched_size(), _Heard(sys.stderr)
    try:
        if launched is None:
            supervise.mpirun()
    except ConfigError as error:
        return None, [Row("world", str(error), needed, "fail", _ALONE)]
    try:
        with _ended_after(_DEADLINE_S), redirect_stderr(heard):
            found = ranks.measured("fit_world", Options(ranks=asked, threads=threads))
    except FedbenchError as error:
        said = " ".join(filter(None, (str(error), heard.cause())))
        return None, [Row("world", said, needed, "fail", _BROKEN if launched is None else _STARTED)]
    return found, [] if found is None else fit_world.rows(found, asked, threads)


class _Heard(io.TextIOBase):
    """Passes on what is written to a stream, and knows the first line of it that says something."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._text = ""

    def write(self, text: str) -> int:
        """Pass text on."""
        self._text += text
        return self._stream.write(text)

    def flush(self) -> None:
        """Flush what was passed on."""
        self._stream.flush()

    def fileno(self) -> int:
        """Return the descriptor of the stream, which the handler of crashes writes to."""
        return self._stream.fileno()

    def cause(self) -> str:
        """Return the first line with words in it, or nothing."""
        return next((line.strip() for line in self._text.splitlines() if re.search(r"\w{3}", line)), "")


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """Send this process the two signals that end a supervised world, unless the block is over by then."""
    over = threading.Event()

    def watch() -> None:
        for wait_s in (seconds, 5.0):
            if over.wait(wait_s):
                return
            os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=watch, name="deadline", daemon=True)
    if launch.launched_size() is None:
        watcher.start()
    try:
        yield
    finally:
        over.set()


def _show(rows: Sequence[Row]) -> None:
    """Print the table, and below it what to do."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("check", "found", "needed", "verdict"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(row.check, escape(row.value), escape(row.needed), f"[{colours[row.verdict]}]{row.verdict}[/]")
    # A launcher may give its ranks a terminal though it writes to a file itself.
    console = Console(highlight=False, color_system=None if launch.launched_size() else "auto")
    console.print(table)
    for row in rows:
        if row.advice:
            console.print(
                f"[{colours[row.verdict]}]{row.verdict}[/] {row.check}: {escape(row.advice)}.", soft_wrap=True
            )
    bad = sum(row.verdict == "fail" for row in rows)
    console.print("This machine is fit." if not bad else f"This machine is not fit: {bad} line(s) failed.")
