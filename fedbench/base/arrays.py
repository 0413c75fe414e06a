"""Named arrays, and what both ends of a message know of them before it travels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

Arrays = Mapping[str, np.ndarray]


@runtime_checkable
class Coded(Protocol):
    """Arrays that are held as they travelled and decoded when they are read."""

    def coded(self) -> dict[str, np.ndarray]:
        """Return all of them as they travelled, uint8 by name."""


class Unit(NamedTuple):
    """Name, shape and little-endian dtype of one array of a message.

    With `at_most` the first dimension is an upper bound, and the message says how long it is. `lossy` says that
    float32 entries need not arrive to the bit: only their direction counts, as that of a guide does.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "<f4"
    at_most: bool = False
    lossy: bool = False

    @property
    def entries(self) -> int:
        """Entries of the array, at most."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def raw_bytes(self) -> int:
        """Bytes of the array itself, at most."""
        return self.entries * np.dtype(self.dtype).itemsize

    def of_bytes(self, size: int) -> Unit | None:
        """Return the unit that an array of `size` bytes is, or None where this unit can't have that size."""
        if size == self.raw_bytes:
            return self._replace(at_most=False)
        row = self.raw_bytes // max(1, self.shape[0]) if self.shape else 0
        if not self.at_most or row == 0 or size % row or not 0 <= size < self.raw_bytes:
            return None
        return self._replace(shape=(size // row, *self.shape[1:]), at_most=False)
