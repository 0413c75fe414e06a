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


def prompt_tokeniser(folder: Path, kind: str) -> Path:
    """Write a small tokeniser that knows a few English words: `bpe` as GPT-2 and RoBERTa have it, or whole `words`."""
    known = ["it", "was", "well", "all", "in", "a", "the", "good", "bad", "film", "plot", "text", "number", "test"]
    if kind == "bpe":
        inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "<pad>", "</s>", "<mask>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        phrases = [f"{word} {word} It was {word} {i}" for word in known for i in range(9)]
        inner.train_from_iterator([*phrases, *known] * 3, trainer)
        inner.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True, special=True)])
        inner.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        named = {"pad_token": "<pad>", "mask_token": "<mask>"}
    else:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "!", ":", *known, *WORDS, *map(str, range(100))]
        inner = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
        )
        inner.normalizer = tokenizers.normalizers.Lowercase()
        inner.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        inner.add_special_tokens(["[MASK]"])
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        named = {"pad_token": "[PAD]", "mask_token": "[MASK]"}
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder
