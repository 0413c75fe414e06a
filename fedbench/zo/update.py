"""The update of every replica: w minus all directions of a round, rebuilt from scalars in one pass over w."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fedbench.models.trainable import Tensor
from fedbench.zo.direction import Terms
from fedbench.zo.kernels.device import kernels_of
from fedbench.zo.ranges import pieces_of


def subtract(
    tensors: Iterable[Tensor], terms: Terms, *, gaussian: bool, poll: Callable[[], None] = lambda: None
) -> float:
    """Subtract `terms` from the tensors in place and return the direction entries rebuilt (K times d).

    `poll` is called after every range.
    """
    rebuilt = 0.0
    for tensor in tensors:
        kernels = kernels_of(tensor.residency)
        keys, take = kernels.stream_keys(terms.keys, tensor.key), tensor.residency.take
        for first, part in tensor.pieces(written=True):
            for low, high, values in pieces_of(terms.guide, tensor, first, len(part)):
                pull = take(values) if values.size else values
                own = part[low - first : high - first]
                kernels.update(own, low, keys, terms.coef, pull, terms.guide_coef, gaussian)
                poll()
        rebuilt += float(len(terms.keys)) * tensor.size
    return rebuilt
