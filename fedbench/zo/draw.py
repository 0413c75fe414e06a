"""Directions written out: for methods that look at entries themselves, a tensor at a time.

Whatever can be done from keys alone is done in the stream and the update instead; nothing here keeps a direction.
"""

from __future__ import annotations

import numpy as np

from fedbench.models.trainable import Tensor
from fedbench.zo.kernels import cpu


def entries(tensor: Tensor, key: np.ndarray, *, gaussian: bool, count: int | None = None) -> np.ndarray:
    """Return the first `count` (all by default) entries of a direction (uint64 [2]) in a tensor, flat float32 on the host.

    They are the numbers that a probe with this key adds to the tensor, bit for bit.
    """
    out = np.empty(tensor.size if count is None else count, np.float32)
    cpu.draw(cpu.stream_keys(key[None], tensor.key)[0], 0, out, gaussian)
    return out


def total(tensor: Tensor, keys: np.ndarray, coef: np.ndarray, *, gaussian: bool) -> np.ndarray:
    """Return sum_k coef[k] z(keys[k]) in a tensor, in this order, flat float32 on the host.

    `keys` is uint64 [K, 2], `coef` float32 [K]; no direction is stored on the way.
    """
    out = np.zeros(tensor.size, np.float32)
    cpu.update(out, 0, cpu.stream_keys(keys, tensor.key), -coef, np.empty(0, np.float32), 0.0, gaussian)
    return out


def cosines(tensor: Tensor, keys: np.ndarray, other: np.ndarray, *, gaussian: bool) -> np.ndarray:
    """Return the cosine of each direction (uint64 [K, 2]) in a tensor to `other` (flat float32), float64 [K].

    They are 0 where `other` is. Sums are NumPy's own, whose order doesn't depend on where arrays lie.
    """
    length = float(np.sqrt(np.square(other, dtype=np.float64).sum()))
    found = np.zeros(len(keys))
    for k, key in enumerate(keys if length else ()):
        z = entries(tensor, key, gaussian=gaussian)
        own = float(np.sqrt(np.square(z, dtype=np.float64).sum()))
        found[k] = float((z * other).sum(dtype=np.float64)) / (own * length)
    return found
