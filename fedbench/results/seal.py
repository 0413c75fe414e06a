"""A checksum over a whole run file, kept in its HDF5 user block: damage is known before HDF5 reads a byte.

HDF5 skips the first 512 bytes of a file that was made with a user block. They hold
one line of text with the SHA-256 of everything behind them. A file whose seal fits is
exactly what the writer wrote, so the library can't be led into endless loops by it; a
single changed bit anywhere, the seal included, breaks it. Nothing here needs h5py.
"""

from __future__ import annotations

import enum
import hashlib
from pathlib import Path
from typing import BinaryIO

BLOCK_BYTES = 512
_HDF5 = b"\x89HDF\r\n\x1a\n"
_TITLE = b"fedbench run file\n"
_READ_BYTES = 1 << 20


class Seal(enum.Enum):
    """What the first bytes of a file say about the rest."""

    WHOLE = "as written"
    BROKEN = "changed or cut after it was written"
    ABSENT = "an HDF5 file that fedbench did not seal"
    NOT_HDF5 = "not an HDF5 file"


def put(path: Path) -> None:
    """Write the seal into the user block of a closed HDF5 file."""
    with path.open("r+b") as handle:
        handle.seek(BLOCK_BYTES)
        block = _block(_digest(handle))
        handle.seek(0)
        handle.write(block)


def sealed(image: bytes) -> bytes:
    """Return a whole file: the user block with the seal, and what HDF5 wrote behind it."""
    return _block(hashlib.sha256(image).hexdigest()) + image


def check(path: Path) -> Seal:
    """Return the state of a file from its bytes alone; OSError where it can't be read."""
    with path.open("rb") as handle:
        block = handle.read(BLOCK_BYTES)
        if block.startswith(_HDF5):
            return Seal.ABSENT
        start = handle.read(len(_HDF5))
        handle.seek(BLOCK_BYTES)
        if start == _HDF5:
            return Seal.WHOLE if block == _block(_digest(handle)) else Seal.BROKEN
        return Seal.BROKEN if block.startswith(_TITLE) else Seal.NOT_HDF5


def told(path: Path) -> str:
    """Return the digest that a file's seal names, unchecked, or an empty string where it has none."""
    with path.open("rb") as handle:
        words = handle.read(BLOCK_BYTES).removeprefix(_TITLE).split()
    return words[1].decode("ascii", "replace") if words[:1] == [b"sha256"] and len(words) > 1 else ""


def _digest(handle: BinaryIO) -> str:
    digest = hashlib.sha256()
    while piece := handle.read(_READ_BYTES):
        digest.update(piece)
    return digest.hexdigest()


def _block(digest: str) -> bytes:
    text = _TITLE + f"sha256 {digest} of all bytes from {BLOCK_BYTES} on\n".encode()
    return text.ljust(BLOCK_BYTES, b"\0")
