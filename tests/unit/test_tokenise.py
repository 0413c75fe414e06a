"""Tokenisers: padded rows, special tokens kept, faults as messages, the same ids as transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from realdata import data_folder, minilm_folder
from textsets import make_tokeniser, read_set

from fedbench.base.errors import ConfigError, ModelError
from fedbench.data.tokenise import Tokeniser, load_tokeniser


@pytest.fixture
def tokeniser_folder(tmp_path: Path) -> Path:
    return make_tokeniser(tmp_path / "model")


@pytest.fixture
def tokeniser(tokeniser_folder: Path) -> Tokeniser:
    return load_tokeniser(str(tokeniser_folder))


def test_rows_are_padded_right_and_keep_special_tokens(tokeniser: Tokeniser) -> None:
    ids, lengths = tokeniser.encode(["w0 w1 w2 w3 w4", "w0"], None, 5)
    assert ids.tolist() == [[2, 6, 7, 8, 3], [2, 6, 3, 0, 0]]
    assert lengths.tolist() == [5, 3]
    assert (ids.dtype, lengths.dtype, tokeniser.pad) == (np.int32, np.int32, 0)
    ids, _ = tokeniser.encode(["w0 w1 w2 w3 w4"], ["w5"], 6)  # the longer text of a pair is cut
    assert ids.tolist() == [[2, 6, 7, 3, 11, 3]]


def test_a_length_without_room_is_refused(tokeniser: Tokeniser) -> None:
    with pytest.raises(ConfigError, match=r"data.max_length: found 2; the special tokens"):
        tokeniser.encode(["w0"], ["w1"], 2)


def test_no_text_package_thread_setting_is_left_behind(tokeniser: Tokeniser, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("true", None):
        if value is None:
            monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        else:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
        tokeniser.encode(["w0"], None, 8)
        assert os.environ.get("TOKENIZERS_PARALLELISM") == value


@pytest.mark.parametrize(
    ("config", "pad"),
    [
        ({"pad_token": "w3"}, 9),
        ({"pad_token": {"content": "w3"}}, 9),
        ({"pad_token": None, "eos_token": "[SEP]"}, 3),
        ({"pad_token": "absent"}, 0),
        (None, 0),
    ],
)
def test_the_pad_id_comes_from_the_folder(config: dict[str, Any] | None, pad: int, tokeniser_folder: Path) -> None:
    path = tokeniser_folder / "tokenizer_config.json"
    path.unlink() if config is None else path.write_text(json.dumps(config))
    assert load_tokeniser(str(tokeniser_folder)).pad == pad


def test_a_bad_tokeniser_is_a_model_error(tokeniser_folder: Path, tmp_path: Path) -> None:
    (tokeniser_folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config.json: can't be read"):
        load_tokeniser(str(tokeniser_folder))
    (tokeniser_folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ModelError, match=r"tokenizer.json: not a tokeniser"):
        load_tokeniser(str(tokeniser_folder))
    (tokeniser_folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"model: no tokeniser: no tokenizer.json and none of vocab.txt"):
        load_tokeniser(str(tokeniser_folder))
    with pytest.raises(ModelError, match=r"no folder .*absent; allowed are a model folder and a hub id"):
        load_tokeniser(str(tmp_path / "absent"))


@pytest.mark.data
def test_the_quick_tokeniser_gives_the_ids_of_transformers() -> None:
    root, model = data_folder(), minilm_folder()
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(model)
    quick = load_tokeniser(str(model))
    assert (quick.pad, quick.vocabulary) == (reference.pad_token_id, len(reference))
    for name, max_length in (("trec", 16), ("rte", 64), ("rte", 512)):
        test = read_set(root / name).test
        texts = [*test.texts, "Ünïcode, 中文 “quotes” \u200b end"]
        pairs = None if test.pairs is None else [*test.pairs, "x " * 600]
        wanted = reference(texts, pairs, truncation=True, max_length=max_length, padding=True)
        ids, lengths = quick.encode(texts, pairs, max_length)
        assert ids.tolist() == wanted["input_ids"]
        assert lengths.tolist() == np.sum(wanted["attention_mask"], axis=1).tolist()
