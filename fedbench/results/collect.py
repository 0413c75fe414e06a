"""Brings run files together in one: `/runs/<run_id>` holds a copy of all that the run file holds, and its hash.

Copies, never links: a linked file that is gone reads as zeros without an error. The file is built anew beside the
old one and put in its place whole; runs that the old one holds unchanged are taken from there.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import h5py

from fedbench.base import fsio
from fedbench.base.errors import ResultError
from fedbench.base.records import SCHEMA_VERSION
from fedbench.results import reader, seal

NAME = "all.h5"

#: Attribute of `/runs/<run_id>`: the digest that seals the run file, or an empty string where it was not sealed.
SOURCE_SHA256 = "source_sha256"


def collect(path: Path, files: Mapping[str, Path]) -> int:
    """Let `path` hold the runs of `files` (run_id -> run file) beside what it holds; return how many are new or changed.

    ResultError names a run file that is not complete and sound; `path` then stays as it was.
    """
    held = _held(path)
    digests = {run_id: seal.told(file) for run_id, file in files.items()}
    new = [run_id for run_id, digest in digests.items() if not digest or held.get(run_id) != digest]
    for run_id in new:
        verdict = reader.inspect(files[run_id], run_id)
        if not verdict.done:
            raise ResultError(f"{verdict.reason} Not collected; nothing was changed.")
    if new or not path.exists():
        sources = dict.fromkeys(held) | {run_id: files[run_id] for run_id in new}
        fsio.replace_whole(path, functools.partial(_fill, old=path, sources=sources, digests=held | digests))
    return len(new)


def _held(path: Path) -> dict[str, str]:
    """Return run_id -> hash of what an earlier collection holds; nothing where there is none, or it is damaged.

    ResultError where it is of another schema: its runs may be nowhere else.
    """
    if not path.exists() or seal.check(path) is not seal.Seal.WHOLE:
        return {}
    with h5py.File(path, "r", locking="best-effort") as file:
        found = int(file.attrs["schema_version"])
        if found != SCHEMA_VERSION:
            raise ResultError(
                f"{path}: found a collection of schema version {found}; runs of version {SCHEMA_VERSION} can't be added. "
                "Move it away, or collect into another file."
            )
        return {run_id: str(group.attrs[SOURCE_SHA256]) for run_id, group in file[reader.COLLECTED].items()}


def _fill(path: Path, *, old: Path, sources: Mapping[str, Path | None], digests: Mapping[str, str]) -> None:
    """Write the collection; a run without a source of its own is taken from `old`."""
    with h5py.File(path, "x", userblock_size=seal.BLOCK_BYTES, locking="best-effort") as file:
        file.attrs["schema_version"] = SCHEMA_VERSION
        runs = file.create_group(reader.COLLECTED)
        for run_id, source in sorted(sources.items()):
            with h5py.File(source or old, "r", locking="best-effort") as one:
                runs.copy(one if source else one[f"{reader.COLLECTED}/{run_id}"], run_id)
            runs[run_id].attrs[SOURCE_SHA256] = digests[run_id]
        file.attrs["complete"] = True
    seal.put(path)
