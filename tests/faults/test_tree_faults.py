"""Edges that die or stand still, and devices that do below one: all ranks end, and what was said names who it was.

Each cell is a job of five ranks (cloud, two edges, two ranks with devices); two run at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import mpi
import pytest

from fedbench.base.errors import EXIT_STOPPED, EXIT_USER

from ledger import Ledger  # isort: skip
from small_job import FAULT_DEADLINE_S, faulty, run_files, write_job  # isort: skip

pytestmark = [pytest.mark.spmd, pytest.mark.faults]

RANKS, EDGE, HOST = 5, 1, 3
#: `comm.deadline_s` where a rank stands still: more than a first round takes on a busy machine.
STILL_S = 10.0


class Cell(NamedTuple):
    """What happens to which rank, the deadline of its job, and words on stderr that tell it."""

    fault: str
    rank: int
    deadline_s: float
    told: tuple[str, ...]


CELLS = {
    "edge raises": Cell("raise", EDGE, 60.0, (f"fedbench: rank {EDGE} on ", "round 1: RuntimeError: injected fault")),
    "edge is killed": Cell("kill9", EDGE, 60.0, (f"rank {EDGE} ",)),
    "edge stands still": Cell("stop", EDGE, STILL_S, ("WireError: After ", f", by edge rank {EDGE} on ")),
    "device stands still": Cell(
        "stop", HOST, STILL_S, (f"WireError: After {STILL_S:g} s: rank {EDGE} on ", f"device 0 (rank {HOST} on ")
    ),
}


def play(cell: Cell, folder: Path) -> tuple[mpi.Ended, float, Path]:
    """Return what became of the job of a cell, when the fault came, and where its run file would be."""
    job, mark = write_job(folder, deadline_s=cell.deadline_s), folder / "mark"
    words = [mpi.console_script(), "run", str(job), "-n", str(RANKS), "--results", str(folder)]
    words += ["--set", "comm.topology=tree", "--set", "comm.edges=2"]
    ended = mpi.run(words, folder / "log", faulty(cell.fault, cell.rank, "round", mark))
    return ended, float(mark.read_text().split()[0]) if mark.exists() else float("nan"), folder


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[tuple[mpi.Ended, float, Path]]]]:
    """Start all jobs."""
    mpi.launcher()
    folder = tmp_path_factory.mktemp("tree")
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(play, cell, folder / name.replace(" ", "-")) for name, cell in CELLS.items()}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", CELLS)
def test_all_ranks_end_and_the_cause_names_who_it_was(
    jobs: dict[str, Future[tuple[mpi.Ended, float, Path]]], name: str, ledger: Ledger
) -> None:
    (ended, fault_at, folder), cell = jobs[name].result(), CELLS[name]
    noticed = ended.code not in (0, EXIT_USER, EXIT_STOPPED) and not ended.left
    told = all(words in ended.err for words in cell.told)
    ledger.note(
        "an edge, or a device below one, dies or stops", noticed=noticed, cause=told, counted=len(run_files(folder))
    )
    assert ended.code not in (0, EXIT_USER, EXIT_STOPPED), ended.told()
    assert not ended.left, ended.told()
    assert not run_files(folder), ended.told()
    waited = 2 * cell.deadline_s if cell.fault == "stop" else 0.0
    assert ended.ended_at - fault_at < waited + FAULT_DEADLINE_S, ended.told()
    for words in cell.told:
        assert words in ended.err, f"{words!r} is not on stderr\n{ended.told()}"
