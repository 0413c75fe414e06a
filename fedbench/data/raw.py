"""Text data sets before tokenisation, and the checks that every source of them has to pass.

A fault is one DataError that names the file and the row. Nothing here opens a file
or knows where rows come from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedbench.base.errors import DataError

#: The one text column that a set may lack: it is read where it exists.
OPTIONAL_COLUMN = "text2"


@dataclass(frozen=True)
class RawSplit:
    """One split: `texts` [n], `pairs` [n] or None (second sentences), `labels` int64 [n], and where it was read."""

    texts: list[str]
    pairs: list[str] | None
    labels: np.ndarray
    where: str

    def __len__(self) -> int:
        return len(self.texts)

    def sha256(self) -> str:
        """Return the hash of all rows, for sources that are no file."""
        digest = hashlib.sha256(self.labels.astype("<i8").tobytes())
        for text in (*self.texts, *(self.pairs or ())):
            digest.update(text.encode() + b"\0")
        return digest.hexdigest()


@dataclass(frozen=True)
class RawSplits:
    """One data set: its splits, the names of its classes in label order, and names and hashes of what was read.

    `named` is False where the class names are only the label numbers.
    """

    name: str
    train: RawSplit
    dev: RawSplit | None
    test: RawSplit
    label_names: tuple[str, ...]
    named: bool
    provenance: dict[str, str]


def split_from_table(
    table: Any, where: str, text_columns: tuple[str, ...], label_column: str, fault: Callable[[], str | None]
) -> RawSplit:
    """Return the split that a `datasets.Dataset` holds; `fault` names its first bad row where a type is wrong."""
    found = list(table.column_names)
    texts = tuple(name for name in text_columns if name in found or name != OPTIONAL_COLUMN or name == text_columns[0])
    for name, key in (*((t, "data.text_columns") for t in texts), (label_column, "data.label_column")):
        if name not in found:
            raise DataError(f"{where}: no column {name!r} ({key}); found: {', '.join(sorted(found))}.")
    if table.num_rows == 0:
        raise DataError(f"{where}: no rows.")
    columns = [table.data.column(name) for name in (*texts, label_column)]
    integer = str(getattr(table.features[label_column], "dtype", "")).startswith(("int", "uint"))
    string = all(getattr(table.features[name], "dtype", "") in {"string", "large_string"} for name in texts)
    if not (integer and string) or any(column.null_count for column in columns):
        types = ", ".join(f"{name} {column.type}" for name, column in zip((*texts, label_column), columns, strict=True))
        raise DataError(f"{where}: {fault() or f'columns of type {types}; allowed are strings and an integer label.'}")
    strings = [column.to_pylist() for column in columns[:-1]]
    for row, parts in enumerate(zip(*strings, strict=True), start=1):
        if not any(part and not part.isspace() for part in parts):
            raise DataError(f"{where}: row {row}: the text is empty.")
    labels = columns[-1].to_numpy().astype(np.int64)
    return RawSplit(strings[0], strings[1] if len(strings) > 1 else None, labels, where)


def first_fault(records: Iterable[tuple[str, Any]], text_columns: tuple[str, ...], label_column: str) -> str | None:
    """Return one sentence on the first bad record, or None; `records` are pairs of its place and the record."""
    for place, record in records:
        if not isinstance(record, dict):
            return f"{place}: found {_short(record)}; allowed is one JSON object a line."
        for name in (*text_columns, label_column):
            if name not in record:
                if name == OPTIONAL_COLUMN and name != text_columns[0]:
                    continue
                return f"{place}: no {name!r}; found: {', '.join(sorted(record)) or 'nothing'}."
            value = record[name]
            if name == label_column:
                if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**63:
                    return f"{place}: {name} is {_short(value)}; allowed is an integer from 0."
            elif not isinstance(value, str):
                return f"{place}: {name} is {_short(value)}; allowed is a string."
    return None


def assemble(
    name: str,
    splits: dict[str, RawSplit],
    label_names: tuple[str, ...] | None,
    names_from: str,
    provenance: dict[str, str],
) -> RawSplits:
    """Return the checked set of splits `train`, `test` and optional `dev`; without names, train's labels give them."""
    train = splits["train"]
    for split in splits.values():
        if (split.pairs is None) != (train.pairs is None):
            raise DataError(f"{split.where}: column {OPTIONAL_COLUMN!r} must be in all files or in none of the set.")
    classes = int(train.labels.max()) + 1 if label_names is None else len(label_names)
    for split in splits.values():
        bad = np.flatnonzero((split.labels < 0) | (split.labels >= classes))
        if bad.size:
            row, label = int(bad[0]), int(split.labels[bad[0]])
            allowed = f"0 to {classes - 1} ({names_from})" if classes > 1 else "an integer from 0"
            raise DataError(f"{split.where}: row {row + 1}: label {label} is out of range; allowed is {allowed}.")
    present = np.unique(train.labels)
    if present.size < classes:
        gap = int(np.setdiff1d(np.arange(min(classes, present.size + 1)), present)[0])
        called = f" ({label_names[gap]})" if label_names else ""
        raise DataError(f"{train.where}: no row of class {gap}{called}; every class needs rows in train.")
    if classes < 2:
        raise DataError(f"{train.where}: only one class; a task needs at least two.")
    names = label_names or tuple(str(label) for label in range(classes))
    return RawSplits(name, train, splits.get("dev"), splits["test"], names, label_names is not None, provenance)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
