"""Files damaged at random places: nothing that was complete is lost, nothing that is not counts, and the cause is told.

Run files, collections, checkpoints, a sweep's own notes, and data sets; all in this process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedbench.__main__ import main
from fedbench.base import rng
from fedbench.base.errors import EXIT_FAILURE, EXIT_OK, ConfigError, DataError, ResultError
from fedbench.batch import done, failures, lock, manifest, sweep
from fedbench.batch.failures import FAILED, Failure
from fedbench.batch.manifest import Sweep
from fedbench.results import collect, folder, reader
from fedbench.run.ckpt import Checkpoint, Store

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from sweep_files import JOB, finish  # isort: skip
from damage import Damage, cut, flip, lose_block, readable  # isort: skip
from ledger import Ledger  # isort: skip

pytestmark = pytest.mark.faults

LINES = 4


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep whose runs are all done, collected, and one of which failed once."""
    place = tmp_path_factory.mktemp("pristine")
    (place / "job.toml").write_text(JOB)
    swept = sweep.make(place / "job.toml", [{}], list(range(LINES)), None, place / "sweep")
    finish(swept, lambda line: 0.5 + line.seed / 10)
    failures.add(swept.folder, Failure(swept.lines[1].run_id, FAILED, "killed"))
    failures.add(swept.folder, Failure(swept.lines[2].run_id, FAILED, "no disk"))
    sweep.collect(swept)
    return swept.folder


def copied(pristine: Path, target: Path) -> Sweep:
    """Return a copy of the pristine sweep in the place of an earlier one."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(pristine, target)
    return manifest.read(target)


def other_run(path: Path, draw: np.random.Generator) -> None:
    others = sorted(other for other in path.parent.glob("*.h5") if other != path)
    path.write_bytes(others[int(draw.integers(len(others)))].read_bytes())


def in_its_place(put: Callable[[Path], object]) -> Damage:
    def damage(path: Path, draw: np.random.Generator) -> None:
        path.unlink()
        put(path)

    return damage


#: Fault -> the damage, how often it is done, and whether something is left there that must be kept.
RUN_FILES: dict[str, tuple[Damage, int, bool]] = {
    "run file cut": (cut, 25, True),
    "run file, one bit flipped": (flip, 40, True),
    "run file, one block lost": (lose_block, 15, True),
    "run file of another run in its place": (other_run, 3, True),
    "something else in a run file's place": (in_its_place(lambda path: path.write_text("not HDF5\n" * 90)), 1, True),
    "an empty file in a run file's place": (in_its_place(Path.touch), 1, True),
    "a folder in a run file's place": (in_its_place(Path.mkdir), 1, True),
    "a pipe in a run file's place": (in_its_place(os.mkfifo), 1, True),
    "a dangling link in a run file's place": (in_its_place(lambda path: path.symlink_to("/nowhere")), 1, False),
}


@pytest.mark.parametrize("fault", RUN_FILES)
def test_damaged_run_files(fault: str, pristine: Path, tmp_path: Path, ledger: Ledger) -> None:
    damage, times, kept = RUN_FILES[fault]
    draw = rng.generator(0, f"test-{fault}")
    for number in range(times):
        swept = copied(pristine, tmp_path / "sweep")
        (swept.folder / collect.NAME).unlink()
        victim = swept.lines[int(draw.integers(LINES))]
        path, others = swept.run_file(victim), {line.run_id for line in swept.lines if line != victim}
        damage(path, draw)
        states = {at.line.run_id: at for at in sweep.states(swept)}
        whole = {run_id for run_id, at in states.items() if at.state == "done"}
        verdict = reader.inspect(path, victim.run_id)
        code = main(["sweep", "collect", str(swept.folder)])
        held = {run.summary.run_id for run in reader.read_all(swept.folder / collect.NAME)}
        if os.path.lexists(path):  # sound, but not this run's: a submit puts it aside, and runs
            reader.quarantine(path)
        finish(swept, lambda line: 0.7)
        again = {at.line.run_id for at in sweep.states(swept) if at.state == "done"}
        cause = readable(verdict.reason, path.name)
        ledger.note(
            fault,
            noticed=victim.run_id not in whole,
            cause=cause,
            good=len(again) == LINES,
            lost=len(others - whole) + len(others - held),
            counted=int(victim.run_id in whole) + int(victim.run_id in held),
        )
        assert (whole, held) == (others, others), f"{number}: {verdict.reason}"
        assert code == (EXIT_FAILURE if kept else EXIT_OK)
        assert os.path.lexists(path.parent / "bad" / path.name), number
        assert cause, verdict.reason
        assert len(again) == LINES


def test_a_run_file_that_decays_with_its_times_unchanged_is_run_again(
    pristine: Path, tmp_path: Path, ledger: Ledger
) -> None:
    """Status may still believe what it saw before; a submit and a collection look again."""
    draw = rng.generator(0, "test-decay")
    for number in range(10):
        swept = copied(pristine, tmp_path / "sweep")
        (swept.folder / collect.NAME).unlink()
        sweep.states(swept)
        victim = swept.lines[int(draw.integers(LINES))]
        path = swept.run_file(victim)
        before = path.stat()
        flip(path, draw)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        due = sweep.to_run(swept)
        found = collect.collect(swept.folder / collect.NAME, sweep.run_files(swept))
        cause = readable(" ".join(found.left_out), path.name)
        lost, counted = LINES - 1 - len(found.held - {victim.run_id}), int(victim.run_id in found.held)
        ledger.note(
            "run file decayed, times unchanged", noticed=due == [victim], cause=cause, lost=lost, counted=counted
        )
        assert (due, cause, lost, counted) == ([victim], True, 0, 0), number


def test_foreign_files_among_run_files_change_no_count(pristine: Path, tmp_path: Path, ledger: Ledger) -> None:
    swept = copied(pristine, tmp_path / "sweep")
    runs = swept.folder / "runs"
    first = swept.run_file(swept.lines[0])
    foreign: dict[str, Callable[[Path], object]] = {
        "copy of x.h5": lambda path: shutil.copy(first, path),
        f"{first.name}.bak": lambda path: shutil.copy(first, path),
        f".{first.name}.0badf00d.tmp": lambda path: path.write_bytes(first.read_bytes()[:1000]),
        "notes.txt": lambda path: path.write_text("mine"),
        "deep/copy.h5": lambda path: (path.parent.mkdir(), shutil.copy(first, path)),
        "garbage.h5": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(900)),
        "folder.h5": Path.mkdir,
    }
    for name, put in foreign.items():
        put(runs / name)
        states = [at.state for at in sweep.states(swept)]
        found, _ = folder.load([swept.folder])
        ledger.note(
            "foreign or copied file among run files",
            good=states == ["done"] * LINES,
            lost=LINES - states.count("done"),
            counted=len(found) - LINES,
        )
        assert states == ["done"] * LINES, name
        assert sorted(run.summary.run_id for run in found) == sorted(line.run_id for line in swept.lines), name
    _, skipped = folder.load([swept.folder])
    assert all(readable(reason, ".h5") for reason in skipped)
    assert {Path(reason.partition(": ")[0]).name for reason in skipped} == {"garbage.h5", "folder.h5"}
    assert all((runs / name).exists() for name in foreign)


@pytest.mark.parametrize(("fault", "damage", "times"), [("cut", cut, 8), ("one bit flipped", flip, 16)])
def test_damaged_collections(
    fault: str, damage: Damage, times: int, pristine: Path, tmp_path: Path, ledger: Ledger
) -> None:
    draw = rng.generator(0, f"test-collection-{fault}")
    sound = (pristine / collect.NAME).read_bytes()
    for number in range(times):
        swept = copied(pristine, tmp_path / "sweep")
        path = swept.folder / collect.NAME
        damage(path, draw)
        damaged = path.read_bytes()
        if number < 2:  # to explain the damage takes a process each
            with pytest.raises(ResultError):
                reader.read_all(path)
        try:
            told = " ".join(collect.collect(path, sweep.run_files(swept)).left_out)
            good = path.read_bytes() == sound and (path.parent / "bad" / path.name).read_bytes() == damaged
        except ResultError as error:  # what is cut within the first bytes is no file of fedbench's, and is left alone
            told, good = str(error), path.read_bytes() == damaged
        noticed = readable(told, path.name)
        whole = [at.state for at in sweep.states(swept)].count("done")
        ledger.note(f"all.h5 {fault}", noticed=noticed, cause=noticed, good=good, lost=LINES - whole)
        assert (noticed, good, whole) == (True, True, LINES), (number, told)


def checkpoint(number: int) -> Checkpoint:
    draw = rng.generator(number, "test-checkpoint")
    arrays = {"weights/a": draw.standard_normal(900).astype(np.float32), "method/b": np.array([number])}
    return Checkpoint(arrays, {"next_round": number, "metrics": {"rows": [{"lr": 0.1}] * number}})


def equal(found: Checkpoint, number: int) -> bool:
    wanted = checkpoint(number)
    arrays = all(found.arrays[name].tobytes() == array.tobytes() for name, array in wanted.arrays.items())
    return arrays and found.state == wanted.state


CHECKPOINTS: dict[str, tuple[Damage, int]] = {
    "cut": (cut, 20),
    "one bit flipped": (flip, 40),
    "one block lost": (lose_block, 10),
    "file gone": (lambda path, draw: path.unlink(), 5),
}


@pytest.mark.parametrize("fault", CHECKPOINTS)
def test_damaged_checkpoints(fault: str, tmp_path: Path, ledger: Ledger) -> None:
    """What comes back is a whole generation, the older one only where the newest is damaged, and that is told."""
    damage, times = CHECKPOINTS[fault]
    draw = rng.generator(0, f"test-checkpoint-{fault}")
    for number in range(times):
        place = tmp_path / str(number)
        writer = Store(place, "config", print)
        for generation in (1, 2, 3):
            writer.save(checkpoint(generation))
        names = sorted(path.name for path in place.iterdir())
        victim = place / names[int(draw.integers(len(names)))]
        newest = victim.stem == (place / "LATEST").read_text()
        damage(victim, draw)
        warned: list[str] = []
        store = Store(place, "config", warned.append)
        found = store.newest()
        assert found is not None
        come_back = int(found.state["next_round"])
        noticed = bool(warned) == newest
        cause = all(readable(text, place.name) for text in warned)
        good = equal(found, come_back) and come_back in (
            (2,) if newest else (2, 3) if victim.name == "LATEST" else (3,)
        )
        store.save(checkpoint(4))
        after = Store(place, "config", warned.append).newest()
        good &= after is not None and equal(after, 4)
        ledger.note(
            f"checkpoint, {fault}", noticed=noticed, cause=cause, good=good, counted=int(not equal(found, come_back))
        )
        assert (noticed, cause, good) == (True, True, True), (number, victim.name, come_back, warned)


#: File of a sweep's folder -> how it is damaged, and how often.
NOTES: dict[str, tuple[str, Damage, int]] = {
    "failures.jsonl cut": (failures.NAME, cut, 6),
    "failures.jsonl, one bit flipped": (failures.NAME, flip, 10),
    "failures.jsonl, one block lost": (failures.NAME, lose_block, 4),
    "done.json cut": (done.NAME, cut, 4),
    "done.json, one bit flipped": (done.NAME, flip, 8),
}


@pytest.mark.parametrize("fault", NOTES)
def test_damaged_notes_of_a_sweep_change_no_verdict(fault: str, pristine: Path, tmp_path: Path, ledger: Ledger) -> None:
    name, damage, times = NOTES[fault]
    draw = rng.generator(0, f"test-{fault}")
    for number in range(times):
        swept = copied(pristine, tmp_path / "sweep")
        swept.run_file(swept.lines[1]).unlink()
        sweep.states(swept)
        damage(swept.folder / name, draw)
        states = [at.state for at in sweep.states(swept)]
        failures.add(swept.folder, Failure(swept.lines[1].run_id, FAILED, "again"))
        again = sweep.status(swept)["runs"][1]
        due = [line.number for line in sweep.to_run(swept)]
        good = (again["state"], again["reason"], due) == ("failed", "again", [1])
        ledger.note(fault, good=good, lost=LINES - 1 - states.count("done"), counted=int(states[1] == "done"))
        assert states.count("done") == LINES - 1, number
        assert states[1] in ("failed", "missing"), number
        assert good, number


@pytest.mark.parametrize(("fault", "damage", "times"), [("cut", cut, 12), ("one bit flipped", flip, 25)])
def test_damaged_manifests(
    fault: str, damage: Damage, times: int, pristine: Path, tmp_path: Path, ledger: Ledger
) -> None:
    """A damaged manifest is refused by its hash."""
    draw = rng.generator(0, f"test-manifest-{fault}")
    for number in range(times):
        copied(pristine, tmp_path / "sweep")
        path = tmp_path / "sweep" / manifest.NAME
        damage(path, draw)
        try:
            manifest.read(path.parent)
            told = ""
        except ConfigError as error:
            told = str(error)
        ledger.note(f"manifest {fault}", noticed=bool(told), cause=readable(told, manifest.NAME))
        assert readable(told, manifest.NAME), (number, told)


def test_file_times_of_a_clock_that_was_set_decide_nothing(pristine: Path, tmp_path: Path, ledger: Ledger) -> None:
    draw = rng.generator(0, "test-file-times")
    for number in range(8):
        swept = copied(pristine, tmp_path / "sweep")
        swept.run_file(swept.lines[0]).unlink()
        store = Store(tmp_path / str(number), "config", print)
        for generation in (1, 2, 3):
            store.save(checkpoint(generation))
        for path in sorted([*swept.folder.rglob("*"), *(tmp_path / str(number)).iterdir()]):
            os.utime(path, (float(draw.uniform(0, 6e9)),) * 2)  # 1970 to 2160
        whole = [at.state for at in sweep.states(swept)].count("done")
        found = Store(tmp_path / str(number), "config", print).newest()
        good = (
            found is not None
            and equal(found, 3)
            and collect.collect(swept.folder / collect.NAME, sweep.run_files(swept))
            == collect.Collected(0, frozenset(line.run_id for line in swept.lines), ())
        )
        ledger.note("file times of a clock that was set", good=good, lost=LINES - 1 - whole)
        assert (whole, good) == (LINES - 1, True)


HOLDER = "import sys, time; from pathlib import Path; from fedbench.batch import lock\n" + (
    "with lock.held(Path(sys.argv[1])), lock.lease(Path(sys.argv[1]), sys.argv[2]):\n    print('held', flush=True)\n"
    "    time.sleep(600)\n"
)


def test_a_lock_and_a_lease_whose_holder_was_killed_are_free(pristine: Path, tmp_path: Path, ledger: Ledger) -> None:
    for number in range(3):
        swept = copied(pristine, tmp_path / "sweep")
        swept.run_file(swept.lines[number]).unlink()
        run_id = swept.lines[number].run_id
        with subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(swept.folder), run_id], stdout=subprocess.PIPE
        ) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            running = lock.running(swept.folder)
            holder.kill()
        stale = lock.running(swept.folder)
        with lock.held(swept.folder), lock.lease(swept.folder, run_id) as lease:
            taken = lease is not None
        whole = [at.state for at in sweep.states(swept)].count("done")
        ledger.note("kill -9 of who holds a sweep's lock", good=taken and not stale, lost=LINES - 1 - whole)
        assert (running, stale, taken, whole) == ({run_id}, set(), True, LINES - 1)


def non_utf8(path: Path, draw: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    content[int(draw.integers(len(content)))] = 0xFF
    path.write_bytes(content)


def cut_within_a_line(path: Path, draw: np.random.Generator) -> None:
    content = path.read_bytes()
    ends = [i for i in range(1, len(content)) if content[i - 1] not in b"\n}"]
    path.write_bytes(content[: ends[int(draw.integers(len(ends)))]])


#: Fault -> damage and times; files are plain or gzip by turns where that makes sense.
DATA: dict[str, tuple[Damage, int]] = {
    "data file gone": (lambda path, draw: path.unlink(), 2),
    "data file cut within a line": (cut_within_a_line, 8),
    "data file with a byte that is no UTF-8": (non_utf8, 8),
    "a folder in a data file's place": (in_its_place(Path.mkdir), 2),
    "gzip data file cut": (cut, 6),
    "gzip data file, one block lost": (lose_block, 4),
}


@pytest.mark.parametrize("fault", DATA)
def test_unreadable_data(fault: str, tmp_path: Path, ledger: Ledger) -> None:
    pytest.importorskip("datasets")
    from textsets import make_set, read_set, records, write

    damage, times = DATA[fault]
    draw = rng.generator(0, f"test-{fault}")
    for number in range(times):
        place = tmp_path / str(number)
        make_set(place)
        split = ("train", "test")[number % 2]
        path = place / f"{split}.jsonl.gz"
        if not fault.startswith("gzip"):
            path.unlink()
            path = write(place, split, records(60), compress=False)
        damage(path, draw)
        with pytest.raises(DataError) as caught:
            read_set(place)
        cause = readable(str(caught.value), f"{split}.jsonl")
        ledger.note(fault, noticed=True, cause=cause)
        assert cause, caught.value
