"""Runs as pandas tables: `open_sweep(path)` of a sweep, a folder of run files, an all.h5 or one run file.

Nothing is written unless `save` is called. pandas is an optional part of fedbench and is imported when it is needed.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedbench.base import fsio
from fedbench.base.config import flatten
from fedbench.base.errors import ConfigError, ResultError
from fedbench.base.records import Column, Run
from fedbench.results import arms, folder, schema

if TYPE_CHECKING:
    import pandas as pd

#: Tables that `save` writes.
SAVED = ("runs", "rounds", "devices")
_KEYS = ("run_id", "method", "seed")


def open_sweep(path: str | Path) -> Tables:
    """Return the finished runs at `path`, each once, in the order of method, seed and run_id.

    ResultError where there is none. Files of a folder that can't be read are left out with a warning that names them,
    and are told in `skipped`.
    """
    place = Path(path)
    runs, skipped = folder.load([place])
    if not runs:
        told = f" Left out: {' '.join(skipped)}" if skipped else ""
        raise ResultError(f"{place}: no finished run there; expected *.h5 of `fedbench run`.{told}")
    for reason in skipped:
        warnings.warn(f"left out: {reason}", stacklevel=2)
    runs.sort(key=lambda run: (run.summary.method, run.summary.seed, run.summary.run_id))
    return Tables(tuple(runs), tuple(skipped))


class Tables:
    """Tables over finished runs; `records` are the runs themselves, with config and provenance as trees.

    Every table has the columns run_id, method and seed, so that tables join on run_id. Missing values are NaN.
    `attrs["units"]` of a table maps its columns to units. A table is made when it is first asked for and may be changed:
    `save` writes what the runs hold.
    """

    def __init__(self, records: tuple[Run, ...], skipped: tuple[str, ...] = ()) -> None:
        self.records = records
        self.skipped = skipped
        self._made: dict[str, pd.DataFrame] = {}

    @functools.cached_property
    def runs(self) -> pd.DataFrame:
        """One row per run: the figures of `fedbench show --json`, its `arm`, the resolved job as `config.<key>`."""
        return self._runs()

    @property
    def rounds(self) -> pd.DataFrame:
        """One row per run and round; round -1 is the state before training, `rounds_done` is round + 1."""
        return self.table("rounds")

    @property
    def devices(self) -> pd.DataFrame:
        """One row per run, round and sampled device."""
        return self.table("devices")

    def table(self, name: str) -> pd.DataFrame:
        """Return a group of the run files as one table: rounds, devices, memory, memory_rounds, spans or codec."""
        if name not in schema.TABLES:
            raise ConfigError(f"table: found {name!r}; allowed: {', '.join(schema.TABLES)}, and `runs`.")
        if name not in self._made:
            self._made[name] = self._table(name)
        return self._made[name]

    def save(self, out: str | Path, form: Literal["csv", "parquet"] = "csv") -> list[Path]:
        """Write runs, rounds and devices to the folder `out` as CSV (UTF-8, empty: missing) or Parquet; return paths."""
        if form not in ("csv", "parquet"):
            raise ConfigError(f"form: found {form!r}; allowed: csv, parquet.")
        if form == "parquet":
            _needed("pyarrow")
        paths = []
        for name in SAVED:
            frame = self._runs() if name == "runs" else self._table(name)
            paths.append(Path(out) / f"{name}.{form}")
            write = frame.to_csv if form == "csv" else frame.to_parquet
            fsio.replace_whole(paths[-1], functools.partial(write, index=False))
        return paths

    def _runs(self) -> pd.DataFrame:
        named, rows = arms.names(self.records), []
        for run in self.records:
            configured = {f"config.{key}": _plain(value) for key, value in flatten(run.config).items()}
            rows.append({**run.summary.model_dump(), "arm": named[run.summary.run_id].label, **configured})
        frame = _pandas().DataFrame(rows)
        for name in frame:
            if name in schema.SUMMARY and schema.SUMMARY[name].unit:  # null is NaN here as it is in the file
                frame[name] = frame[name].astype("float64" if frame[name].dtype == object else frame[name].dtype)
            elif len({_kind(value) for value in frame[name].dropna()}) > 1:  # one column, one type
                frame[name] = frame[name].map(str, na_action="ignore")
        return _with_units(frame, {name: figure.unit for name, figure in schema.SUMMARY.items()})

    def _table(self, name: str) -> pd.DataFrame:
        columns = schema.TABLES[name]
        parts: dict[str, list[np.ndarray]] = {key: [] for key in (*_KEYS, *_first(name), *columns)}
        for run in self.records:
            own: Mapping[str, np.ndarray] = getattr(run, name)
            if not own:
                continue
            flat = {column: np.asarray(values).reshape(-1) for column, values in own.items()}
            rows = len(next(iter(flat.values())))
            keys = {key: np.full(rows, getattr(run.summary, key)) for key in _KEYS}
            for key, values in {**keys, **_numbered(name, own), **flat}.items():
                parts[key].append(values)
        made = {key: np.concatenate(own) if own else _nothing(key, columns) for key, own in parts.items()}
        return _with_units(_pandas().DataFrame(made), {key: column.unit for key, column in columns.items()})


def _first(name: str) -> tuple[str, ...]:
    """Return the columns that a table has beside those of the file."""
    return {"rounds": ("rounds_done",), "devices": ("round",)}.get(name, ())


def _numbered(name: str, own: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the values of `_first`."""
    if name == "rounds":
        return {"rounds_done": own["round"] + 1}
    if name == "devices":
        rounds, sampled = own["device"].shape
        return {"round": np.repeat(np.arange(rounds, dtype="i4"), sampled)}
    return {}


def _nothing(key: str, columns: Mapping[str, Column]) -> np.ndarray:
    return np.empty(0, columns[key].dtype if key in columns else "i8" if key == "seed" else "str")


def _plain(value: Any) -> Any:
    """Return a setting as one cell: a list is text."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else value


def _kind(value: Any) -> type:
    return float if isinstance(value, int | float) and not isinstance(value, bool) else type(value)


def _with_units(frame: pd.DataFrame, units: Mapping[str, str]) -> pd.DataFrame:
    frame.attrs["units"] = dict(units)
    return frame


def _pandas() -> Any:
    _needed("pandas")
    import pandas

    return pandas


def _needed(package: str) -> None:
    """ConfigError where an optional package is missing."""
    try:
        importlib.import_module(package)
    except ImportError:
        raise ConfigError(f"tables need {package}, which is not installed: pip install 'fedbench[analysis]'.") from None
