"""Faults at keyed random moments of real jobs: kill -9 and SIGSTOP of one process, full and read-only disks, set clocks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import mpi
import numpy as np
import pytest

from fedbench.base import rng
from fedbench.base.errors import EXIT_OK, EXIT_STOPPED, EXIT_USER
from fedbench.base.records import DEVICE_COLUMNS, ROUND_COLUMNS
from fedbench.results import reader

from damage import readable  # isort: skip
from ledger import Ledger  # isort: skip
from small_job import FAULT_DEADLINE_S, faulty, run_files, strikes, write_job  # isort: skip

pytestmark = [pytest.mark.spmd, pytest.mark.faults]

ROUNDS = 6
ROUND_S = 0.25
AT_ONCE = 2
STILL_S = 6.0


class Moment(NamedTuple):
    """One fault: of what kind, the how many-th of it, on how many ranks, and when (round, and how far into it)."""

    kind: str
    number: int
    ranks: int
    round: int
    part: float


def moments() -> list[Moment]:
    """Return all faults, every kind with its own keyed moments."""
    found = []
    for kind, (times, *ranks) in KINDS.items():
        draw = rng.generator(0, f"test-moments-{kind}")
        for number in range(times):
            moment = int(draw.integers(0, ROUNDS - 1)), round(float(draw.uniform(0, 1)), 3)
            found.append(Moment(kind, number, ranks[number % len(ranks)], *moment))
    return found


#: Kind -> how often, and on how many ranks by turns.
KINDS: dict[str, tuple[int, ...]] = {
    "kill -9 of a device rank": (4, 3),
    "kill -9 of rank 0": (4, 3),
    "kill -9 of the launcher": (5, 3),
    "kill -9 of the supervisor": (4, 2),
    "SIGSTOP of a rank": (6, 2),
    "full disk under a job": (8, 1, 2),
    "read-only results folder": (2, 1, 2),
    "results folder turns read-only": (8, 1, 2),
    "clock set during a job": (8, 1, 2),
}
MOMENTS = moments()
#: What the default run takes of them.
QUICK = {
    ("kill -9 of the supervisor", 0),
    ("full disk under a job", 0),
    ("results folder turns read-only", 0),
    ("clock set during a job", 0),
}


def command(folder: Path, ranks: int, results: Path, deadline_s: float = 60.0) -> list[str]:
    job = write_job(folder, rounds=ROUNDS, deadline_s=deadline_s)
    saved = ["--set", "results.checkpoint_every=1", "--set", 'method.name="fedspzo"']
    return [mpi.console_script(), "run", str(job), "-n", str(ranks), "--results", str(results), *saved]


class Outcome(NamedTuple):
    """What became of a job: its end, seconds from the fault to it, complete run files then, and of what went on after."""

    folder: Path
    ended: mpi.Ended
    took_s: float
    complete: int
    after: mpi.Ended | None


def strike(moment: Moment, folder: Path) -> Outcome:
    """Send a signal to one process of a job; where nobody is left to end the others, they are let go on."""
    mark, still = folder / "mark", moment.kind.startswith("SIGSTOP")
    words = command(folder, moment.ranks, folder, STILL_S if still else 60.0)
    running = mpi.Job(words, folder / "log", faulty("note", 0, "rounds", mark))
    running.until(lambda: strikes(mark) > moment.round, "the round has begun")
    time.sleep(moment.part * ROUND_S)
    ranks = running.ranks()
    victims: dict[str, Callable[[], int | None]] = {
        "kill -9 of a device rank": lambda: ranks.get(1 + moment.number % (moment.ranks - 1)),
        "kill -9 of rank 0": lambda: ranks.get(0),
        "kill -9 of the launcher": lambda: next(iter(running.launchers()), None),
        "kill -9 of the supervisor": lambda: running.process.pid,
        "SIGSTOP of a rank": lambda: ranks.get(moment.number % moment.ranks),
    }
    victim = victims[moment.kind]()
    assert victim is not None, "the job had ended before its fault"
    since = time.time()
    os.kill(victim, signal.SIGSTOP if still else signal.SIGKILL)
    if moment.kind == "kill -9 of the supervisor":
        running.process.wait()
        running.orphans_end(FAULT_DEADLINE_S + 20)
    ended = running.wait()
    complete = sum(path.suffix == ".h5" for path in run_files(folder))
    again = moment.kind in ("kill -9 of the launcher", "kill -9 of the supervisor")
    after = mpi.run([*words, "--resume"], folder / "after", faulty()) if again else None
    return Outcome(folder, ended, ended.ended_at - since, complete, after)


#: Arguments: results folder, KiB of it, folder to copy to, the command. Mounts are seen by this shell alone.
FULL = """
mkdir -p "$1"; mount -t tmpfs -o size="$2"k none "$1" || exit 99
results=$1; out=$3; shift 3
"$@"; code=$?
find "$results" -type f > "$out"/found
mount -o remount,size=64m "$results"
echo "fault over" >&2
"$@" --resume > /dev/null 2> "$out"/second; echo $? > "$out"/second_code
cp -r "$results" "$out"/copied
exit $code
"""
#: The folder turns read-only once the mark has so many lines and some time has passed, and can be written again later.
#: A mount of itself lies over it, since one with files that are open for writing can't be turned.
TURNS = """
mkdir -p "$1"
results=$1; mark=$2; rounds=$3; pause=$4; out=$5; shift 5
"$@" & job=$!
until [ -f "$mark" ] && [ "$(wc -l < "$mark")" -gt "$rounds" ]; do sleep 0.02; done
sleep "$pause"
mount --bind "$results" "$results" && mount -o remount,ro,bind "$results" || exit 99
wait $job; code=$?
umount "$results"
find "$results" -name '*.h5' > "$out"/found
"$@" --resume > "$out"/second_out 2> "$out"/second; echo $? > "$out"/second_code
exit $code
"""
READ_ONLY = """
mkdir -p "$1"; mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" || exit 99
out=$3; shift 3
"$@"; code=$?
exit $code
"""


def on_disk(moment: Moment, folder: Path) -> Outcome:
    """Run a job on a disk that is too small by a random part of what it takes, or read-only, in a mount namespace."""
    folder.mkdir(parents=True)
    results, script = folder / "results", FULL if moment.kind.startswith("full") else READ_ONLY
    kib = int(rng.generator(moment.number, "test-small-disk").uniform(1, NEEDED_KIB))
    words = [str(results), str(kib), str(folder), *command(folder, moment.ranks, results)]
    since = time.time()
    ended = mpi.run(["unshare", "--mount", "sh", "-c", script, "sh", *words], folder / "log", faulty())
    return Outcome(
        folder, ended, time.time() - since, len(list(results.rglob("*.h5"))) if results.exists() else 0, None
    )


def on_a_disk_that_turns(moment: Moment, folder: Path) -> Outcome:
    """Run a job whose results folder turns read-only at a moment, and again when it can be written."""
    folder.mkdir(parents=True)
    results, mark = folder / "results", folder / "mark"
    turn = [str(results), str(mark), str(moment.round), f"{moment.part * ROUND_S:.3f}", str(folder)]
    noting = faulty("note", 0, "rounds", mark) | {"FEDBENCH_FAULT_ALONE": "0"}
    since = time.time()
    words = [*turn, *command(folder, moment.ranks, results)]
    ended = mpi.run(["unshare", "--mount", "sh", "-c", TURNS, "sh", *words], folder / "log", noting)
    return Outcome(folder, ended, time.time() - since, len((folder / "found").read_text().split()), None)


#: What two checkpoints and the run file of this job take, a little less.
NEEDED_KIB = 2500


def with_clock(moment: Moment, folder: Path) -> Outcome:
    """Run a job whose wall clock jumps on and back at every so many looks."""
    draw = rng.generator(moment.number, "test-clock")
    step_s = float(draw.choice([-1, 1]) * 10 ** draw.uniform(1, 8))
    stepping = {"FEDBENCH_FAULT_CLOCK": f"{step_s}:{int(draw.integers(1, 5))}"}
    words = command(folder, moment.ranks, folder)
    since = time.time()
    ended = mpi.run(words, folder / "log", faulty() | stepping)
    return Outcome(folder, ended, time.time() - since, len(run_files(folder)), None)


def play(moment: Moment, folder: Path) -> Outcome:
    if "turns" in moment.kind:
        return on_a_disk_that_turns(moment, folder)
    if "disk" in moment.kind or "read-only" in moment.kind:
        return on_disk(moment, folder)
    return with_clock(moment, folder) if "clock" in moment.kind else strike(moment, folder)


def can_mount() -> bool:
    """Return whether this process may mount in a namespace of its own (root, as a rule)."""
    if shutil.which("unshare") is None:
        return False
    tried = subprocess.run(
        ["unshare", "--mount", "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"], check=False, capture_output=True
    )
    return tried.returncode == 0


needs_mounts = pytest.mark.skipif(not can_mount(), reason="small and read-only file systems take root's right to mount")


@pytest.fixture(scope="module")
def jobs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[Any, Future]]:
    """Start the job without a fault, and all that are chosen, two at a time."""
    mpi.launcher()
    chosen = mpi.chosen(request, "moment")
    folder = tmp_path_factory.mktemp("moments")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        alone = command(folder / "straight", 1, folder / "straight")
        found: dict[Any, Future] = {None: pool.submit(mpi.run, alone, folder / "straight" / "log", faulty())}
        for number, moment in enumerate(chosen):
            if can_mount() or not any(word in moment.kind for word in ("disk", "read-only")):
                found[moment] = pool.submit(play, moment, folder / str(number))
        yield found
        pool.shutdown(cancel_futures=True)


def hashes(path: Path) -> tuple[str, str]:
    summary = reader.read(path).summary
    return summary.trajectory_sha256, summary.weights_sha256


def straight(jobs: Mapping[Any, Future]) -> tuple[str, str]:
    ended: mpi.Ended = jobs[None].result()
    assert ended.code == EXIT_OK, ended.told()
    return hashes(Path(ended.out.strip()))


def went_on(folder: Path, run_file: Path, jobs: Mapping[Any, Future]) -> bool:
    """Return whether the job that was started again when its disk was sound ended in the bits of the straight one."""
    return (folder / "second_code").read_text().strip() == "0" and hashes(run_file) == straight(jobs)


def params(*kinds: str) -> list[Any]:
    return [
        pytest.param(m, id=f"{m.kind}-{m.number}", marks=() if (m.kind, m.number) in QUICK else (pytest.mark.slow,))
        for m in MOMENTS
        if m.kind in kinds
    ]


def said(ended: mpi.Ended, *words: str) -> bool:
    """Return whether a line of stderr has all words."""
    return any(all(word in line for word in words) for line in ended.err.splitlines())


def failed(ended: mpi.Ended) -> bool:
    return ended.code not in (EXIT_OK, EXIT_USER, EXIT_STOPPED)


SIGNALLED = {
    "kill -9 of a device rank": ("signal 9",),
    "kill -9 of rank 0": ("signal 9",),
    "kill -9 of the launcher": ("fedbench: the launcher was ended by SIGKILL",),
    "SIGSTOP of a rank": ("WireError: After ",),
}


@pytest.mark.parametrize("moment", params(*SIGNALLED))
def test_one_process_is_lost_and_all_end(jobs: Mapping[Any, Future], moment: Moment, ledger: Ledger) -> None:
    outcome: Outcome = jobs[moment].result()
    ended, after = outcome.ended, outcome.after
    noticed, cause = failed(ended) and not ended.left, said(ended, *SIGNALLED[moment.kind])
    good = None if after is None else after.code == EXIT_OK and hashes(Path(after.out.strip())) == straight(jobs)
    ledger.note(moment.kind, noticed=noticed, cause=cause, good=good, counted=outcome.complete)
    waited = 2 * STILL_S if moment.kind.startswith("SIGSTOP") else 0.0
    assert outcome.took_s < waited + FAULT_DEADLINE_S, ended.told()
    assert (noticed, cause, outcome.complete) == (True, True, 0), ended.told()
    assert good in (None, True), after


@pytest.mark.parametrize("moment", params("kill -9 of the supervisor"))
def test_ranks_without_a_supervisor_end_or_finish(jobs: Mapping[Any, Future], moment: Moment, ledger: Ledger) -> None:
    """Nobody is left to tell; the ranks don't stay, and the same command goes on to the same bits."""
    outcome: Outcome = jobs[moment].result()
    assert outcome.after is not None
    good = outcome.after.code == EXIT_OK and hashes(Path(outcome.after.out.strip())) == straight(jobs)
    ledger.note(moment.kind, good=good and not outcome.ended.left, lost=int(bool(outcome.complete) and not good))
    assert not outcome.ended.left, outcome.ended.told()
    assert good, outcome.after.told()


@needs_mounts
@pytest.mark.parametrize("moment", params("full disk under a job"))
def test_a_full_disk_fails_the_job_and_room_lets_it_go_on(
    jobs: Mapping[Any, Future], moment: Moment, ledger: Ledger
) -> None:
    outcome: Outcome = jobs[moment].result()
    ended = outcome.ended
    folder = outcome.folder
    found = [Path(line) for line in (folder / "found").read_text().splitlines()]
    counted = sum(path.suffix == ".h5" for path in found)
    cause = said(ended, "can't be written: No space left on device")
    (path,) = (folder / "copied" / "runs").glob("*.h5")
    good = went_on(folder, path, jobs)
    ledger.note(moment.kind, noticed=failed(ended), cause=cause, good=good, counted=counted)
    assert (failed(ended), cause, good, counted) == (True, True, True, 0), ended.told()
    assert not ended.left


@needs_mounts
@pytest.mark.parametrize("moment", params("read-only results folder"))
def test_a_read_only_folder_is_told(jobs: Mapping[Any, Future], moment: Moment, ledger: Ledger) -> None:
    outcome: Outcome = jobs[moment].result()
    noticed = outcome.ended.code == EXIT_USER  # told before the first round
    cause = said(outcome.ended, "results", "can't be written: Read-only file system")
    ledger.note(moment.kind, noticed=noticed, cause=cause, counted=outcome.complete)
    assert (noticed, cause, outcome.complete) == (True, True, 0), outcome.ended.told()


@needs_mounts
@pytest.mark.parametrize("moment", params("results folder turns read-only"))
def test_a_folder_that_turns_read_only_fails_the_job_and_lets_it_go_on_when_it_can_be_written(
    jobs: Mapping[Any, Future], moment: Moment, ledger: Ledger
) -> None:
    outcome: Outcome = jobs[moment].result()
    ended, folder = outcome.ended, outcome.folder
    cause = said(ended, "results", "can't be written: Read-only file system")
    good = went_on(folder, Path((folder / "second_out").read_text().strip()), jobs)
    ledger.note(moment.kind, noticed=failed(ended), cause=cause, good=good, counted=outcome.complete)
    assert (failed(ended), cause, good, outcome.complete) == (True, True, True, 0), ended.told()
    assert not ended.left


@pytest.mark.parametrize("moment", params("clock set during a job"))
def test_a_clock_that_is_set_changes_no_number(jobs: Mapping[Any, Future], moment: Moment, ledger: Ledger) -> None:
    """Times are those of a clock that nobody sets: they are not negative, and add up to no more than it took."""
    outcome: Outcome = jobs[moment].result()
    ended = outcome.ended
    assert ended.code == EXIT_OK, ended.told()
    run = reader.read(Path(ended.out.strip()))
    tables = ((run.rounds, ROUND_COLUMNS), (run.devices, DEVICE_COLUMNS))
    times = [table[name] for table, columns in tables for name, column in columns.items() if column.unit == "s"]
    sound = all(np.nanmin(values, initial=0.0) >= 0 for values in times)
    within = float(np.nansum(run.rounds["round_s"])) < outcome.took_s
    same = (run.summary.trajectory_sha256, run.summary.weights_sha256) == straight(jobs)
    ledger.note(moment.kind, good=sound and within and same)
    assert (sound, within, same) == (True, True, True)


def disk_lines(folder: Path) -> list[dict[str, Any]]:
    """Return what `disk_child.py` tells."""
    child = ["unshare", "--mount", sys.executable, str(Path(__file__).with_name("disk_child.py")), str(folder)]
    ran = subprocess.run(child, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


@needs_mounts
def test_writers_on_full_and_read_only_disks(tmp_path: Path, ledger: Ledger) -> None:
    """A file is there whole or as it was, nothing is left beside it, and the cause names the file."""
    before = {"done": [0, 1], "collected": 2, "checkpoint": 1, "failure": "killed", "leftovers": []}
    written = {
        "run file": {"done": [0, 1, 2]},
        "checkpoint": {"checkpoint": 2},
        "failures.jsonl": {"failure": "againagain"},
        "all.h5": {"collected": 3},
    }
    told = 0
    for line in disk_lines(tmp_path):
        action, error = line["action"], line["told"]
        expected = before | ({"done": [0, 1, 2]} if action == "all.h5" else {}) | ({} if error else written[action])
        kept = {name: line[name] for name in expected} == expected
        cause = readable(error, "can't be written: ") if error else None
        lost = len(set(expected["done"]) - set(line["done"])) + max(0, 2 - line["collected"])
        counted = len(set(line["done"]) - set(expected["done"]))
        if error:  # else there was room
            name = f"{line['fault']}, writing {action}"
            ledger.note(name, noticed=True, cause=cause, good=kept, lost=lost, counted=counted)
        assert kept, line
        assert cause in (None, True), error
        told += bool(error)
    assert told >= 20
