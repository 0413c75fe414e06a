"""Named arrays, and what both ends of a message know of them before it travels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

Arrays = Mapping[str, np.ndarray]


class Unit(NamedTuple):
    """Name, shape and little-endian dtype of one array of a message."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "<f4"

    @property
    def raw_bytes(self) -> int:
        """Bytes of the array itself."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize
