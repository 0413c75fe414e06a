"""The update of every replica: w minus all directions of a round, rebuilt from scalars in one pass over w."""

from __future__ import annotations

from collections.abc import Iterable

from fedbench.models.trainable import Tensor
from fedbench.zo.direction import Terms
from fedbench.zo.kernels import cpu


def subtract(tensors: Iterable[Tensor], terms: Terms, *, gaussian: bool) -> float:
    """Subtract `terms` from the tensors in place and return the direction entries rebuilt (K times d)."""
    rebuilt = 0.0
    for tensor in tensors:
        keys = cpu.stream_keys(terms.keys, tensor.key)
        cpu.update(tensor.flat, 0, keys, terms.coef, terms.guide_flat(tensor.name), terms.guide_coef, gaussian)
        rebuilt += float(len(terms.keys)) * tensor.size
    return rebuilt
