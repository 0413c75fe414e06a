"""Text to token ids, by the tokeniser that belongs to a model.

A folder with `tokenizer.json` is read by the small `tokenizers` package alone, which is
quicker to import than transformers by seconds and gives the same ids. Nothing is cached
or written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedbench.base.errors import ConfigError, ModelError
from fedbench.data import hub

#: (texts, second texts or None, max_length) -> one list of ids a row.
_Encode = Callable[[Sequence[str], Sequence[str] | None, int], list[list[int]]]

#: Older forms of a tokeniser, which transformers converts.
_OTHER_FILES = ("vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


@dataclass(frozen=True)
class Tokeniser:
    """A tokeniser: its `pad` id, the size of its vocabulary, and a hash of what it was read from.

    `plain` gives the ids of a text without special tokens and `token` the text of an id; `mask` and `unknown` are
    the ids of those tokens where it has them.
    """

    pad: int
    vocabulary: int
    sha256: str
    source: str
    rows: _Encode
    plain: Callable[[str], list[int]]
    token: Callable[[int], str]
    mask: int | None = None
    mask_token: str | None = None
    unknown: int | None = None

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return `ids` int32 [n, longest row] right-padded and `lengths` int32 [n], at most `max_length` tokens a row.

        Special tokens stay; of a pair the longer text is cut first. A `max_length` that
        has no room for the special tokens is a ConfigError, a text without tokens a ModelError.
        """
        rows = self.rows(texts, pairs, max_length)
        if max(map(len, rows), default=0) > max_length:
            raise ConfigError(
                f"data.max_length: found {max_length}; the special tokens of {self.source} leave no room for text."
            )
        return self.padded(rows, texts)

    def padded(self, rows: Sequence[Sequence[int]], texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return `ids` int32 [n, longest row] right-padded and `lengths` int32 [n] of rows of ids and their texts."""
        lengths = np.fromiter(map(len, rows), np.int32, len(rows))
        if lengths.size and lengths.min() == 0:
            text = texts[int(lengths.argmin())]
            raise ModelError(f"{self.source}: the tokeniser makes no token of the text {text[:40]!r}.")
        ids = np.full((len(rows), int(lengths.max(initial=1))), self.pad, np.int32)
        for row, values in zip(ids, rows, strict=True):
            row[: len(values)] = values
        return ids, lengths


def load_tokeniser(source: str) -> Tokeniser:
    """Return the tokeniser of a model folder or hub id; a missing or broken one is a ModelError."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if (folder / "tokenizer.json").is_file():
            return _from_file(folder)
        if not any((folder / name).is_file() for name in _OTHER_FILES):
            raise ModelError(f"{folder}: no tokeniser: no tokenizer.json and none of {', '.join(_OTHER_FILES)}.")
        return _from_transformers(str(folder), cached=True)
    if not hub.is_id(source):
        raise ModelError(f"tokeniser: no folder {source}; allowed are a model folder and a hub id.")
    _package("transformers")
    problem = hub.problem(source, "model")
    try:
        return _from_transformers(source, cached=bool(problem))
    except ModelError as error:
        where = f"no folder {source}, nothing of it downloaded before, and {problem}" if problem else str(error)
        raise ModelError(f"tokeniser {source!r} not found: {where.rstrip('.')}.") from None


def _from_file(folder: Path) -> Tokeniser:
    tokenizers = _package("tokenizers")
    path = folder / "tokenizer.json"
    try:
        raw = path.read_bytes()
        inner = tokenizers.Tokenizer.from_str(raw.decode("utf-8"))
    except Exception as error:  # the library raises plain Exception on a bad file
        raise ModelError(f"{path}: not a tokeniser: {hub.first_line(error)}.") from None
    pad = inner.padding["pad_id"] if inner.padding else _named_pad(folder, inner)
    inner.no_padding()
    mask = next((name for name in _named(folder, "mask_token") if inner.token_to_id(name) is not None), None)
    unknown = getattr(inner.model, "unk_token", None)

    def plain(text: str) -> list[int]:
        inner.no_truncation()
        return inner.encode(text, add_special_tokens=False).ids

    def rows(texts: Sequence[str], pairs: Sequence[str] | None, max_length: int) -> list[list[int]]:
        inner.enable_truncation(max_length, strategy="longest_first")
        inputs = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        with _one_thread():
            return [encoding.ids for encoding in inner.encode_batch_fast(inputs)]

    return Tokeniser(
        int(pad), inner.get_vocab_size(), hashlib.sha256(raw).hexdigest(), str(folder), rows, plain,
        lambda number: str(inner.id_to_token(number)),
        mask=inner.token_to_id(mask) if mask else None, mask_token=mask,
        unknown=inner.token_to_id(unknown) if unknown else None,
    )  # fmt: skip


def _named_pad(folder: Path, inner: Any) -> int:
    """Return the id of the pad token in the folder's config, else of its end token, else 0 (pads are masked)."""
    for name in _named(folder, "pad_token", "eos_token"):
        number = inner.token_to_id(name)
        if number is not None:
            return int(number)
    return 0


def _named(folder: Path, *keys: str) -> list[str]:
    """Return the special tokens that the folder's config names by these keys; for `mask_token` its usual names too."""
    usual = ["[MASK]", "<mask>"] if "mask_token" in keys else []
    try:
        config: Any = json.loads((folder / "tokenizer_config.json").read_bytes())
    except FileNotFoundError:
        return usual
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'tokenizer_config.json'}: can't be read: {hub.first_line(error)}.") from None
    tokens = [config.get(key) if isinstance(config, dict) else None for key in keys]
    texts = [token.get("content") if isinstance(token, dict) else token for token in tokens]
    return [text for text in texts if isinstance(text, str)] + usual


def _from_transformers(source: str, *, cached: bool) -> Tokeniser:
    transformers = _package("transformers")
    try:
        inner = transformers.AutoTokenizer.from_pretrained(source, local_files_only=cached)
    except Exception as error:  # OSError, ValueError and others, by cause and version
        raise ModelError(f"{source}: no tokeniser can be read from it: {hub.first_line(error)}.") from None
    pad = next((i for i in (inner.pad_token_id, inner.eos_token_id) if i is not None), 0)
    vocabulary = json.dumps(inner.get_vocab(), sort_keys=True).encode()

    def rows(texts: Sequence[str], pairs: Sequence[str] | None, max_length: int) -> list[list[int]]:
        with _one_thread():
            second = None if pairs is None else list(pairs)
            return inner(list(texts), second, truncation="longest_first", max_length=max_length)["input_ids"]

    return Tokeniser(
        int(pad), len(inner), hashlib.sha256(vocabulary).hexdigest(), source, rows,
        lambda text: inner(text, add_special_tokens=False)["input_ids"],
        lambda number: str(inner.convert_ids_to_tokens(number)),
        mask=inner.mask_token_id, mask_token=inner.mask_token, unknown=inner.unk_token_id,
    )  # fmt: skip


def _package(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise ConfigError(f"data: text needs the {name} package: pip install 'fedbench[text]'.") from None


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep the library from starting threads inside the block: ranks share cores, and a launcher forks afterwards."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
