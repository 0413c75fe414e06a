"""Reading text data: every fault of a data set is one message with its file, and real sets have the known sizes."""

from __future__ import annotations

import gzip
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from realdata import data_folder
from textsets import make_set, read_set, records, write

from fedbench.base.errors import ConfigError, DataError
from fedbench.data import hub, load


def test_a_folder_is_read_whole(tmp_path: Path) -> None:
    train = [{"label": 1, "text": "Ünïcode \u2028 “text”", "extra": 3.5}, {"text": "b", "label": 0, "extra": None}]
    folder = make_set(tmp_path / "s", train=train, dev=records(4))
    raw = read_set(folder)
    assert raw.train.texts == ["Ünïcode \u2028 “text”", "b"]
    assert raw.train.pairs is None
    assert raw.train.labels.tolist() == [1, 0]
    assert raw.train.labels.dtype == np.int64
    assert (len(raw.dev or ()), len(raw.test), raw.label_names) == (4, 10, ("bad", "good"))
    assert set(raw.provenance) == {"name", "train.sha256", "dev.sha256", "test.sha256"}


def test_plain_files_and_no_meta_do_too(tmp_path: Path) -> None:
    write(tmp_path, "train", records(9, classes=3), compress=False)
    write(tmp_path, "test", [*records(3, classes=3), ""], compress=False)
    raw = read_set(tmp_path)
    assert (len(raw.train), len(raw.test), raw.label_names, raw.named) == (9, 3, ("0", "1", "2"), False)


def test_pairs_and_named_columns(tmp_path: Path) -> None:
    rows = [{"a": f"a{i}", "b": f"b{i}", "text": "x", "text2": "y", "label": i % 2} for i in range(4)]
    folder = make_set(tmp_path / "s", train=rows, test=rows)
    assert read_set(folder).train.pairs == ["y"] * 4
    assert read_set(folder, ("text",)).train.pairs is None
    named = read_set(folder, ("b", "a")).train
    assert (named.texts, named.pairs) == (["b0", "b1", "b2", "b3"], ["a0", "a1", "a2", "a3"])


def test_a_folder_without_rows_hides_no_data_set_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "mine" / "runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("FEDBENCH_DATA", str(tmp_path / "sets"))
    with pytest.raises(DataError, match=rf"mine: no train.jsonl.gz .* found: runs. Nor is it in {tmp_path}/sets/mine"):
        load.read("mine", text_columns=("text",), label_column="label")
    (tmp_path / "sets" / "mine").mkdir(parents=True)
    (tmp_path / "sets" / "mine" / "train.jsonl").touch()
    assert load.find_folder("mine") == tmp_path / "sets" / "mine"
    Path("mine", "train.jsonl").touch()
    assert load.find_folder("mine") == Path("mine")


def test_a_name_is_found_under_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_set(tmp_path / "root" / "mine")
    monkeypatch.setenv("FEDBENCH_DATA", str(tmp_path / "root"))
    assert len(read_set("mine").train) == 60
    monkeypatch.delenv("FEDBENCH_DATA")
    work = tmp_path / "work"
    work.mkdir()
    make_set(tmp_path / "shared" / "data" / "other")
    monkeypatch.chdir(work)
    assert len(read_set("other").train) == 60
    make_set(work / "other", train=records(8))  # a folder comes before a name
    assert len(read_set("other").train) == 8


def break_json(folder: Path) -> None:
    write(folder, "train", [*records(5), "{not json", *records(5)])


def cut_gzip(folder: Path) -> None:
    path = folder / "train.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])


def flip_gzip(folder: Path) -> None:
    path = folder / "train.jsonl.gz"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)


def with_row(row: Any, split: str = "train") -> Callable[[Path], Any]:
    """Return a fault: this row is line 4 of a file."""
    good = records(8)
    return lambda folder: write(folder, split, [*good[:3], row, *good[3:]])


def with_meta(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "meta.json").write_text(text)


#: name: (what is done to a good set, the file that the message names, what else it says)
FAULTS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "no train": (
        lambda f: (f / "train.jsonl.gz").unlink(),
        "",
        "no train.jsonl.gz and no train.jsonl; found: meta.json",
    ),
    "no test": (lambda f: (f / "test.jsonl.gz").unlink(), "", "no test.jsonl.gz and no test.jsonl; found"),
    "not gzip": (lambda f: (f / "train.jsonl.gz").write_bytes(b"hello"), "train.jsonl.gz", "broken gzip"),
    "flipped byte in gzip": (flip_gzip, "train.jsonl.gz", "broken gzip"),
    "truncated gzip": (cut_gzip, "train.jsonl.gz", "truncated: the gzip stream ends too early"),
    "zero bytes": (lambda f: (f / "test.jsonl.gz").write_bytes(b""), "test.jsonl.gz", "empty"),
    "blank lines only": (lambda f: write(f, "dev", ["", " "]), "dev.jsonl.gz", "empty"),
    "a folder in its place": (
        lambda f: ((f / "train.jsonl.gz").unlink(), (f / "train.jsonl.gz").mkdir()),
        "",
        "no train.jsonl.gz",
    ),
    "not JSON": (break_json, "train.jsonl.gz", "line 6: not JSON: Expecting property name"),
    "not an object": (with_row("[1, 2]"), "train.jsonl.gz", "line 4: found [1, 2]; allowed is one JSON object a line"),
    "not UTF-8": (
        lambda f: (f / "train.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a", "label": 0}\n{"text": "\xff"}\n')),
        "train.jsonl.gz",
        "line 2: not UTF-8 (byte 37 of the text)",
    ),
    "no such column": (
        lambda f: write(f, "test", [{"sentence": "a", "label": 0}]),
        "test.jsonl.gz",
        "no column 'text' (data.text_columns); found: label, sentence",
    ),
    "no label column": (lambda f: write(f, "train", [{"text": "a"}]), "train.jsonl.gz", "no column 'label'"),
    "a row without label": (with_row({"text": "a"}), "train.jsonl.gz", "line 4: no 'label'; found: text"),
    "a row without text": (with_row({"label": 1}, "test"), "test.jsonl.gz", "line 4: no 'text'; found: label"),
    "a null text": (
        with_row({"text": None, "label": 1}),
        "train.jsonl.gz",
        "line 4: text is None; allowed is a string",
    ),
    "a number as text": (with_row({"text": 5, "label": 1}), "train.jsonl.gz", "line 4: text is 5; allowed is a string"),
    "numbers as texts": (
        lambda f: write(f, "train", [{"text": i, "label": i % 2} for i in range(4)]),
        "train.jsonl.gz",
        "line 1: text is 0; allowed is a string",
    ),
    "an empty text": (with_row({"text": " ", "label": 1}), "train.jsonl.gz", "row 4: the text is empty"),
    "a label with a fraction": (
        with_row({"text": "a", "label": 0.5}),
        "train.jsonl.gz",
        "line 4: label is 0.5; allowed",
    ),
    "a label like 1.0": (with_row({"text": "a", "label": 1.0}), "train.jsonl.gz", "line 4: label is 1.0; allowed"),
    "a label in quotes": (with_row({"text": "a", "label": "1"}), "train.jsonl.gz", "line 4: label is '1'; allowed"),
    "a label that is true": (
        with_row({"text": "a", "label": True}),
        "train.jsonl.gz",
        "line 4: label is True; allowed",
    ),
    "a null label": (with_row({"text": "a", "label": None}), "train.jsonl.gz", "line 4: label is None; allowed"),
    "half a character": (with_row('{"text": "\\ud83d", "label": 0}'), "train.jsonl.gz", "not JSON lines: "),
    "a column twice": (with_row('{"text": "a", "label": 0, "text": "b"}'), "train.jsonl.gz", "specified twice"),
    "dates alone": (
        lambda f: write(f, "train", [{"text": f"2020-01-0{i}", "label": i % 2} for i in range(1, 5)]),
        "train.jsonl.gz",
        "columns of type text timestamp[s], label int64; allowed are strings",
    ),
    "NaN": (with_row('{"text": "a", "label": NaN}'), "train.jsonl.gz", "line 4: label is nan; allowed"),
    "a huge label": (with_row({"text": "a", "label": 10**30}), "train.jsonl.gz", "line 4: label is 1000"),
    "a negative label": (with_row({"text": "a", "label": -1}), "train.jsonl.gz", "row 4: label -1 is out of range"),
    "a label without name": (
        with_row({"text": "a", "label": 2}, "test"),
        "test.jsonl.gz",
        "row 4: label 2 is out of range; allowed is 0 to 1 (2 names in",
    ),
    "a class without train rows": (
        lambda f: write(f, "train", [{"text": f"a{i}", "label": 1} for i in range(4)]),
        "train.jsonl.gz",
        "no row of class 0 (bad)",
    ),
    "a gap in the labels": (
        lambda f: (
            (f / "meta.json").unlink(),
            write(f, "train", [{"text": "a", "label": 0}, {"text": "b", "label": 2}]),
        ),
        "train.jsonl.gz",
        "no row of class 1;",
    ),
    "a far gap in the labels": (
        lambda f: (
            (f / "meta.json").unlink(),
            write(f, "train", [{"text": "a", "label": 0}, {"text": "b", "label": 2**40}]),
        ),
        "train.jsonl.gz",
        "no row of class 1;",
    ),
    "a test label that train lacks": (
        lambda f: ((f / "meta.json").unlink(), write(f, "test", [{"text": "a", "label": 2}])),
        "test.jsonl.gz",
        "label 2 is out of range; allowed is 0 to 1 (train's labels",
    ),
    "one class": (
        lambda f: ((f / "meta.json").unlink(), write(f, "train", [{"text": "a", "label": 0}])),
        "test.jsonl.gz",
        "label 1 is out of range",
    ),
    "pairs in one file alone": (
        lambda f: write(f, "test", [{"text": "a", "text2": "b", "label": 0}]),
        "test.jsonl.gz",
        "column 'text2' must be in all files or in none",
    ),
    "meta is not JSON": (with_meta("{"), "meta.json", "not JSON"),
    "meta is a list": (with_meta("[1]"), "meta.json", "label_names must be a list"),
    "names are no list": (with_meta('{"label_names": "ab"}'), "meta.json", "label_names must be a list"),
    "a name twice": (with_meta('{"label_names": ["a", "a"]}'), "meta.json", "label_names must be a list of different"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_message_with_its_file(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fault, file, says = FAULTS[name]
    folder = make_set(tmp_path / "s")
    read_set(folder)
    fault(folder)
    capfd.readouterr()
    with pytest.raises(DataError) as caught:
        read_set(folder)
    message = str(caught.value)
    assert message.startswith(str(folder / file))
    assert says in message
    assert "\n" not in message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert capfd.readouterr() == ("", "")


def test_reading_touches_no_network_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    folder = make_set(tmp_path / "s")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    read_set(folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert list(temporary.iterdir()) == []


def test_reading_leaves_the_library_as_it_was(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "s")
    level = datasets.utils.logging.get_verbosity()
    for enable in (datasets.disable_progress_bars, datasets.enable_progress_bars):
        enable()
        disabled = datasets.are_progress_bars_disabled()
        read_set(folder)
        assert datasets.are_progress_bars_disabled() == disabled
    assert datasets.utils.logging.get_verbosity() == level


def test_ranks_that_read_at_once_get_the_same(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "s", train=records(2000))
    program = (
        "import sys; from fedbench.data.load import read\n"
        "raw = read(sys.argv[1], text_columns=('text',), label_column='label'); print(raw.train.sha256())"
    )
    command = [sys.executable, "-c", program, str(folder)]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [(*job.communicate(timeout=60), job.returncode) for job in jobs]
    assert answers == [(read_set(folder).train.sha256() + "\n", "", 0)] * 3


def test_importing_the_layer_imports_no_text_package() -> None:
    program = "import sys, fedbench.data.splits; print({'datasets', 'tokenizers', 'transformers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout == "set()\n"


# Names that are no folder


@pytest.mark.parametrize("name", ["./nothing", "/no/such/folder", "a/b/c", "trecc"])
def test_an_unknown_name_says_where_it_was_looked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_set(tmp_path / "trec")
    monkeypatch.setenv("FEDBENCH_DATA", str(tmp_path))
    monkeypatch.setattr(hub, "problem", lambda *_: "the hub can't be reached (no route)")
    with pytest.raises(DataError) as caught:
        read_set(name)
    message = str(caught.value)
    assert f"no folder {name}" in message
    assert f"no folder {tmp_path / name} (FEDBENCH_DATA; it has trec)" in message
    assert ("can't be reached" in message) == (name == "trecc")
    assert message.endswith("Nearest: trec.") == (name == "trecc")


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(DataError, match="empty name"):
        read_set(" ")


def test_an_unreachable_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def fail(_: object, name: str, timeout: float) -> None:
        asked.append((name, timeout))
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(DataError, match=r"can't be reached \(no route to host\)"):
        read_set("nobody/nothing")
    assert asked == [("nobody/nothing", hub.TIMEOUT_S)]


def test_a_hub_set_gives_its_splits_and_names(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    whole = datasets.Dataset.from_dict({"text": ["a", "b", "c", "d"], "label": [0, 1, 1, 0]}, features=features)
    found = datasets.DatasetDict({"train": whole.select([3, 1]), "validation": whole, "test": whole.select([0])})
    monkeypatch.setattr(hub, "problem", lambda *_: "")
    monkeypatch.setattr(datasets, "load_dataset", lambda name: found)
    raw = read_set("someone/something")
    assert (raw.train.texts, raw.train.labels.tolist(), raw.label_names) == (["d", "b"], [0, 1], ("no", "yes"))
    assert raw.dev is not None
    assert raw.dev.texts == ["a", "b", "c", "d"]
    del found["test"]
    with pytest.raises(DataError, match="no split 'test' on the hub; found: train, validation"):
        read_set("someone/something")
    found["test"] = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, None]})
    with pytest.raises(DataError, match=r"someone/something \[test\]: row 2: label is None"):
        read_set("someone/something")


def test_a_missing_package_names_its_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = make_set(tmp_path / "s")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedbench\[text\]'"):
        read_set(folder)


# Real sets

#: name: (classes, train, test, dev, pairs), as the data's README lists them
REAL = {
    "sst2": (2, 6917, 1821, 872, False),
    "agnews": (4, 24148, 7600, None, False),
    "mr": (2, 8528, 2132, None, False),
    "trec": (6, 5441, 500, None, False),
    "rte": (2, 2490, 277, None, True),
}


@pytest.mark.data
@pytest.mark.parametrize("name", REAL)
def test_the_real_sets_are_the_known_ones(name: str) -> None:
    folder = data_folder() / name
    classes, train, test, dev, pairs = REAL[name]
    raw = read_set(folder)
    assert len(raw.label_names) == classes
    assert (len(raw.train), len(raw.test), raw.dev and len(raw.dev)) == (train, test, dev)
    assert (raw.train.pairs is not None) == pairs
    counts = json.loads((folder / "meta.json").read_text())["label_counts"]["train"]
    assert dict(zip(raw.label_names, np.bincount(raw.train.labels).tolist(), strict=True)) == counts
