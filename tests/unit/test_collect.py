"""Collecting: all.h5 holds real copies with their hashes, grows by what is new, and never takes what is not sound."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from sweep_files import finish, finished
from synthetic_runs import make_run

from fedbench.__main__ import main
from fedbench.base import fsio
from fedbench.base.errors import EXIT_FAILURE, EXIT_OK, EXIT_USER, ResultError
from fedbench.batch import sweep
from fedbench.batch.manifest import Sweep
from fedbench.results import collect, folder, reader, seal, writer


@pytest.fixture
def swept(tmp_path: Path) -> Sweep:
    """A sweep of three lines, two of them done."""
    swept = finished(tmp_path)
    swept.run_file(swept.lines[2]).unlink()
    return swept


def test_all_that_the_run_files_hold_is_there_with_their_seals(swept: Sweep) -> None:
    path = sweep.collect(swept)
    assert seal.check(path) is seal.Seal.WHOLE
    runs = reader.read_all(path)
    assert sorted(run.summary.run_id for run in runs) == sorted(line.run_id for line in swept.lines[:2])
    for run in runs:
        file = swept.folder / "runs" / f"{run.summary.run_id}.h5"
        own = reader.read(file)
        assert (run.config, run.provenance, run.summary.trajectory_sha256) == (
            own.config,
            own.provenance,
            own.summary.trajectory_sha256,
        )
        for table, other in ((run.rounds, own.rounds), (run.memory, own.memory), (run.spans, own.spans)):
            assert table.keys() == other.keys()
            assert all(
                np.array_equal(table[name], other[name], equal_nan=other[name].dtype.kind == "f") for name in other
            )
        with h5py.File(path) as one, h5py.File(file) as source:
            group = one["runs"][run.summary.run_id]
            assert group.attrs[collect.SOURCE_SHA256] == seal.told(file) != ""
            assert group["rounds/dev_loss"].fletcher32
            assert dict(group["rounds/dev_loss"].attrs) == dict(source["rounds/dev_loss"].attrs)


def test_only_what_is_new_is_added_and_what_lost_its_file_is_kept(
    swept: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    inspect = reader.inspect

    def counting(path: Path, run_id: str) -> reader.Verdict:
        looked.append(run_id)
        return inspect(path, run_id)

    monkeypatch.setattr(reader, "inspect", counting)
    path = swept.folder / collect.NAME
    files = {line.run_id: swept.run_file(line) for line in swept.lines}
    some = {run_id: file for run_id, file in files.items() if file.exists()}
    assert collect.collect(path, some).new == 2
    written = path.stat().st_mtime_ns
    assert collect.collect(path, some).new == 0
    assert path.stat().st_mtime_ns == written
    finish(swept, lambda line: 0.6)
    looked.clear()
    assert collect.collect(path, files).new == 1
    assert looked == [swept.lines[2].run_id]
    grown = {run.summary.run_id: run.rounds["dev_loss"].tobytes() for run in reader.read_all(path)}
    path.unlink()
    assert collect.collect(path, files).new == 3
    assert {run.summary.run_id: run.rounds["dev_loss"].tobytes() for run in reader.read_all(path)} == grown
    assert collect.collect(path, {}).new == 0
    assert len(reader.read_all(path)) == 3
    assert changed_run(swept)
    assert collect.collect(path, files).new == 1


def changed_run(swept: Sweep) -> bool:
    """Write a run anew with another accuracy, as `--force` on another machine may; return whether its seal changed."""
    file = swept.run_file(swept.lines[0])
    before = seal.told(file)
    file.unlink()
    finish(swept, lambda line: 0.9)
    return seal.told(file) != before


def test_what_is_not_sound_is_left_out_and_told_and_the_rest_is_collected(
    swept: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged file is moved into `bad`; one of another run stays; what was collected before stays too."""
    path = sweep.collect(swept)
    before = path.read_bytes()
    first, second, third = map(swept.run_file, swept.lines)
    damaged = second.read_bytes()[:-7]
    third.write_bytes(damaged)
    for held in (0, 1):
        assert main(["sweep", "collect", str(swept.folder)]) == (EXIT_OK if held else EXIT_FAILURE)
        told = capsys.readouterr().err
        assert "2 of 3 run(s), 0 of them new; 1 are not done" in told
        assert (f"{third.name}: changed or cut" in told) == (not held)
    assert [p.name for p in (third.parent / "bad").iterdir()] == [third.name]
    third.write_bytes(second.read_bytes())
    assert main(["sweep", "collect", str(swept.folder)]) == EXIT_FAILURE
    assert f"expected {swept.lines[2].run_id}" in capsys.readouterr().err
    assert third.exists()
    first.write_bytes(damaged)
    assert main(["sweep", "collect", str(swept.folder)]) == EXIT_FAILURE
    assert not first.exists()
    assert path.read_bytes() == before


def test_a_run_file_that_decays_after_it_was_collected_is_named_and_its_copy_is_kept(
    swept: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sweep.collect(swept)
    before = path.read_bytes()
    file = swept.run_file(swept.lines[1])
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert main(["sweep", "collect", str(swept.folder)]) == EXIT_FAILURE
    told = capsys.readouterr().err
    assert f"{file.name}: changed or cut after it was written" in told
    assert f"It was moved to {file.parent / 'bad' / file.name}; {path} keeps the copy that it has." in told
    assert "2 of 3 run(s), 0 of them new" in told
    assert path.read_bytes() == before


def test_of_two_collections_at_a_time_each_keeps_what_the_other_adds(
    swept: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second starts while the first writes."""
    path = swept.folder / collect.NAME
    first, second = ({line.run_id: swept.run_file(line)} for line in swept.lines[:2])
    write, others = fsio.replace_whole, []

    def slow(target: Path, fill: Callable[[Path], None]) -> None:
        if not others:
            others.append(threading.Thread(target=collect.collect, args=(path, second)))
            others[0].start()
            others[0].join(1.0)
        write(target, fill)

    monkeypatch.setattr(fsio, "replace_whole", slow)
    collect.collect(path, first)
    others[0].join()
    assert {run.summary.run_id for run in reader.read_all(path)} == {*first, *second}


def test_a_collection_that_can_not_be_written_leaves_the_old_one(swept: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sweep.collect(swept)
    before = path.read_bytes()
    finish(swept, lambda line: 0.6)

    def full(path: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(fsio, "_fsync", full)
    with pytest.raises(OSError, match="no space"):
        sweep.collect(swept)
    assert path.read_bytes() == before
    assert sorted(p.name for p in swept.folder.glob("*all.h5*")) == ["all.h5"]


def test_a_collection_of_another_schema_is_kept(swept: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sweep.collect(swept)
    before = path.read_bytes()
    monkeypatch.setattr(collect, "SCHEMA_VERSION", collect.SCHEMA_VERSION + 1)
    with pytest.raises(ResultError, match=r"schema version \d+; runs of version \d+ can't be added"):
        sweep.collect(swept)
    assert path.read_bytes() == before


def test_a_damaged_collection_is_put_aside_and_made_anew(swept: Sweep) -> None:
    path = sweep.collect(swept)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(ResultError, match="seal"):
        reader.read_all(path)
    files = {line.run_id: swept.run_file(line) for line in swept.lines[:2]}
    (told,) = collect.collect(path, files).left_out
    assert "made anew" in told
    assert path.read_bytes() == whole
    assert (swept.folder / "bad" / "all.h5").read_bytes() == whole[:-9]


FOREIGN = {
    "an unsealed HDF5 file": lambda path: h5py.File(path, "w").close(),
    "text": lambda path: path.write_text("mine"),
    "nothing": lambda path: path.write_bytes(b""),
    "a folder": lambda path: path.mkdir(),
    "a run file": lambda path: writer.write(path, make_run("fedavg", rounds=2)),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_others_put_in_its_place_is_not_touched(swept: Sweep, kind: str) -> None:
    path = swept.folder / collect.NAME
    FOREIGN[kind](path)
    before = path.is_file() and path.read_bytes()
    with pytest.raises(ResultError, match="Move it away"):
        sweep.collect(swept)
    assert (path.is_file() and path.read_bytes()) == before
    assert path.exists()


def test_reports_read_collections_beside_run_files_and_count_a_run_once(
    swept: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "collect", str(swept.folder)]) == EXIT_OK
    told = capsys.readouterr()
    path = Path(told.out.strip())
    assert "2 of 3 run(s), 2 of them new; 1 are not done" in told.err
    other = tmp_path / "other.h5"
    writer.write(other, make_run("fedavg", rounds=5))
    swept.run_file(swept.lines[0]).unlink()
    for paths in ([path, other], [swept.folder, other], [path, swept.folder, other]):
        runs, skipped = folder.load(paths)
        assert sorted(run.summary.seed for run in runs if run.summary.method == "fedmezo") == [0, 1]
        assert (len(runs), skipped) == (3, [])
    assert main(["show", str(path)]) == EXIT_USER
    assert "holds 2 runs" in capsys.readouterr().err
