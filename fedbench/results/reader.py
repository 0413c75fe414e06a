"""Reads run files and answers whether a run is done; it never changes a file, at most it moves a bad one aside.

HDF5 can loop for ever on damaged metadata, so bytes are judged before the library sees
them. A sealed file (every file of `results/writer.py`) that matches its seal is exactly
what HDF5 wrote and is read here and now; one that does not match is damaged and is not
opened. An HDF5 file without a seal, as another tool leaves it, is first read by a child
process with a deadline: what the child read to the end is read here, on the same bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from pydantic import ValidationError

from fedbench.base import identity
from fedbench.base.errors import EXIT_FAILURE, ResultError
from fedbench.base.records import SCHEMA_VERSION, STOP_REASONS, Run
from fedbench.results import schema, seal

DEADLINE_S = 20.0
_EXIT_NOT_READY = 3

#: The group of a file of many runs that holds them, by run_id.
COLLECTED = "runs"

_DAMAGE = (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError, OverflowError, MemoryError)
_CHILD = "import sys; from pathlib import Path; from fedbench.results import reader; reader.try_out(Path(sys.argv[1]))"


class Verdict(NamedTuple):
    """Whether a run file counts as done; `damaged` files belong into `quarantine`, `reason` says what was found."""

    done: bool
    damaged: bool
    reason: str


def read(path: Path, deadline_s: float = DEADLINE_S) -> Run:
    """Return the run at `path`; ResultError where it is missing, damaged, incomplete or of another schema."""
    runs = read_all(path, deadline_s)
    if len(runs) != 1:
        raise ResultError(f"{path}: holds {len(runs)} runs; expected one. `fedbench report` reads many.")
    return runs[0]


def read_all(path: Path, deadline_s: float = DEADLINE_S, without: Collection[str] = ()) -> list[Run]:
    """Return the runs at `path`, be it a run file or what `results/collect.py` wrote; errors as those of `read`.

    Of a collection those whose run_id is in `without` are not read.
    """
    _judge(path, deadline_s, explain=True)
    return _read(path, without)


def inspect(path: Path, run_id: str, deadline_s: float = DEADLINE_S) -> Verdict:
    """Return whether `path` holds the finished run `run_id`.

    Done: the file opens, its schema is known, `complete` is true, its `run_id` is the one asked for and
    that of its stored config, it has as many rows as rounds were run, and it stopped by `rounds` or `target`.
    """
    try:
        if not path.exists():
            return Verdict(False, False, f"{path}: missing.")
        _judge(path, deadline_s, explain=False)
        with _opened(path) as file:
            found = str(file.attrs["run_id"])
            named = identity.run_id(json.loads(file.attrs["config"]))
            rounds, rows = int(file["summary/rounds"][()]), len(file["rounds/round"])
            reason = str(file.attrs["stop_reason"])
    except _NotReady as error:
        return Verdict(False, False, str(error))
    except ResultError as error:
        return Verdict(False, True, str(error))
    except _DAMAGE as error:
        if _passes(error):
            return Verdict(False, False, str(_unread(path, error)))
        return Verdict(False, True, f"{path}: damaged: {error}.")
    if not found == named == run_id:
        return Verdict(False, False, f"{path}: holds {found}, its config gives {named}; expected {run_id}.")
    if rows != rounds + 1:
        return Verdict(False, True, f"{path}: has {rows} rows; expected {rounds + 1} for {rounds} rounds.")
    if reason not in STOP_REASONS:
        return Verdict(False, False, f"{path}: stopped by {reason}; done means {' or '.join(STOP_REASONS)}.")
    return Verdict(True, False, f"{path}: done.")


def is_done(path: Path, run_id: str, deadline_s: float = DEADLINE_S) -> bool:
    """Return `inspect(...).done`."""
    return inspect(path, run_id, deadline_s).done


def quarantine(path: Path) -> Path:
    """Move a bad run file into the folder `bad` beside it under a free name, and return where it went."""
    folder = path.parent / "bad"
    try:
        folder.mkdir(exist_ok=True)
        number, target = 0, folder / path.name
        while target.exists():
            number += 1
            target = folder / f"{path.name}.{number}"
        os.rename(path, target)
    except OSError as error:
        raise ResultError(
            f"{path} is not a complete run and can't be moved to {folder}: {error.strerror or error}."
        ) from error
    return target


def try_out(path: Path) -> None:
    """Read a file of unknown origin to the end and print what was wrong; the child process of `read` does this."""
    try:
        _read(path)
    except ResultError as error:
        print(error)
        sys.exit(_EXIT_NOT_READY if isinstance(error, _NotReady) else EXIT_FAILURE)


class _NotReady(ResultError):
    """A file that does not count and of which nothing says that it is damaged: incomplete, of another schema, not read."""


def _passes(error: BaseException) -> bool:
    """Return whether the system, and not the file's content, is at fault: too many files, no right, no memory."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)


def _unread(path: Path, error: BaseException) -> _NotReady:
    return _NotReady(f"{path}: can't be read: {str(error) or type(error).__name__}.")


def _judge(path: Path, deadline_s: float, *, explain: bool) -> None:
    """Raise ResultError unless HDF5 can be let near `path`."""
    try:
        if path.exists() and not path.is_file():  # to open a pipe would wait for ever
            raise ResultError(f"{path}: not a regular file.")
        state = seal.check(path)
    except FileNotFoundError:
        raise ResultError(f"{path}: no such run file.") from None
    except (OSError, MemoryError) as error:
        raise _unread(path, error) from None
    if state is seal.Seal.NOT_HDF5:
        raise ResultError(f"{path}: {state.value}.")
    if state is seal.Seal.BROKEN:
        fault = _child_error(path, deadline_s) if explain else None
        told = f" ({str(fault).removeprefix(f'{path}: ').rstrip('.')})" if fault else ""
        raise ResultError(f"{path}: {state.value}: its bytes don't match its seal{told}.")
    if state is seal.Seal.ABSENT:
        fault = _child_error(path, deadline_s)
        if fault:
            raise fault


def _child_error(path: Path, deadline_s: float) -> ResultError | None:
    """Return the error that stops a child process from reading `path` within the deadline, or None."""
    try:
        child = subprocess.run(
            [sys.executable, "-c", _CHILD, str(path)], capture_output=True, text=True, timeout=deadline_s, check=False
        )
    except subprocess.TimeoutExpired:
        return ResultError(f"{path}: damaged: not read after {deadline_s:g} s.")
    if child.returncode == 0:
        return None
    if child.returncode == _EXIT_NOT_READY:
        return _NotReady(child.stdout.strip())
    return ResultError(child.stdout.strip() or f"{path}: damaged: reading it ended with status {child.returncode}.")


def _opened(path: Path) -> h5py.File:
    """Return the open file; the errors of a file that is not a complete run of this schema."""
    file = h5py.File(path, "r", locking="best-effort")
    try:
        found = file.attrs.get("schema_version")
        if found is None:
            raise ResultError(f"{path}: has no schema_version; not a run file.")
        if int(found) != SCHEMA_VERSION:
            raise _NotReady(
                f"{path}: found schema version {found}; needed: {SCHEMA_VERSION}. Another version of fedbench wrote it: run "
                "the job again, or read the file with that version."
            )
        if not bool(file.attrs.get("complete", False)):
            raise _NotReady(f"{path}: incomplete; its run did not end.")
    except BaseException:
        file.close()
        raise
    return file


def _read(path: Path, without: Collection[str] = ()) -> list[Run]:
    try:
        with _opened(path) as file:
            many = file.get(COLLECTED)
            places = [file] if many is None else [many[run_id] for run_id in many if run_id not in without]
            return [_run(place, path.stat().st_size) for place in places]
    except _NotReady:
        raise
    except ValidationError as error:
        raise ResultError(f"{path}: its summary does not fit: {error.errors(include_url=False)[0]['msg']}.") from None
    except ResultError as error:
        raise ResultError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    except _DAMAGE as error:
        raise ResultError(f"{path}: damaged: {error}.") from None


def _run(place: h5py.Group, limit: int) -> Run:
    tables = {group: _table(place[group], group, limit) for group in schema.TABLES}
    stored = {name: _scalar(place["summary"][name]) for name in place["summary"]}
    run = Run(
        config=json.loads(place.attrs["config"]),
        provenance=json.loads(place.attrs["provenance"]),
        summary=schema.summary_from(stored),
        **tables,
    )
    schema.checked_tables(run)
    return run


def _table(group: h5py.Group, name: str, limit: int) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    known = [column for column in schema.TABLES[name] if column in group]
    for column in [*known, *(column for column in group if column not in known)]:
        dataset = group[column]
        if dataset.nbytes > limit:
            raise ResultError(f"{name}/{column} claims {dataset.nbytes} bytes in a file of {limit}.")
        arrays[column] = dataset.asstr()[()].astype(str) if h5py.check_string_dtype(dataset.dtype) else dataset[()]
    return arrays


def _scalar(dataset: h5py.Dataset) -> Any:
    return dataset.asstr()[()] if h5py.check_string_dtype(dataset.dtype) else dataset[()].item()
