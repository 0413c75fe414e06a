"""The update of every replica: w minus all directions of a round, rebuilt from scalars in one pass over w."""

from __future__ import annotations

from collections.abc import Iterable

from fedbench.models.trainable import Tensor
from fedbench.zo.direction import Terms
from fedbench.zo.kernels.device import kernels_of


def subtract(tensors: Iterable[Tensor], terms: Terms, *, gaussian: bool) -> float:
    """Subtract `terms` from the tensors in place and return the direction entries rebuilt (K times d)."""
    rebuilt = 0.0
    for tensor in tensors:
        kernels = kernels_of(tensor.residency)
        keys, guide = kernels.stream_keys(terms.keys, tensor.key), terms.guide_flat(tensor.name)
        for first, part in tensor.pieces(written=True):
            pull = guide[first : first + len(part)]
            kernels.update(part, first, keys, terms.coef, pull, terms.guide_coef, gaussian)
        rebuilt += float(len(terms.keys)) * tensor.size
    return rebuilt
