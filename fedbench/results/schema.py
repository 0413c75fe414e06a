"""The layout of a run file: groups, columns, units, and how a missing value is stored.

Columns come from `base.records`; this module adds the units of the summary and the
rules that a table must keep. It opens no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fedbench.base.errors import ResultError, nearest
from fedbench.base.records import (
    CODEC_COLUMNS,
    DEVICE_COLUMNS,
    MEMORY_COLUMNS,
    MEMORY_ROUND_COLUMNS,
    ROUND_COLUMNS,
    SIMULATED,
    SPAN_COLUMNS,
    Column,
    Run,
    Summary,
)

#: Group -> its columns, in the order in which they are written.
TABLES: dict[str, dict[str, Column]] = {
    "rounds": ROUND_COLUMNS,
    "devices": DEVICE_COLUMNS,
    "memory": MEMORY_COLUMNS,
    "memory_rounds": MEMORY_ROUND_COLUMNS,
    "spans": SPAN_COLUMNS,
    "codec": CODEC_COLUMNS,
}

#: Groups without datasets where nothing was recorded.
OPTIONAL = ("memory_rounds", "spans", "codec")


class Figure(NamedTuple):
    """One figure of the summary: unit and meaning."""

    unit: str
    meaning: str


SUMMARY: dict[str, Figure] = {
    "run_id": Figure("", "method and first 12 hex digits of the config's hash"),
    "method": Figure("", "name of the method"),
    "complete": Figure("", "the run ended as planned"),
    "stop_reason": Figure("", "rounds: all rounds were run; target: stopped at the target"),
    "rounds": Figure("1", "rounds run"),
    "seed": Figure("1", "seed of the run"),
    "ranks": Figure("1", "processes"),
    "devices": Figure("1", "devices in the federation"),
    "final_accuracy": Figure("1", "test accuracy at the last evaluation, 0..1"),
    "best_accuracy": Figure("1", "test accuracy at the evaluation that is best on dev, 0..1"),
    "initial_accuracy": Figure("1", "test accuracy before training, 0..1"),
    "probe_accuracy": Figure("1", "test accuracy of a logistic regression on the start model's frozen features"),
    "target_accuracy": Figure("1", "target on the dev split, 0..1"),
    "rounds_to_target": Figure("1", "rounds until dev accuracy first reached the target"),
    "device_flops": Figure("FLOP", "floating-point operations of one sampled device, all rounds"),
    "cloud_flops": Figure("FLOP", "floating-point operations of the cloud, all rounds"),
    "replay_ops": Figure("1", "direction entries rebuilt by one replica, all rounds"),
    "uplink_bytes": Figure("B", "payload from one sampled device to the cloud, all rounds"),
    "downlink_bytes": Figure("B", "payload from the cloud to one sampled device, all rounds"),
    "uplink_bytes_per_device_round": Figure("B", "payload from one sampled device in one round"),
    "wire_bytes": Figure("B", "bytes that the transport moved, headers included, all ranks and rounds"),
    "peak_device_bytes": Figure("B", "highest resident memory of a device rank above that after the imports"),
    "round_s_median": Figure("s", "median wall time of a round, evaluation excluded"),
    "sim_s": Figure(SIMULATED, "all rounds on the virtual clock; null without one"),
    "hidden_fraction": Figure(
        "1", "part of the shorter of a plan's transfer and the compute that ran behind the other, 0..1"
    ),
    "unaccounted_fraction": Figure("1", "part of the rounds' time that no span covers, on the rank with the most"),
    "repeatable": Figure("", "the job alone gave the numbers; false where codecs were chosen from measured times"),
    "weights_sha256": Figure("", "hash of the final weights"),
    "trajectory_sha256": Figure("", "hash of the losses and weights of all rounds, times apart"),
}

_KINDS = {"i": "iub", "f": "fiu", "U": "U"}


def checked_tables(run: Run) -> dict[str, dict[str, np.ndarray]]:
    """Return group -> column -> array in the file's dtype; ResultError where a table does not fit `base.records`."""
    rounds = run.summary.rounds
    return {
        "rounds": _table("rounds", run.rounds, (rounds + 1,)),
        "devices": _table("devices", run.devices, (rounds, None)),
        "memory": _table("memory", run.memory, (None,)),
        **{name: _table(name, table, (None,)) if (table := getattr(run, name)) else {} for name in OPTIONAL},
    }


def checked_array(name: str, column: Column, values: Any) -> np.ndarray:
    """Return `values` in the column's dtype ('U' for text); ResultError where that would lose something."""
    found = np.asarray(values)
    if found.dtype.kind == "O" and column.dtype == "str" and all(isinstance(v, str) for v in found.flat):
        found = found.astype(str)
    kind = "U" if column.dtype == "str" else np.dtype(column.dtype).kind
    if found.dtype.kind not in _KINDS[kind] and found.size:
        raise ResultError(f"{name}: found dtype {found.dtype}; expected {column.dtype}.")
    if kind == "U":
        return found.astype(str)
    cast = found.astype(column.dtype)
    if kind == "i" and not np.array_equal(cast, found):
        raise ResultError(f"{name}: found values from {found.min()} to {found.max()}; they must fit {column.dtype}.")
    return cast


def stored_scalar(value: Any) -> Any:
    """Return a figure of the summary as it is stored: null becomes NaN."""
    return np.nan if value is None else value


def summary_from(stored: Mapping[str, Any]) -> Summary:
    """Return the summary of stored figures: NaN becomes null where null is allowed, else it stays NaN."""
    values: dict[str, Any] = {}
    for name, value in stored.items():
        field = Summary.model_fields.get(name)
        nullable = field is not None and type(None) in getattr(field.annotation, "__args__", ())
        values[name] = None if nullable and isinstance(value, float) and np.isnan(value) else value
    return Summary.model_validate(values)


def _table(group: str, table: Mapping[str, Any], shape: tuple[int | None, ...]) -> dict[str, np.ndarray]:
    columns = TABLES[group]
    for name in table:
        if name not in columns:
            raise ResultError(f"{group}/{name}: unknown column. Allowed: {', '.join(columns)}.{nearest(name, columns)}")
    missing = [name for name in columns if name not in table]
    if missing:
        raise ResultError(f"{group}: column {', '.join(missing)} missing; found {', '.join(table) or 'none'}.")
    arrays = {name: checked_array(f"{group}/{name}", column, table[name]) for name, column in columns.items()}
    first = next(iter(arrays))
    for name, array in arrays.items():
        fits = array.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, array.shape, strict=True))
        if not fits or array.shape != arrays[first].shape:
            wanted = arrays[first].shape if fits else tuple("any" if n is None else n for n in shape)
            raise ResultError(f"{group}/{name}: found shape {array.shape}; expected {wanted}.")
    if group == "rounds" and not np.array_equal(arrays["round"], np.arange(-1, len(arrays["round"]) - 1)):
        raise ResultError(f"rounds/round: found {arrays['round']}; expected -1, 0, 1, ... without gaps.")
    return arrays
