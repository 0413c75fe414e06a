"""One file of JSON lines, plain or gzip, read by the `datasets` library into memory.

Nothing is written beside the file and nothing is kept: each call has a cache folder of
its own for as long as it lasts, so that ranks never meet in it. The network is never used.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import logging
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedbench.base.errors import ConfigError, DataError
from fedbench.data import hub
from fedbench.data.raw import RawSplit, first_fault, split_from_table


def library() -> Any:
    """Return the `datasets` package, or raise ConfigError that says how to install it."""
    try:
        import datasets
    except ImportError:
        message = "data: text data sets need the datasets package: pip install 'fedbench[text]'."
        raise ConfigError(message) from None
    return datasets


@contextmanager
def quiet(datasets: Any) -> Iterator[None]:
    """Keep the library's progress bars and log lines off stderr inside the block; put its settings back after it."""
    logger = logging.getLogger("datasets")
    level, bars = logger.level, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL + 1)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def read_file(path: Path, text_columns: tuple[str, ...], label_column: str) -> tuple[RawSplit, str]:
    """Return the split in `path` and the sha256 of the file; every fault is a DataError with file and line."""
    raw = read_bytes(path)
    text = _unpack(path, raw).removeprefix(codecs.BOM_UTF8)
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line}: not UTF-8 (byte {error.start + 1:,} of the text).") from None
    if not text.strip():
        raise DataError(f"{path}: empty; allowed is one JSON object a line.")

    def fault() -> str | None:
        return first_fault(_records(path, text), text_columns, label_column)

    datasets = library()
    with quiet(datasets), tempfile.TemporaryDirectory(prefix="fedbench-data-") as cache:
        try:
            table = datasets.Dataset.from_json(str(path), cache_dir=cache, keep_in_memory=True)
        except Exception as error:  # its type depends on the cause and on the library's version
            cause = hub.first_line(error.__cause__ or error)
            raise DataError(f"{path}: {fault() or f'not JSON lines: {cause}.'}") from None
    return split_from_table(table, str(path), text_columns, label_column, fault), hashlib.sha256(raw).hexdigest()


def read_bytes(path: Path) -> bytes:
    """Return the content of a file, or raise DataError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}.") from None


def _unpack(path: Path, raw: bytes) -> bytes:
    if path.suffix != ".gz":
        return raw
    try:
        return gzip.decompress(raw)
    except EOFError:
        raise DataError(f"{path}: truncated: the gzip stream ends too early ({len(raw):,} bytes).") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: broken gzip: {error}.") from None


def _records(path: Path, text: bytes) -> Iterator[tuple[str, Any]]:
    """Yield the place and the parsed object of each line; a line that is not JSON raises DataError."""
    for number, line in enumerate(text.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            at = f" at character {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            detail = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep"
            raise DataError(f"{path}: line {number}: not JSON: {detail}{at}.") from None
