"""Whatever one rank dies of, the whole job ends at once, with a non-zero status and the cause on stderr.

Each cell is a real job of three ranks in which `inject/sitecustomize.py` makes one rank
misbehave at the start of round 1. Cells run two at a time in the background; each test waits for its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import mpi
import pytest

from fedbench.base.errors import EXIT_STOPPED, EXIT_USER
from fedbench.results import reader

from ledger import Ledger  # isort: skip
from small_job import FAULT_DEADLINE_S, faulty, run_files, write_job  # isort: skip

pytestmark = [pytest.mark.spmd, pytest.mark.faults]

RANKS = 3
AT_ONCE = 2

#: Fault -> words that tell its cause on stderr, beside the rank and the round; None: the process can't say anything.
FAULTS: dict[str, tuple[str, ...] | None] = {
    "raise": ("RuntimeError: injected fault", "Traceback"),
    "exit0": ("SystemExit(0)",),
    "exit3": ("SystemExit(3)",),
    "thread": ("thread injected died of RuntimeError: injected fault", "Traceback"),
    "sigint": ("KeyboardInterrupt",),
    "_exit0": None,
    "_exit3": None,
    "kill9": None,
}

#: Launch form -> the words before `run`, and whether fedbench itself starts and supervises `mpirun`.
FORMS: dict[str, Callable[[], list[str]]] = {
    "console": lambda: [mpi.console_script()],
    "module": lambda: [sys.executable, "-m", "fedbench"],
    "mpirun-console": lambda: mpi.mpirun(RANKS, mpi.console_script()),
    "mpirun-module": lambda: mpi.mpirun(RANKS, sys.executable, "-m", "fedbench"),
}
#: Forms that see all faults in the default run; the others see the two that need the product's own care most.
FULL_FORMS = ("console", "mpirun-console")
QUICK_FAULTS = ("exit0", "kill9")


class Cell(NamedTuple):
    """One job: what happens to which rank under which form of launch."""

    fault: str
    rank: int
    form: str


def cells() -> list[object]:
    """Return the whole cross; what the default run leaves out is marked slow."""
    table = []
    for form in FORMS:
        for fault in FAULTS:
            for rank in (0, 1):
                quick = form in FULL_FORMS or fault in QUICK_FAULTS
                marks = () if quick else (pytest.mark.slow,)
                table.append(pytest.param(Cell(fault, rank, form), id=f"{fault}-rank{rank}-{form}", marks=marks))
    return table


class Outcome(NamedTuple):
    """What became of a cell's job, and when the fault was injected (None: never)."""

    ended: mpi.Ended
    fault_at: float | None
    folder: Path


def play(cell: Cell, folder: Path) -> Outcome:
    """Run the job of one cell."""
    job = write_job(folder)
    words = [*FORMS[cell.form](), "run", str(job), "--results", str(folder)]
    if not cell.form.startswith("mpirun"):
        words += ["-n", str(RANKS)]
    mark = folder / "fault_at"
    ended = mpi.run(words, folder / "log", faulty(cell.fault, cell.rank, "round", mark))
    return Outcome(ended, float(mark.read_text().split()[0]) if mark.exists() else None, folder)


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Cell, Future[Outcome]]]:
    """Start the jobs of all chosen cells, in the order of their tests."""
    mpi.launcher()
    chosen = mpi.chosen(request, "cell")
    folder = tmp_path_factory.mktemp("faults")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {cell: pool.submit(play, cell, folder / "-".join(map(str, cell))) for cell in chosen}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("cell", cells())
def test_the_job_ends_and_says_why(outcomes: dict[Cell, Future[Outcome]], cell: Cell, ledger: Ledger) -> None:
    ended, fault_at, folder = outcomes[cell].result()
    words = FAULTS[cell.fault]
    told = None if words is None else all(word in ended.err for word in (f"fedbench: rank {cell.rank} on ", *words))
    noticed = ended.code not in (0, EXIT_USER, EXIT_STOPPED) and not ended.left
    ledger.note("a rank raises, exits, dies", noticed=noticed, cause=told, counted=len(run_files(folder)))
    assert fault_at is not None, f"the fault was never injected\n{ended.told()}"
    assert ended.code not in (0, EXIT_USER, EXIT_STOPPED), ended.told()
    assert ended.ended_at - fault_at < FAULT_DEADLINE_S, f"{ended.ended_at - fault_at:.1f} s\n{ended.told()}"
    assert not ended.left, ended.told()
    assert not run_files(folder), ended.told()
    assert ended.out.strip() == "", ended.told()
    cause = FAULTS[cell.fault]
    if cause is None:
        return
    for word in (f"fedbench: rank {cell.rank} on ", "round 1: ", *cause):
        assert word in ended.err, f"{word!r} is not on stderr\n{ended.told()}"


def test_the_same_job_without_a_fault_is_done(tmp_path: Path) -> None:
    """The cells above would hold for a job that never works."""
    words = [mpi.console_script(), "run", str(write_job(tmp_path)), "-n", str(RANKS), "--results", str(tmp_path)]
    mpi.launcher()
    ended = mpi.run(words, tmp_path / "log", faulty())
    assert ended.code == 0, ended.told()
    (path,) = run_files(tmp_path)
    assert ended.out == f"{path}\n"
    assert reader.read(path).summary.complete
    assert "prterun" not in ended.err, ended.told()
    assert "Traceback" not in ended.err, ended.told()
