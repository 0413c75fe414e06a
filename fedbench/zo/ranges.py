"""Guides as everybody reads them: any range of a tensor, or some of its rows, piece by piece.

A guide that came from the cloud is decoded unit by unit as it is read (`span.py`); one that a method makes itself is
computed a tensor at a time (`OnDemand`). Nothing here keeps a whole guide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from fedbench.models.trainable import Tensor

#: What stands for a range of zeros.
NOTHING = np.empty(0, np.float32)

#: First entry, end and values of a range.
Piece = tuple[int, int, np.ndarray]


class Guide(Protocol):
    """A direction's fixed part V over all trainable tensors; values are float32 on the host."""

    def pieces(self, tensor: Tensor, first: int, count: int) -> Iterator[Piece]:
        """Yield ranges in order that cover `count` entries from `first`; a range's values are flat, or empty where all
        of them are zero, and hold until the next range is asked for."""

    def rows(self, tensor: Tensor, rows: np.ndarray, columns: int) -> np.ndarray:
        """Return rows (int64 [r]) of the tensor, taken as a matrix of `columns`: [r, columns]."""


class OnDemand:
    """A guide whose tensors are computed, flat or in shape, when they are asked for; the latest one is kept.

    A direction that is no isotropic draw (masked, of low rank, chosen among candidates) is a guide of this kind with
    `z_scale` 0, so that one tensor of it exists at a time.
    """

    def __init__(self, make: Callable[[str], np.ndarray]) -> None:
        self._make = make
        self._latest: tuple[str, np.ndarray] | None = None

    def pieces(self, tensor: Tensor, first: int, count: int) -> Iterator[Piece]:
        """Yield the range as one piece."""
        yield first, first + count, self._values(tensor)[first : first + count]

    def rows(self, tensor: Tensor, rows: np.ndarray, columns: int) -> np.ndarray:
        """Return the rows."""
        picked: np.ndarray = self._values(tensor).reshape(-1, columns)[rows]
        return picked

    def _values(self, tensor: Tensor) -> np.ndarray:
        if self._latest is None or self._latest[0] != tensor.name:
            self._latest = None
            self._latest = tensor.name, self._make(tensor.name)
        return self._latest[1].reshape(-1)


def pieces_of(guide: Guide | None, tensor: Tensor, first: int, count: int) -> Iterator[Piece]:
    """Yield a guide's pieces of a range; no guide is one piece of zeros."""
    if guide is None:
        yield first, first + count, NOTHING
    else:
        yield from guide.pieces(tensor, first, count)
