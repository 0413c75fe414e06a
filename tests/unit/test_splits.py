"""From raw text to splits: who gets which row, that no text is in two of them, and what a job may name."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from realdata import data_folder, minilm_folder
from textsets import NUMBER, make_set, make_tokeniser, read_set, records

from fedbench.base.errors import ConfigError, DataError
from fedbench.base.job import DataSection
from fedbench.data.load import RawSplits
from fedbench.data.splits import load_splits, prepare, shuffle_public
from fedbench.data.tokenise import Tokeniser, load_tokeniser


@pytest.fixture
def tokeniser_folder(tmp_path: Path) -> Path:
    return make_tokeniser(tmp_path / "model")


@pytest.fixture
def tokeniser(tokeniser_folder: Path) -> Tokeniser:
    return load_tokeniser(str(tokeniser_folder))


def prepared(private: RawSplits, public: RawSplits | None, tokeniser: Tokeniser, **more: Any) -> Any:
    settings = {"max_length": 16, "public_per_class": 5, "public_labels": "given", "seed": 0} | more
    return prepare(private, public, tokeniser, **settings)


def row_set(rows: Any) -> set[bytes]:
    return {ids[:length].tobytes() for ids, length in zip(rows.ids, rows.lengths, strict=True)}


def numbers(rows: Any) -> set[int]:
    """Return the ids that follow the word `number`, one a row: each text of `records` has its own."""
    at = np.argmax(rows.ids == NUMBER, axis=1)
    return set(rows.ids[np.arange(len(rows)), at + 1].tolist())


def test_public_rows_leave_train_and_a_tenth_is_dev(tmp_path: Path, tokeniser: Tokeniser) -> None:
    raw = read_set(make_set(tmp_path / "s"))
    splits = prepared(raw, None, tokeniser)
    assert Counter(splits.public.labels.tolist()) == {0: 5, 1: 5}
    assert Counter(splits.dev.labels.tolist()) == {0: 2, 1: 2}  # a tenth of 25, rounded half to even
    assert (len(splits.train), len(splits.test)) == (46, 10)
    assert np.array_equal(splits.train.groups, splits.train.labels)
    parts = [row_set(part) for part in (splits.train, splits.public, splits.dev, splits.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 70


def test_the_seed_decides_the_draws(tmp_path: Path, tokeniser: Tokeniser) -> None:
    raw = read_set(make_set(tmp_path / "s"))
    first, again, other = (prepared(raw, None, tokeniser, seed=seed) for seed in (1, 1, 2))
    for name in ("train", "public", "dev", "test"):
        assert getattr(first, name).sha256() == getattr(again, name).sha256()
        assert (getattr(first, name).sha256() == getattr(other, name).sha256()) == (name == "test")


def test_equal_texts_never_fall_into_two_splits(tmp_path: Path, tokeniser: Tokeniser) -> None:
    """Every train text stands there three times, once with other signs; some are in test and dev as well."""
    base = records(40)
    loud = [{"text": row["text"].upper() + " !?", "label": row["label"]} for row in base]
    folder = make_set(
        tmp_path / "s", train=[*base, *loud, *base], test=loud[:4] + records(6, prefix="t "), dev=base[2:8]
    )
    for seed in range(5):
        splits = prepared(read_set(folder), None, tokeniser, seed=seed)
        assert len(splits.public) == 10
        assert (len(splits.dev), len(splits.test)) == (4, 10)  # dev rows 2 and 3 are in test
        assert len(splits.train) == 3 * (40 - 8 - 10)
        counted = {key: value for key, value in splits.source.items() if key.startswith("removed.")}
        assert counted == {
            "removed.dev_in_test": "2",
            "removed.train_in_test_or_dev": "24",
            "removed.train_in_public": "20",
        }
        parts = [numbers(splits.train), numbers(splits.public), numbers(splits.dev)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 22 + 10 + 4
    (folder / "dev.jsonl.gz").unlink()
    splits = prepared(read_set(folder), None, tokeniser)
    assert splits.source["removed.train_in_dev"] == str(2 * len(splits.dev))


def test_the_second_text_of_a_pair_counts(tmp_path: Path, tokeniser: Tokeniser) -> None:
    train = [{"text": "w1", "text2": f"w2 {i}", "label": i % 2} for i in range(40)]
    test = [{"text": "w1", "text2": "w2 0!", "label": 0}, {"text": "w1 w2", "text2": "1", "label": 1}]
    splits = prepared(read_set(make_set(tmp_path / "s", train=train, test=test)), None, tokeniser)
    assert splits.source["removed.train_in_test_or_dev"] == "1"


def test_texts_of_signs_alone_are_not_all_the_same(tmp_path: Path, tokeniser: Tokeniser) -> None:
    train = [*records(40), {"text": "?", "label": 0}, {"text": "!", "label": 1}]
    splits = prepared(
        read_set(make_set(tmp_path / "s", train=train, test=[{"text": "?", "label": 0}])), None, tokeniser
    )
    assert splits.source["removed.train_in_test_or_dev"] == "1"


def test_another_public_set_gives_rows_that_are_in_no_other_split(tmp_path: Path, tokeniser: Tokeniser) -> None:
    private = make_set(tmp_path / "a", dev=records(6, prefix="dev "))
    shared = [*records(60), *records(10, prefix="test "), *records(6, prefix="dev "), *records(20, prefix="w39 ")]
    public = make_set(tmp_path / "b", train=[row | {"label": 1 - row["label"]} for row in shared])
    (public / "meta.json").write_text(json.dumps({"label_names": ["GOOD", "bad"]}))  # the other order
    splits = prepared(read_set(private), read_set(public), tokeniser)
    assert splits.source["removed.public_in_test_or_dev"] == "16"
    assert len(splits.train) == 60 - int(splits.source["removed.train_in_public"]) > 50
    assert Counter(splits.public.labels.tolist()) == {0: 5, 1: 5}
    parts = [row_set(part) for part in (splits.train, splits.public, splits.dev, splits.test)]
    assert sum(map(len, parts)) == len(set.union(*parts))
    label_of = {row_set_key: row["label"] for row in shared for row_set_key in row_set_of(tokeniser, row["text"])}
    for ids, length, label in zip(splits.public.ids, splits.public.lengths, splits.public.labels, strict=True):
        assert label_of[ids[:length].tobytes()] == label  # the private set's numbering


def row_set_of(tokeniser: Tokeniser, text: str) -> list[bytes]:
    ids, lengths = tokeniser.encode([text], None, 16)
    return [ids[0, : lengths[0]].tobytes()]


def test_public_classes_must_be_the_private_ones(tmp_path: Path, tokeniser: Tokeniser) -> None:
    private = read_set(make_set(tmp_path / "a"))
    three = make_set(tmp_path / "b", train=records(60, classes=3))
    (three / "meta.json").write_text(json.dumps({"label_names": ["x", "y", "z"]}))
    with pytest.raises(DataError, match=r"has 3 classes \(x, y, z\); allowed are the 2 classes of .*\(bad, good\)"):
        prepared(private, read_set(three), tokeniser)
    other = make_set(tmp_path / "c")
    (other / "meta.json").write_text(json.dumps({"label_names": ["yes", "no"]}))
    with pytest.raises(DataError, match=r"has 2 classes \(yes, no\); allowed are"):
        prepared(private, read_set(other), tokeniser)
    (other / "meta.json").unlink()  # without names the numbers count
    assert len(prepared(private, read_set(other), tokeniser).public) == 10


def test_too_few_rows_for_the_public_set(tmp_path: Path, tokeniser: Tokeniser) -> None:
    train = [*records(60), {"text": "w1 w9", "label": 2}, {"text": "w1 W9.", "label": 2}]
    folder = make_set(tmp_path / "s", train=train)
    (folder / "meta.json").write_text(json.dumps({"label_names": ["bad", "good", "rare"]}))
    with pytest.raises(DataError, match=r"train.jsonl.gz: .*_per_class = 5, but class 2 \(rare\) has only 1 different"):
        prepared(read_set(folder), None, tokeniser)
    with pytest.raises(DataError, match=r"class 2 \(rare\) has no row left to train on"):
        prepared(read_set(folder), None, tokeniser, public_per_class=1)


def test_shuffled_public_labels_keep_texts_and_counts(tmp_path: Path, tokeniser: Tokeniser) -> None:
    raw = read_set(make_set(tmp_path / "s"))
    given = prepared(raw, None, tokeniser, public_per_class=20)
    shuffled = prepared(raw, None, tokeniser, public_per_class=20, public_labels="shuffled")
    assert np.array_equal(given.public.ids, shuffled.public.ids)
    assert Counter(given.public.labels.tolist()) == Counter(shuffled.public.labels.tolist())
    assert 0.2 < (given.public.labels == shuffled.public.labels).mean() < 0.8
    assert shuffled.public.sha256() == shuffle_public(given, 0).public.sha256()
    assert shuffled.public.sha256() != shuffle_public(given, 1).public.sha256()
    assert given.train.sha256() == shuffled.train.sha256()
    assert (given.source["public_labels"], shuffled.source["public_labels"]) == ("given", "shuffled")


def test_a_job_names_its_data(tmp_path: Path, tokeniser_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_set(tmp_path / "root" / "mine")
    make_set(tmp_path / "root" / "other", train=records(30, prefix="w8 "))
    monkeypatch.setenv("FEDBENCH_DATA", str(tmp_path / "root"))
    one = load_splits(DataSection(private="mine", public="mine", public_per_class=5), 0, str(tokeniser_folder))
    path = str(tmp_path / "root" / "mine")
    two = load_splits(DataSection(private="mine", public=path, public_per_class=5), 0, str(tokeniser_folder))
    assert one.source == two.source
    assert len(one.train) == 46
    three = load_splits(DataSection(private="mine", public="other", public_per_class=5), 0, str(tokeniser_folder))
    assert (len(three.train), len(three.public), three.source["public.name"]) == (54, 10, "other")


def test_the_embedded_task_by_name() -> None:
    given = load_splits(DataSection(public_per_class=8), 0, None)
    assert (len(given.public), given.source["public"]) == (32, "embedded")
    shuffled = load_splits(DataSection(public_per_class=8, public_labels="shuffled"), 0, None)
    assert np.array_equal(given.public.ids, shuffled.public.ids)
    assert not np.array_equal(given.public.labels, shuffled.public.labels)
    assert (
        load_splits(DataSection(public="embedded:poor", public_per_class=8), 0, None).source["public"].endswith("poor")
    )


@pytest.mark.parametrize(
    ("private", "public", "says"),
    [
        ("embedded", "trec", r"data.public: found 'trec'; allowed: embedded, embedded:poor"),
        ("embedded:poor", "embedded", r"data.private: found 'embedded:poor'"),
        ("trec", "embedded", r"data.public: found 'embedded'; allowed: 'trec' \(its own rows\)"),
        ("trec", "trec", r"data.private: 'trec' is text; model.name"),
    ],
)
def test_data_that_do_not_go_together(private: str, public: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_splits(DataSection(private=private, public=public), 0, None)


@pytest.mark.data
def test_real_splits_have_the_sizes_of_the_rules() -> None:
    root, model = data_folder(), minilm_folder()
    data = DataSection(private=str(root / "trec"), public=str(root / "trec"), public_per_class=32)
    splits = load_splits(data, 0, str(model))
    removed = sum(int(value) for key, value in splits.source.items() if key.startswith("removed."))
    assert len(splits.train) + len(splits.public) + len(splits.dev) + removed == 5441
    assert (len(splits.public), len(splits.test)) == (192, 500)
    assert len(splits.dev) == pytest.approx(0.1 * (len(splits.dev) + len(splits.train)), rel=0.03)
    sst2, mr = str(root / "sst2"), str(root / "mr")
    splits = load_splits(DataSection(private=sst2, public=mr), 0, str(model))
    assert int(splits.source["removed.public_in_test_or_dev"]) >= 1061  # the sentences that MR shares with SST-2's test
    assert (len(splits.dev), len(splits.test)) == (872, 1821)
