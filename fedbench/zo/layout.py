"""How guides are cut into the units that travel: tiles of tensors, stage by stage.

A tensor whose gradient is zero outside a few rows (embeddings, label words) travels as those rows; which ones they
are goes ahead as the outline. Both ends derive names and sizes of all units from the outline alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import nn

from fedbench.base.arrays import Arrays, Unit
from fedbench.base.errors import WireError
from fedbench.codec.coding import TILE_ENTRIES
from fedbench.models.cut import Cut, RowHead
from fedbench.models.trainable import Tensor, Trainable

#: How the names of an outline's units begin.
_ROWS = "rows/"

#: The outline of guides all of whose tensors travel whole.
DENSE: Mapping[str, np.ndarray] = {}


class Tile(NamedTuple):
    """One unit of a guide: its name, and which of the entries that are sent of the tensor it holds."""

    name: str
    first: int
    end: int


def columns_of(tensor: Tensor) -> int:
    """Return the entries of one row of a tensor."""
    return tensor.size // max(1, tensor.parameter.shape[0])


def row_sparse(cut: Cut, trainable: Trainable) -> list[Tensor]:
    """Return the tensors of which a batch may use few rows: embedding tables, and heads that read label words alone."""
    tables = {id(m.weight) for m in cut.modules() if isinstance(m, nn.Embedding)}
    tables |= {id(m.linear.weight) for m in cut.modules() if isinstance(m, RowHead)}
    return [t for t in trainable if id(t.parameter) in tables]


class Layout:
    """How many guides there are, which of their tensors may travel as rows, and how the rest is cut."""

    def __init__(
        self, trainable: Trainable, guides: int, *, by_layer: bool = False, sparse: Collection[Tensor] = ()
    ) -> None:
        self.trainable = trainable
        self._stages = sorted({t.stage for t in trainable})
        self.by_layer = by_layer
        self.count = len(self._stages) if by_layer else guides
        self._sparse = tuple(sparse)
        #: Tensors as they travel: a stage's norms and biases before its matrices, which can't be used without them.
        self.order = sorted(trainable, key=lambda t: (t.stage, t.parameter.ndim > 1))

    def name(self, guide: int, tensor: Tensor) -> str:
        """Return the name of a guide's part in a tensor."""
        return tensor.name if self.by_layer or self.count == 1 else f"{guide}:{tensor.name}"

    def of(self, tensor: Tensor) -> Sequence[int]:
        """Return the guides that have a part in a tensor."""
        return (self._stages.index(tensor.stage),) if self.by_layer else range(self.count)

    def outline_units(self) -> list[Unit]:
        """Return what goes ahead: the rows that are sent of each table, none where it is sent whole."""
        return [Unit(_ROWS + t.name, (int(t.parameter.shape[0]),), "<i4", at_most=True) for t in self._sparse]

    def outline(self, guides: Arrays) -> dict[str, np.ndarray]:
        """Return the outline of guides (whole arrays by `name`): rows that are zero in all of them aren't sent."""
        return {_ROWS + t.name: self._rows(t, [guides[self.name(j, t)] for j in self.of(t)]) for t in self._sparse}

    def _rows(self, tensor: Tensor, parts: Sequence[np.ndarray]) -> np.ndarray:
        columns, total = columns_of(tensor), int(tensor.parameter.shape[0])
        used = np.zeros(total, bool)
        for part in parts:
            used |= part.reshape(total, columns).any(axis=1)
        rows = np.flatnonzero(used).astype(np.int32)
        less = len(rows) > 0 and len(rows) * (len(parts) * columns + 1) < len(parts) * tensor.size
        return rows if less else rows[:0]


class Cutting:
    """A layout with an outline: every unit by name, and which entries of which tensor it holds."""

    def __init__(self, layout: Layout, outline: Arrays = DENSE) -> None:
        self.layout = layout
        told = [(t, np.array(outline.get(_ROWS + t.name, ()), np.int32)) for t in layout.trainable]
        self._rows = {t.name: _checked(t, rows) for t, rows in told if len(rows)}

    @property
    def outline(self) -> dict[str, np.ndarray]:
        """The rows of each table that travels as rows, by the names of the outline's units."""
        return {_ROWS + name: rows for name, rows in self._rows.items()}

    def rows(self, tensor: Tensor) -> np.ndarray | None:
        """Return the rows that are sent of a tensor, int32 ascending, or None where it is sent whole."""
        return self._rows.get(tensor.name)

    def tiles(self, guide: int, tensor: Tensor, first: int = 0, end: int | None = None) -> Iterator[Tile]:
        """Yield the units that hold entries `first` to `end` of those sent of a tensor (by default all)."""
        rows, name = self.rows(tensor), self.layout.name(guide, tensor)
        size, columns = tensor.size if rows is None else len(rows) * columns_of(tensor), columns_of(tensor)
        step = TILE_ENTRIES // columns * columns or TILE_ENTRIES
        last = size if end is None else end
        for low in range(first // step * step, last, step):
            yield Tile(name if size <= step else f"{name}/{low // step}", low, min(low + step, size))

    def units(self) -> list[Unit]:
        """Return what travels, tensor by tensor as `order` says; several guides' tiles of the same place together."""
        found: list[Unit] = []
        for tensor in self.layout.order:
            for tiles in zip(*(self.tiles(j, tensor) for j in self.layout.of(tensor)), strict=True):
                found.extend(Unit(tile.name, (tile.end - tile.first,), lossy=True) for tile in tiles)
        return found

    def stages(self) -> list[int]:
        """Return the stage that reads each of the units."""
        layout, found = self.layout, list[int]()
        for tensor in layout.order:
            found.extend(tensor.stage for j in layout.of(tensor) for _ in self.tiles(j, tensor))
        return found

    def unit_rows(self) -> dict[str, np.ndarray]:
        """Return by name the rows that each unit of a table holds, int32 ascending, of tables that travel as rows."""
        found: dict[str, np.ndarray] = {}
        for tensor in self.layout.trainable:
            rows, columns = self.rows(tensor), columns_of(tensor)
            if rows is None:
                continue
            for j in self.layout.of(tensor):
                tiles = self.tiles(j, tensor)
                found.update((tile.name, rows[tile.first // columns : -(-tile.end // columns)]) for tile in tiles)
        return found

    def cut(self, guides: Arrays) -> dict[str, np.ndarray]:
        """Return all units of guides given as whole arrays by the layout's names; views where a tensor is sent whole."""
        units: dict[str, np.ndarray] = {}
        for tensor in self.layout.trainable:
            rows, columns = self.rows(tensor), columns_of(tensor)
            for j in self.layout.of(tensor):
                whole = guides[self.layout.name(j, tensor)].reshape(-1)
                sent = whole if rows is None else whole.reshape(-1, columns)[rows].reshape(-1)
                units.update((tile.name, sent[tile.first : tile.end]) for tile in self.tiles(j, tensor))
        return units


def _checked(tensor: Tensor, rows: np.ndarray) -> np.ndarray:
    """Return the rows of an outline, which must ascend and lie in the tensor."""
    total = int(tensor.parameter.shape[0])
    if rows[0] < 0 or rows[-1] >= total or (np.diff(rows) <= 0).any():
        raise WireError(f"The outline of {tensor.name} is not a list of ascending rows in 0..{total - 1}.")
    return rows
