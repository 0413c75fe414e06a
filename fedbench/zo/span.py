"""m orthonormal guides on a replica: their mixes by one coefficient each, and their products with directions.

Guides travel tensor by tensor. Those that are the layers' own shares of one gradient have no entry in common, so they
travel as one array a tensor and cost no more than a single guide. Nothing here knows how a guide was made.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedbench.base.arrays import Arrays, Unit
from fedbench.models.trainable import Tensor, Trainable
from fedbench.zo.direction import OnDemand
from fedbench.zo.draw import entries


class Layout:
    """How many guides there are and under which names their parts travel."""

    def __init__(self, trainable: Trainable, guides: int, *, by_layer: bool = False) -> None:
        self.trainable = trainable
        self._stages = sorted({t.stage for t in trainable})
        self.by_layer = by_layer
        self.count = len(self._stages) if by_layer else guides

    def name(self, guide: int, tensor: Tensor) -> str:
        """Return the name of a guide's part in a tensor."""
        return tensor.name if self.by_layer or self.count == 1 else f"{guide}:{tensor.name}"

    def of(self, tensor: Tensor) -> Sequence[int]:
        """Return the guides that have a part in a tensor."""
        return (self._stages.index(tensor.stage),) if self.by_layer else range(self.count)

    def units(self) -> list[Unit]:
        """Return what travels, tensor by tensor in forward order."""
        return [Unit(self.name(j, t), tuple(t.parameter.shape), lossy=True) for t in self.trainable for j in self.of(t)]

    def bytes(self) -> int:
        """Return the bytes of all guides as float32."""
        return sum(unit.raw_bytes for unit in self.units())


class Span:
    """Guides V_1 .. V_m, orthonormal over all trainable tensors jointly, as they arrived."""

    def __init__(self, layout: Layout, arrays: Arrays) -> None:
        self.layout = layout
        self.arrays = arrays

    def mix(self, coef: np.ndarray) -> tuple[Arrays, float]:
        """Return sum_j coef[j] V_j as arrays by tensor (computed one at a time) and a factor to multiply them with."""
        if self.layout.count == 1:
            return self.arrays, float(coef[0])
        tensors = {t.name: t for t in self.layout.trainable}

        def mixed(name: str) -> np.ndarray:
            """Return one tensor of the sum."""
            tensor = tensors[name]
            first, *others = self.layout.of(tensor)
            total = float(coef[first]) * self.arrays[self.layout.name(first, tensor)]
            for j in others:
                total = total + float(coef[j]) * self.arrays[self.layout.name(j, tensor)]
            return total

        return OnDemand(tensors, mixed), 1.0

    def products(self, keys: np.ndarray, *, gaussian: bool) -> np.ndarray:
        """Return V_j . z_k of K directions (keys uint64 [K, 2]), float64 [K, m]."""
        out = np.zeros((len(keys), self.layout.count))
        for tensor in self.layout.trainable:
            parts = {
                j: tensor.residency.host(self.arrays[self.layout.name(j, tensor)]).reshape(-1).astype(np.float64)
                for j in self.layout.of(tensor)
            }
            for k, key in enumerate(keys):
                z = entries(tensor, key, gaussian=gaussian)
                for j, part in parts.items():
                    out[k, j] += part @ z
        return out
