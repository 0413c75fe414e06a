"""Run files: what is written is read, damage of any kind is noticed, and done means done."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from synthetic_runs import make_codec, make_run

from fedbench.base import identity, records, rng
from fedbench.base.errors import EXIT_USER, ResultError
from fedbench.results import reader, schema, seal, writer


@pytest.fixture(scope="module")
def run() -> records.Run:
    return make_run(rounds=6, codec=make_codec(6))


@pytest.fixture
def path(tmp_path: Path, run: records.Run) -> Path:
    target = tmp_path / "runs" / f"{run.summary.run_id}.h5"
    writer.write(target, run)
    return target


def unsealed(path: Path, target: Path) -> Path:
    """Copy a run file as a foreign tool would: same content, no seal."""
    with h5py.File(path) as source, h5py.File(target, "w") as copy:
        for name, value in source.attrs.items():
            copy.attrs[name] = value
        for name in source:
            source.copy(name, copy)
    return target


def changed_summary(run: records.Run, **values: Any) -> records.Run:
    return dataclasses.replace(run, summary=run.summary.model_copy(update=values))


def test_a_run_comes_back_as_it_was_written(path: Path, run: records.Run) -> None:
    found = reader.read(path)
    assert (found.config, found.provenance, found.summary) == (run.config, run.provenance, run.summary)
    for group in schema.TABLES:
        ours, theirs = getattr(run, group), getattr(found, group)
        assert list(theirs) == list(schema.TABLES[group])
        for name in ours:
            np.testing.assert_array_equal(theirs[name], ours[name])


def test_same_content_gives_the_same_bytes_at_another_time(path: Path, run: records.Run, tmp_path: Path) -> None:
    time.sleep(1.1)  # HDF5 time stamps count seconds
    writer.write(tmp_path / "again.h5", run)
    assert (tmp_path / "again.h5").read_bytes() == path.read_bytes()


def test_every_dataset_says_unit_and_meaning_and_arrays_carry_checksums(path: Path) -> None:
    with h5py.File(path) as file:
        seen = {f"{group}/{name}": file[group][name] for group in file for name in file[group]}
    names = {f"{group}/{name}" for group, columns in schema.TABLES.items() for name in columns}
    assert seen.keys() == names | {f"summary/{name}" for name in schema.SUMMARY}
    with h5py.File(path) as file:
        for name in seen:
            assert isinstance(file[name].attrs["unit"], str)
            assert file[name].attrs["meaning"]
            assert file[name].fletcher32 == (not name.startswith("summary/"))


def test_the_summary_has_a_unit_for_each_figure() -> None:
    assert list(schema.SUMMARY) == list(records.Summary.model_fields)


def test_null_is_nan_on_disk_and_null_again_but_a_nan_stays_one(tmp_path: Path, run: records.Run) -> None:
    nulls = {"rounds_to_target": None, "peak_device_bytes": None, "hidden_fraction": None}
    writer.write(tmp_path / "a.h5", changed_summary(run, **nulls, final_accuracy=float("nan")))
    with h5py.File(tmp_path / "a.h5") as file:
        assert all(np.isnan(file["summary"][name][()]) for name in nulls)
    found = reader.read(tmp_path / "a.h5").summary
    assert all(getattr(found, name) is None for name in nulls)
    assert np.isnan(found.final_accuracy)
    assert '"rounds_to_target":null' in found.model_dump_json()


def test_text_columns_empty_tables_and_long_provenance_survive(tmp_path: Path, run: records.Run) -> None:
    empty = {name: np.array([], "U1" if c.dtype == "str" else c.dtype) for name, c in records.MEMORY_COLUMNS.items()}
    devices = {name: values[:, :0] for name, values in run.devices.items()}
    kinds = ["compute", "wäit", "", *run.spans["kind"].tolist()[3:]]
    spans = run.spans | {"kind": np.array(kinds)}
    odd = dataclasses.replace(run, memory=empty, devices=devices, spans=spans, provenance={"env": "ü" * 200_000})
    writer.write(tmp_path / "odd.h5", odd)
    found = reader.read(tmp_path / "odd.h5")
    assert found.spans["kind"].tolist() == kinds
    assert found.provenance == odd.provenance
    assert found.devices["loss"].shape == (6, 0)
    assert len(found.memory["rank"]) == 0
    writer.write(tmp_path / "no_spans.h5", dataclasses.replace(run, spans={}))
    assert reader.read(tmp_path / "no_spans.h5").spans == {}


REFUSED = [
    ("unknown column", "rounds", lambda t: t | {"lrr": t["lr"]}, "rounds/lrr: unknown column.*Nearest: lr"),
    (
        "missing column",
        "devices",
        lambda t: {k: v for k, v in t.items() if k != "loss"},
        "devices: column loss missing",
    ),
    ("short column", "rounds", lambda t: t | {"lr": t["lr"][:-1]}, r"rounds/lr: found shape \(6,\); expected \(7,\)"),
    ("wrong dimensions", "devices", lambda t: t | {"loss": t["loss"][0]}, "devices/loss: found shape"),
    ("ragged table", "memory", lambda t: t | {"rank": t["rank"][:2]}, "memory/phase: found shape"),
    ("gap in rounds", "rounds", lambda t: t | {"round": t["round"] * 2}, "without gaps"),
    ("fraction of a byte", "rounds", lambda t: t | {"wire_bytes": t["lr"]}, "rounds/wire_bytes: found dtype float64"),
    ("overflow", "rounds", lambda t: t | {"exchanges": np.full(7, 2**40)}, "must fit i4"),
    ("numbers as text", "spans", lambda t: t | {"kind": np.arange(len(t["kind"]))}, "spans/kind: found dtype"),
]


@pytest.mark.parametrize(("group", "change", "message"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_a_table_that_does_not_fit_is_refused(
    tmp_path: Path, run: records.Run, group: str, change: Any, message: str
) -> None:
    bad = dataclasses.replace(run, **{group: change(getattr(run, group))})
    with pytest.raises(ResultError, match=message):
        writer.write(tmp_path / "bad.h5", bad)
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_a_name_that_is_not_that_of_its_config_is_refused(tmp_path: Path, run: records.Run) -> None:
    with pytest.raises(ResultError, match="calls itself other-1"):
        writer.write(tmp_path / "bad.h5", changed_summary(run, run_id="other-1"))


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from synthetic_runs import make_run
from fedbench.base import fsio
from fedbench.results import writer
fsio._fsync = lambda path: os.kill(os.getpid(), signal.SIGKILL)
writer.write(Path(sys.argv[2]), make_run(rounds=9))
"""


def test_a_killed_writer_leaves_no_file_and_an_earlier_one_as_it_was(path: Path, run: records.Run) -> None:
    before = path.read_bytes()
    for target in (path, path.with_name("new.h5")):
        command = [sys.executable, "-c", KILLED_WRITER, str(Path(__file__).parent), str(target)]
        assert subprocess.run(command, check=False, timeout=60).returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.glob("*.h5")] == [path.name]
    assert reader.is_done(path, run.summary.run_id)


def test_any_flipped_bit_is_noticed(path: Path, run: records.Run) -> None:
    whole = path.read_bytes()
    draw = rng.generator(0, "test-flips")
    places = [0, 7, 30, 511, 512, 519, len(whole) - 1, *draw.integers(0, len(whole), 250)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(draw.integers(8))
        path.write_bytes(damaged)
        verdict = reader.inspect(path, run.summary.run_id)
        assert (verdict.done, verdict.damaged) == (False, True), f"byte {place}: {verdict.reason}"


def test_cut_grown_and_foreign_files_are_noticed(path: Path, run: records.Run) -> None:
    whole = path.read_bytes()
    for content in (b"", whole[:300], whole[:600], whole[:-1], whole[: len(whole) // 2], whole + b"\0", b"text" * 400):
        path.write_bytes(content)
        assert reader.inspect(path, run.summary.run_id)[:2] == (False, True), len(content)
    with pytest.raises(ResultError, match="not an HDF5 file"):
        reader.read(path)


def test_a_missing_file_is_not_done_and_not_damaged(tmp_path: Path) -> None:
    assert reader.inspect(tmp_path / "none.h5", "x")[:2] == (False, False)
    with pytest.raises(ResultError, match=r"none.h5: no such run file") as caught:
        reader.read(tmp_path / "none.h5")
    assert caught.value.exit_code == EXIT_USER


def test_a_file_changed_by_hand_names_what_was_found(path: Path, run: records.Run) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["schema_version"] = 7
    with pytest.raises(ResultError, match=r"changed or cut.*found schema version 7; needed: 2"):
        reader.read(path)
    assert not reader.is_done(path, run.summary.run_id)


def test_an_unsealed_copy_is_read_by_way_of_a_child(path: Path, tmp_path: Path, run: records.Run) -> None:
    copy = unsealed(path, tmp_path / "copy.h5")
    assert seal.check(copy) is seal.Seal.ABSENT
    assert reader.is_done(copy, run.summary.run_id)
    assert reader.read(copy).summary == run.summary


UNSEALED = [
    (
        "old schema",
        lambda file: file.attrs.__setitem__("schema_version", 0),
        "schema version 0; needed: 2. Another version of fedbench wrote it",
        False,
    ),
    ("incomplete", lambda file: file.attrs.__setitem__("complete", False), "incomplete", False),
    ("no schema", lambda file: file.attrs.__delitem__("schema_version"), "not a run file", True),
    ("no rounds", lambda file: file.__delitem__("rounds"), "damaged", True),
    ("no column", lambda file: file.__delitem__("rounds/lr"), "column lr missing", True),
    ("fewer rounds than rows", lambda file: file["summary/rounds"].write_direct(np.array(5)), "expected (6,)", True),
]


@pytest.mark.parametrize("case", UNSEALED, ids=[c[0] for c in UNSEALED])
def test_what_does_not_count_as_done(path: Path, tmp_path: Path, run: records.Run, case: Any) -> None:
    _, change, message, damaged = case
    copy = unsealed(path, tmp_path / "copy.h5")
    with h5py.File(copy, "r+") as file:
        change(file)
    verdict = reader.inspect(copy, run.summary.run_id)
    assert (verdict.done, verdict.damaged) == (False, damaged)
    assert message in verdict.reason


def test_without_a_seal_the_checksums_of_arrays_still_notice_a_bit(
    path: Path, tmp_path: Path, run: records.Run
) -> None:
    copy = unsealed(path, tmp_path / "copy.h5")
    with h5py.File(copy) as file:
        place = file["rounds/dev_accuracy"].id.get_chunk_info(0).byte_offset
    content = bytearray(copy.read_bytes())
    content[place + 3] ^= 4
    copy.write_bytes(content)
    assert reader.inspect(copy, run.summary.run_id)[:2] == (False, True)


def test_a_reader_that_never_ends_is_cut_at_the_deadline(
    path: Path, tmp_path: Path, run: records.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = unsealed(path, tmp_path / "copy.h5")
    monkeypatch.setattr(reader, "_CHILD", "while True: pass")
    start = time.monotonic()
    verdict = reader.inspect(copy, run.summary.run_id, deadline_s=0.3)
    assert time.monotonic() - start < 5
    assert (verdict.done, verdict.damaged) == (False, True)
    assert "not read after 0.3 s" in verdict.reason


def test_another_run_other_rows_or_another_stop_are_not_done(tmp_path: Path, path: Path, run: records.Run) -> None:
    assert not reader.is_done(path, "cooperllm-000000000000")
    writer.write(tmp_path / "a.h5", changed_summary(run, stop_reason="killed"))
    assert "stopped by killed" in reader.inspect(tmp_path / "a.h5", run.summary.run_id).reason
    writer.write(tmp_path / "b.h5", changed_summary(run, complete=False))
    assert "incomplete" in reader.inspect(tmp_path / "b.h5", run.summary.run_id).reason
    moved = dataclasses.replace(run, config=run.config | {"results": {"dir": "elsewhere", "checkpoint_every": 9}})
    writer.write(tmp_path / "c.h5", moved)
    assert reader.is_done(tmp_path / "c.h5", identity.run_id(run.config))


def test_a_thousand_files_are_judged_fast(path: Path, run: records.Run) -> None:
    start = time.monotonic()
    for _ in range(200):
        assert reader.is_done(path, run.summary.run_id)
    assert time.monotonic() - start < 30 / 5


def test_quarantine_moves_and_never_replaces(path: Path) -> None:
    content = path.read_bytes()
    first = reader.quarantine(path)
    path.write_bytes(b"other")
    second = reader.quarantine(path)
    assert first == path.parent / "bad" / path.name
    assert (first.read_bytes(), second.read_bytes()) == (content, b"other")
    assert first != second
    assert not os.path.exists(path)
