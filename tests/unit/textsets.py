"""Small text data sets and a small tokeniser, written for one test."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import tokenizers

from fedbench.data.load import RawSplits, read

COLUMNS = ("text", "text2")
WORDS = [f"w{i}" for i in range(40)]
NUMBER = 4  # the token id of the word `number`


def write(folder: Path, split: str, records: list[Any], *, compress: bool = True) -> Path:
    """Write records (or lines that are already text) as JSON lines and return the path."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records).encode()
    path = folder / (f"{split}.jsonl.gz" if compress else f"{split}.jsonl")
    path.write_bytes(gzip.compress(lines) if compress else lines)
    return path


def records(count: int, classes: int = 2, prefix: str = "") -> list[dict[str, Any]]:
    return [{"text": f"{prefix}{WORDS[i % 7]} {WORDS[i % 11]} number {i}", "label": i % classes} for i in range(count)]


def make_set(folder: Path, **more: list[Any]) -> Path:
    """Write a good set of 60 train and 10 test rows in two classes; `more` replaces or adds splits."""
    splits = {"train": records(60), "test": records(10, prefix="test ")} | more
    for split, rows in splits.items():
        write(folder, split, rows)
    (folder / "meta.json").write_text(json.dumps({"label_names": ["bad", "good"]}))
    return folder


def read_set(folder: Path | str, text_columns: tuple[str, ...] = COLUMNS) -> RawSplits:
    return read(str(folder), text_columns=text_columns, label_column="label")


def make_tokeniser(folder: Path) -> Path:
    """Write a model folder with a small word tokeniser: [CLS] text [SEP] (pair [SEP]), pad id 0."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "number", "test", *WORDS, *map(str, range(100))]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    inner.normalizer = tokenizers.normalizers.Lowercase()
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder.mkdir()
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    return folder
