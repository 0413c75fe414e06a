"""Brings run files together in one: `/runs/<run_id>` holds a copy of all that the run file holds, and its hash.

Copies, never links: a linked file that is gone reads as zeros without an error. The file is built anew beside the
old one and put in its place whole; runs that the old one holds unchanged are taken from there. The seal of every run
file is checked each time, and one collection waits for another that is at work. Nothing is deleted: what is damaged is
moved into a folder `bad` beside it, what is of another kind or schema is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import h5py

from fedbench.base import fsio
from fedbench.base.errors import ResultError, StorageError
from fedbench.base.records import SCHEMA_VERSION
from fedbench.results import reader, seal

NAME = "all.h5"

#: Attribute of `/runs/<run_id>`: the digest that seals the run file, or an empty string where it was not sealed.
SOURCE_SHA256 = "source_sha256"


class Collected(NamedTuple):
    """What a collection came to: how many runs are new or changed, all that it holds, and what was left out and why."""

    new: int
    held: frozenset[str]
    left_out: tuple[str, ...]


def collect(path: Path, files: Mapping[str, Path]) -> Collected:
    """Let `path` hold the finished runs of `files` (run_id -> run file) beside what it holds.

    ResultError where `path` is no collection of this schema, which then stays as it was.
    """
    with _alone(path.parent):
        return _collect(path, files)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of the folder's collection for the block: two at a time would each miss what the other adds."""
    lock = folder / "collect.lock"
    try:
        handle = lock.open("a")
    except OSError as error:
        raise StorageError(f"{lock}: can't be written: {error.strerror}.") from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _collect(path: Path, files: Mapping[str, Path]) -> Collected:
    left_out: list[str] = []
    held = _held(path, left_out)
    digests = {run_id: _told(file) for run_id, file in files.items()}
    new: list[str] = []
    for run_id, digest in digests.items():
        if digest and held.get(run_id) == digest and seal.check(files[run_id]) is seal.Seal.WHOLE:
            continue
        verdict = reader.inspect(files[run_id], run_id)
        if verdict.done:
            new.append(run_id)
        else:
            moved = f" It was moved to {reader.quarantine(files[run_id])}" if verdict.damaged else ""
            kept = f"; {path} keeps the copy that it has." if run_id in held else "."
            left_out.append(verdict.reason + (moved + kept if moved else ""))
    known = held | {run_id: digests[run_id] for run_id in new}
    if new or not path.exists():
        sources = dict.fromkeys(held) | {run_id: files[run_id] for run_id in new}
        fsio.need_space(
            path, sum(file.stat().st_size for file in (*map(files.__getitem__, new), *([path] * bool(held))))
        )
        fsio.replace_whole(path, functools.partial(_fill, old=path, sources=sources, digests=known))
    return Collected(len(new), frozenset(known), tuple(left_out))


def _told(file: Path) -> str:
    """Return what a run file's seal says, nothing where there is no file to read; `reader.inspect` tells why."""
    return seal.told(file) if file.is_file() else ""


def _held(path: Path, left_out: list[str]) -> dict[str, str]:
    """Return run_id -> hash of what an earlier collection holds; one that is damaged is put aside.

    ResultError where it is of another schema or kind: what it holds may be nowhere else.
    """
    if not path.exists():
        return {}
    state = seal.check(path) if path.is_file() else seal.Seal.NOT_HDF5
    if state is seal.Seal.BROKEN:
        left_out.append(f"{path}: {state.value}; it was moved to {reader.quarantine(path)} and is made anew.")
        return {}
    if state is not seal.Seal.WHOLE:
        raise ResultError(f"{path}: {state.value}, so it is not touched. Move it away, or collect into another file.")
    with h5py.File(path, "r", locking="best-effort") as file:
        found = int(file.attrs["schema_version"])
        if found != SCHEMA_VERSION:
            raise ResultError(
                f"{path}: found a collection of schema version {found}; runs of version {SCHEMA_VERSION} can't be added. "
                "Move it away, or collect into another file."
            )
        if reader.COLLECTED not in file:
            raise ResultError(f"{path}: found a run file; expected a collection. Move it away, or collect elsewhere.")
        return {run_id: str(group.attrs[SOURCE_SHA256]) for run_id, group in file[reader.COLLECTED].items()}


def _fill(path: Path, *, old: Path, sources: Mapping[str, Path | None], digests: Mapping[str, str]) -> None:
    """Write the collection; a run without a source of its own is taken from `old`."""
    with h5py.File(path, "x", userblock_size=seal.BLOCK_BYTES, locking="best-effort") as file:
        file.attrs["schema_version"] = SCHEMA_VERSION
        runs = file.create_group(reader.COLLECTED)
        with contextlib.ExitStack() as stack:
            kept: Any = {}
            if None in sources.values():
                kept = stack.enter_context(h5py.File(old, "r", locking="best-effort"))[reader.COLLECTED]
            for run_id, source in sorted(sources.items()):
                if source is None:
                    runs.copy(kept[run_id], run_id)
                    continue
                with h5py.File(source, "r", locking="best-effort") as one:
                    runs.copy(one, run_id)
                runs[run_id].attrs[SOURCE_SHA256] = digests[run_id]
        file.attrs["complete"] = True
    seal.put(path)
