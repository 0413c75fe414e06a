"""Keyed random damage to files: cuts, flipped bits, lost blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

BLOCK_BYTES = 512

#: Damages a file in place, at a place drawn from the generator.
Damage = Callable[[Path, np.random.Generator], None]


def cut(path: Path, draw: np.random.Generator) -> None:
    """Cut the file at a random place."""
    content = path.read_bytes()
    path.write_bytes(content[: int(draw.integers(0, len(content)))])


def flip(path: Path, draw: np.random.Generator) -> None:
    """Flip one random bit."""
    content = bytearray(path.read_bytes())
    content[int(draw.integers(0, len(content)))] ^= 1 << int(draw.integers(8))
    path.write_bytes(content)


def lose_block(path: Path, draw: np.random.Generator) -> None:
    """Put other bytes in the place of a random block, as a disk that lost it returns."""
    content = bytearray(path.read_bytes())
    start = int(draw.integers(0, max(1, len(content) - BLOCK_BYTES)))
    content[start : start + BLOCK_BYTES] = bytes(255 - byte for byte in content[start : start + BLOCK_BYTES])
    path.write_bytes(content)


def readable(text: str, name: str) -> bool:
    """Return whether a cause is one line that names the file and is no traceback."""
    return name in text and "\n" not in text.strip() and "Traceback" not in text
