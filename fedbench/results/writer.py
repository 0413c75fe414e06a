"""Writes one run as one HDF5 file, whole or not at all; it never opens a finished file again.

Same content gives the same bytes: default format, no time stamps, fixed order. Arrays carry fletcher32 sums, the file
as a whole the seal of `results/seal.py`. HDF5 makes the file in memory: on a full disk it would fail once an object.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from fedbench.base import fsio, identity
from fedbench.base.errors import ResultError
from fedbench.base.records import SCHEMA_VERSION, Column, Run
from fedbench.results import schema, seal


def write(path: Path, run: Run) -> None:
    """Put `run` at `path` as a sealed HDF5 file; ResultError where the run does not fit the schema.

    An earlier file at `path` stays as it was until the new one is complete.
    """
    expected = identity.run_id(run.config)
    if run.summary.run_id != expected:
        raise ResultError(f"{path}: the run calls itself {run.summary.run_id}; its config gives {expected}.")
    try:
        tables = schema.checked_tables(run)
        texts = {"config": identity.canonical_json(run.config), "provenance": identity.canonical_json(run.provenance)}
    except ResultError as error:
        raise ResultError(f"{path}: {error}") from None
    except (TypeError, ValueError) as error:
        raise ResultError(f"{path}: config or provenance can't be stored as JSON: {error}.") from None
    fsio.write_bytes(path, seal.sealed(_image(run, tables, texts)))


def _image(run: Run, tables: dict[str, dict[str, np.ndarray]], texts: dict[str, str]) -> bytes:
    """Return the bytes of the file behind its user block."""
    with h5py.File("run", "x", driver="core", backing_store=False, userblock_size=seal.BLOCK_BYTES) as file:
        file.attrs["schema_version"] = SCHEMA_VERSION
        file.attrs["run_id"] = run.summary.run_id
        file.attrs["stop_reason"] = run.summary.stop_reason
        for name, text in texts.items():
            file.attrs[name] = text
        for group, columns in tables.items():
            _write_table(file.create_group(group), group, columns)
        _write_summary(file.create_group("summary"), run)
        file.attrs["complete"] = run.summary.complete
        file.flush()
        return file.id.get_file_image()


def _write_table(group: h5py.Group, name: str, columns: dict[str, np.ndarray]) -> None:
    for column, values in columns.items():
        array = _fixed_width(values) if values.dtype.kind == "U" else values
        checked = {"chunks": array.shape, "fletcher32": True} if array.size else {}
        dataset = group.create_dataset(column, data=array, track_times=False, **checked)
        _describe(dataset, schema.TABLES[name][column])


def _write_summary(group: h5py.Group, run: Run) -> None:
    for name, figure in schema.SUMMARY.items():
        value = schema.stored_scalar(getattr(run.summary, name))
        _describe(group.create_dataset(name, data=value, track_times=False), figure)


def _describe(dataset: h5py.Dataset, what: Column | schema.Figure) -> None:
    dataset.attrs["unit"] = what.unit
    dataset.attrs["meaning"] = what.meaning


def _fixed_width(text: np.ndarray) -> Any:
    """Return text as UTF-8 of one width; text of variable width lies in a heap that fletcher32 does not cover."""
    encoded = np.char.encode(text, "utf-8")
    return encoded.astype(h5py.string_dtype("utf-8", max(1, encoded.dtype.itemsize)))
