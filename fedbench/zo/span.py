"""m orthonormal guides on a replica: their mixes by one coefficient each, and their products with directions.

Guides stay as they travelled (coded, in units of a tile) and are decoded where they are read, one unit at a time
beside at most one tile that is put together from them. Nothing here knows how a guide was made or coded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from fedbench.base.arrays import Arrays
from fedbench.codec.coding import TILE_ENTRIES
from fedbench.models.trainable import Tensor
from fedbench.zo.kernels import cpu
from fedbench.zo.layout import Cutting, Tile, columns_of
from fedbench.zo.ranges import NOTHING, Guide, Piece

#: Entries that are multiplied and added at a time where guides are mixed, so that products take little memory.
_MIXED_AT_ONCE = 16 * 1024


class Span:
    """Guides V_1 .. V_m, orthonormal over all trainable tensors jointly, as units by name."""

    def __init__(self, cutting: Cutting, units: Arrays) -> None:
        self.cutting = cutting
        self.units = units

    def unit(self, tile: Tile) -> np.ndarray:
        """Return the entries of a unit, flat, decoded now unless it is the latest that was."""
        return self.units[tile.name].reshape(-1)

    def mix(self, coef: np.ndarray) -> tuple[Guide, float]:
        """Return sum_j coef[j] V_j as a guide and a factor to multiply it with."""
        if self.cutting.layout.count == 1:
            return Mix(self, {0: None}), float(coef[0])
        return Mix(self, {j: float(c) for j, c in enumerate(coef)}), 1.0

    def products(self, keys: np.ndarray, *, gaussian: bool) -> np.ndarray:
        """Return V_j . z_k of K directions (keys uint64 [K, 2]), float64 [K, m], summed piece by piece."""
        layout = self.cutting.layout
        out = np.zeros((len(keys), layout.count))
        z = np.empty(TILE_ENTRIES, np.float32)
        for tensor in layout.trainable:
            streams = cpu.stream_keys(keys, tensor.key)
            for j in layout.of(tensor):
                for low, high, values in Mix(self, {j: None}).pieces(tensor, 0, tensor.size):
                    for k, stream in enumerate(streams if values.size else ()):
                        cpu.draw(stream, low, z[: high - low], gaussian)
                        out[k, j] += values.astype(np.float64) @ z[: high - low]
        return out


class Mix:
    """sum_j coef[j] V_j as a guide; a coefficient None stands for a lone guide as it is."""

    def __init__(self, span: Span, coef: Mapping[int, float | None]) -> None:
        self._span = span
        self._cutting = span.cutting
        self._coef = coef

    def pieces(self, tensor: Tensor, first: int, count: int) -> Iterator[Piece]:
        """Yield the range unit by unit; rows that weren't sent are zeros."""
        end = first + count
        if self._cutting.rows(tensor) is not None:
            yield from self._between_rows(tensor, first, end)
            return
        mixed = np.empty(0, np.float32)
        for tile in self._cutting.tiles(self._guides(tensor)[0], tensor, first, end):
            low, high = max(first, tile.first), min(end, tile.end)
            if self._lone(tensor):
                yield low, high, self._span.unit(tile)[low - tile.first : high - tile.first]
            else:
                mixed = mixed if len(mixed) >= high - low else np.empty(high - low, np.float32)
                yield low, high, self._read(tensor, low, mixed[: high - low])

    def rows(self, tensor: Tensor, rows: np.ndarray, columns: int) -> np.ndarray:
        """Return the rows, each unit that holds some of them decoded once for each guide."""
        sent = self._cutting.rows(tensor)
        starts, there = rows.astype(np.int64) * columns, np.ones(len(rows), bool)
        if sent is not None:
            found = np.searchsorted(sent, rows).clip(max=len(sent) - 1)
            there, starts = sent[found] == rows, found.astype(np.int64) * columns
        out = np.zeros((len(rows), columns), np.float32)
        if not there.any():
            return out
        reach = int(starts[there].min()), int(starts[there].max()) + columns
        for number, j in enumerate(self._guides(tensor)):
            for tile in self._cutting.tiles(j, tensor, *reach):
                inside = there & (starts >= tile.first) & (starts < tile.end)
                if inside.any():
                    matrix = self._span.unit(tile).reshape(-1, columns)
                    _add(out, inside, matrix[(starts[inside] - tile.first) // columns], self._coef[j], number)
        return out

    def _between_rows(self, tensor: Tensor, first: int, end: int) -> Iterator[Piece]:
        """Yield a range of a tensor of which some rows were sent."""
        sent, columns = self._cutting.rows(tensor), columns_of(tensor)
        assert sent is not None
        at_once = max(1, TILE_ENTRIES // columns)
        buffer = np.empty((0, columns), np.float32)
        for top in range(first // columns, -(-end // columns), at_once):
            bottom = min(top + at_once, -(-end // columns))
            low, high = max(first, top * columns), min(end, bottom * columns)
            since, until = (int(place) for place in np.searchsorted(sent, (top, bottom)))
            if since == until:
                yield low, high, NOTHING
                continue
            buffer = buffer if len(buffer) else np.empty((at_once, columns), np.float32)
            whole = buffer[: bottom - top]
            whole[:] = 0
            for number, j in enumerate(self._guides(tensor)):
                for tile in self._cutting.tiles(j, tensor, since * columns, until * columns):
                    a, b = max(since, tile.first // columns), min(until, tile.end // columns)
                    matrix = self._span.unit(tile).reshape(-1, columns)
                    part = matrix[a - tile.first // columns : b - tile.first // columns]
                    _add(whole, sent[a:b] - top, part, self._coef[j], number)
            yield low, high, whole.reshape(-1)[low - top * columns : high - top * columns]

    def _read(self, tensor: Tensor, low: int, out: np.ndarray) -> np.ndarray:
        """Write the mix of entries from `low` to `out`, one guide's unit after the other, and return it."""
        for number, j in enumerate(self._guides(tensor)):
            for tile in self._cutting.tiles(j, tensor, low, low + len(out)):
                values = self._span.unit(tile)
                for a in range(max(low, tile.first), min(low + len(out), tile.end), _MIXED_AT_ONCE):
                    b = min(a + _MIXED_AT_ONCE, tile.end, low + len(out))
                    _add(out, slice(a - low, b - low), values[a - tile.first : b - tile.first], self._coef[j], number)
        return out

    def _guides(self, tensor: Tensor) -> list[int]:
        return [j for j in self._cutting.layout.of(tensor) if j in self._coef]

    def _lone(self, tensor: Tensor) -> bool:
        guides = self._guides(tensor)
        return len(guides) == 1 and self._coef[guides[0]] is None


def _add(out: np.ndarray, where: np.ndarray | slice, values: np.ndarray, coef: float | None, number: int) -> None:
    """Set entries of `out` to coef times values for the first guide (number 0), and add to them for the others."""
    weighed = values if coef is None else coef * values
    if number == 0:
        out[where] = weighed
    else:
        out[where] += weighed
