"""The only code that puts files in place: a file is there whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fedbench.base.errors import StorageError


def replace_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file in the same folder, then fsync it and rename it to `path`.

    On any error the temporary file is removed and an earlier `path` stays as it was; StorageError where the file system
    is the cause.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        _make_folder(path.parent)
        try:
            write(temporary)
            _fsync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _fsync(path.parent)
    except OSError as error:
        raise StorageError(f"{path}: can't be written: {error.strerror or error}.") from error


def probe(folder: Path) -> None:
    """Write a file into `folder`, or into the nearest one above it that is there, and remove it; else StorageError."""
    place = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    temporary = place / f".probe.{uuid.uuid4().hex[:8]}.tmp"
    try:
        try:
            temporary.touch()
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: can't be written: {error.strerror or error}.") from error


def need_space(path: Path, size_bytes: int) -> None:
    """Raise StorageError where the file system of `path` has less room than that, before a library runs into it."""
    place = os.statvfs(path.parent)
    free = place.f_bavail * place.f_frsize
    if free < size_bytes:
        raise StorageError(
            f"{path}: can't be written: it takes about {size_bytes:,} bytes, the disk has {free:,} left."
        )


def leftovers(path: Path) -> list[Path]:
    """Return the temporary files that killed writers of `path` left; one of a living writer is among them."""
    return sorted(path.parent.glob(f".{path.name}.*.tmp"))


def sweep_up(path: Path) -> None:
    """Remove what killed writers of `path` left, as far as that is allowed; the caller knows that none is alive."""
    for left in leftovers(path):
        with suppress(OSError):
            left.unlink()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text by `replace_whole`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes by `replace_whole`."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    replace_whole(path, write)


def fill_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` fill a temporary folder beside `folder`, sync it and rename it; `folder` may be there, but empty."""
    _make_folder(folder.parent)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        fill(temporary)
        for path in (*temporary.rglob("*"), temporary):
            _fsync(path)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _fsync(folder.parent)


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, and sync the parent of each that was not there."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(made):
        _fsync(path.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
