"""Finds the runs of files and folders, each once. It changes nothing; what can't be read is told, not hidden."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from fedbench.base.errors import ResultError
from fedbench.base.records import Run
from fedbench.results import collect, reader

_BAD_FOLDER = "bad"


def load(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Return the runs of files and folders, and one sentence per file of a folder that can't be read.

    A folder stands for all run files below it, those in `bad` apart. A run that several files hold is returned once, from
    the file that has its name where there is one; what a sweep has collected in one file adds the runs that have no file
    of their own here. A file named here must be readable (ResultError).
    """
    runs: dict[str, Run] = {}
    collected: list[tuple[Path, bool]] = []
    skipped: list[str] = []
    for file, named in _files(paths):
        if file.name == collect.NAME:
            collected.append((file, named))
            continue
        for run in _read(file, named, skipped, ()):
            if run.summary.run_id not in runs or file.stem == run.summary.run_id:
                runs[run.summary.run_id] = run
    for file, named in collected:
        runs |= {run.summary.run_id: run for run in _read(file, named, skipped, runs.keys())}
    return list(runs.values()), skipped


def _files(paths: Sequence[Path]) -> Iterator[tuple[Path, bool]]:
    """Yield every file to read, and whether it was named by itself."""
    for path in paths:
        if not path.is_dir():
            yield path, True
            continue
        for file in sorted(path.rglob("*.h5")):
            if _BAD_FOLDER not in file.relative_to(path).parts:
                yield file, False


def _read(file: Path, named: bool, skipped: list[str], known: Collection[str]) -> list[Run]:
    try:
        return reader.read_all(file, without=known)
    except ResultError as error:
        if named:
            raise
        skipped.append(str(error))
        return []
