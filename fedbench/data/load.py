"""Finds a text data set by name and reads it: a folder of JSON lines, a folder under FEDBENCH_DATA, or a hub id.

A name that is none of these is one DataError that lists where it was looked for. Nothing
is tokenised, drawn or removed here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fedbench.base.errors import DataError, nearest
from fedbench.data import hub, jsonl
from fedbench.data.raw import RawSplit, RawSplits, assemble, first_fault, split_from_table

__all__ = ["RawSplit", "RawSplits", "data_root", "find_folder", "read"]

DATA_VARIABLE = "FEDBENCH_DATA"
DEFAULT_ROOT = "../shared/data"

_HUB_SPLITS = {"train": ("train",), "dev": ("validation", "dev"), "test": ("test",)}


def data_root() -> Path:
    """Return the folder of named data sets: FEDBENCH_DATA, else ../shared/data beside the current folder."""
    return Path(os.environ.get(DATA_VARIABLE) or DEFAULT_ROOT)


def find_folder(name: str) -> Path | None:
    """Return the folder that `name` means, a path before a name under FEDBENCH_DATA, or None.

    A folder here that has no train file, such as one of results, hides no data set of its name.
    """
    if not name.strip():
        raise DataError("data: an empty name; allowed are a folder, a name under FEDBENCH_DATA and a hub id.")
    folders = [folder for folder in _places(name) if folder.is_dir()]
    return next((folder for folder in folders if _file_of(folder, "train")), folders[0] if folders else None)


def _places(name: str) -> tuple[Path, ...]:
    return Path(name).expanduser(), data_root() / name


def read(name: str, *, text_columns: tuple[str, ...], label_column: str) -> RawSplits:
    """Return the splits of the data set `name` with its class names and the sha256 of each file.

    The column `text2` is read where it exists; every other column must be there. All
    faults of the data are DataError.
    """
    folder = find_folder(name)
    if folder is not None:
        return _read_folder(name, folder, text_columns, label_column)
    return _read_hub(name, text_columns, label_column)


def _read_folder(name: str, folder: Path, text_columns: tuple[str, ...], label_column: str) -> RawSplits:
    provenance = {"name": name}
    splits = {}
    for split in ("train", "test", "dev"):
        path = _file_of(folder, split)
        if path is None:
            if split == "dev":
                continue
            found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
            others = "".join(f" Nor is it in {place}." for place in _places(name) if place != folder)
            raise DataError(f"{folder}: no {split}.jsonl.gz and no {split}.jsonl; found: {found}.{others}")
        splits[split], provenance[f"{split}.sha256"] = jsonl.read_file(path, text_columns, label_column)
    meta = folder / "meta.json"
    label_names = _meta_names(meta) if meta.exists() else None
    names_from = f"{len(label_names)} names in {meta}" if label_names else "train's labels: meta.json names none"
    return assemble(name, splits, label_names, names_from, provenance)


def _file_of(folder: Path, split: str) -> Path | None:
    return next((p for p in (folder / f"{split}.jsonl.gz", folder / f"{split}.jsonl") if p.is_file()), None)


def _meta_names(meta: Path) -> tuple[str, ...] | None:
    """Return the class names of `meta.json`, or None where it has none."""
    try:
        tree: Any = json.loads(jsonl.read_bytes(meta))
    except ValueError as error:
        raise DataError(f"{meta}: not JSON: {error}.") from None
    names = tree.get("label_names") if isinstance(tree, dict) else ()
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names) or len(set(names)) != len(names):
        raise DataError(f"{meta}: label_names must be a list of different names in label order.")
    return tuple(names) or None


def _read_hub(name: str, text_columns: tuple[str, ...], label_column: str) -> RawSplits:
    root = data_root()
    root_names = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    looked = f"no folder {name}, no folder {root / name} ({_root_text(root, root_names)})"
    if not hub.is_id(name):
        raise DataError(f"data set {name!r} not found: {looked}.{nearest(Path(name).name, root_names)}")
    datasets = jsonl.library()
    problem = hub.problem(name, "dataset")
    if problem:
        hint = "With HF_HUB_OFFLINE=1 an earlier download is used."
        raise DataError(f"data set {name!r} not found: {looked}, and {problem}. {hint}{nearest(name, root_names)}")
    with jsonl.quiet(datasets):
        try:
            loaded = datasets.load_dataset(name)
        except Exception as error:  # the library raises many types; all mean that this set can't be had
            message = f"data set {name!r} not found: {looked}, and the hub gave: {hub.first_line(error)}."
            raise DataError(message + nearest(name, root_names)) from None
    splits: dict[str, RawSplit] = {}
    for split, allowed in _HUB_SPLITS.items():
        used = next((candidate for candidate in allowed if candidate in loaded), None)
        if used is not None:
            splits[split] = _hub_split(loaded[used], f"{name} [{used}]", text_columns, label_column)
        elif split != "dev":
            raise DataError(f"{name}: no split {split!r} on the hub; found: {', '.join(loaded)}.")
    feature = loaded["train"].features[label_column]
    label_names = tuple(feature.names) if hasattr(feature, "names") else None
    provenance = {"name": name} | {f"{split}.rows.sha256": rows.sha256() for split, rows in splits.items()}
    return assemble(name, splits, label_names, f"classes of {name}", provenance)


def _hub_split(table: Any, where: str, text_columns: tuple[str, ...], label_column: str) -> RawSplit:
    def fault() -> str | None:
        rows = ((f"row {number}", dict(row)) for number, row in enumerate(table, start=1))
        return first_fault(rows, text_columns, label_column)

    # A table with selected rows keeps them in a second index; flattened, its columns are its rows.
    return split_from_table(table.flatten_indices(), where, text_columns, label_column, fault)


def _root_text(root: Path, names: list[str]) -> str:
    origin = DATA_VARIABLE if os.environ.get(DATA_VARIABLE) else f"{DATA_VARIABLE} is not set"
    return f"{origin}; it has {', '.join(names)}" if names else f"{origin}; {root} has no data sets"
