"""Directions u = a z + b V that are named by a key and never stored.

z is an isotropic draw (Rademacher or Gaussian) that is a pure function of its key, the
tensor and the coordinate; V is a guide that arrived from the cloud. A direction is
written and replayed range by range, so no copy of a whole one ever exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fedbench.base.rng import key
from fedbench.zo.ranges import Guide


def direction_key(seed: int, round_: int, step: int, device: int, p: int) -> tuple[int, int]:
    """Return the 128-bit key of one direction; `device` is 0 where a method shares directions."""
    return key(seed, "direction", round_, step, device, p)


def shared_keys(seeds: np.ndarray, count: int) -> np.ndarray:
    """Return the keys of `count` directions for each seed (uint64 [S]) that everybody was sent, uint64 [S * count, 2]."""
    return as_keys([key(int(seed), "shared direction", p) for seed in seeds.view(np.int64) for p in range(count)])


def as_keys(keys: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return keys as uint64 [K, 2]."""
    return np.array(keys, np.uint64).reshape(-1, 2)


@dataclass(frozen=True)
class Direction:
    """u = z_scale * z(key) + guide_scale * guide, with `key` uint64 [2]."""

    key: np.ndarray
    z_scale: float = 1.0
    guide: Guide | None = None
    guide_scale: float = 0.0


@dataclass(frozen=True)
class Terms:
    """A step to subtract: sum_k coef[k] * z(keys[k]), in this order, then guide_coef * guide.

    `keys` is uint64 [K, 2] and `coef` float32 [K]. It serves as the update of all replicas and
    as the local walk of one device.
    """

    keys: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.uint64))
    coef: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    guide: Guide | None = None
    guide_coef: float = 0.0


#: No walk: the weights as all replicas hold them.
AT_WEIGHTS = Terms()
