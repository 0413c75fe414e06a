"""Numbers of many devices at once, each from its own key: no stream is shared, so no order of calls matters.

A draw is a pure function of (seed, purpose, numbers, device). It is for simulated times and dropouts alone; directions
and batches have their own streams.
"""

from __future__ import annotations

import numpy as np

from fedbench.base import rng
from fedbench.sim import exact

#: Constants of splitmix64, whose finaliser spreads every bit of its argument over all 64.
_STEP, _M1, _M2 = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def uniform(seed: int, purpose: str, numbers: tuple[int, ...], devices: np.ndarray) -> np.ndarray:
    """Return one number in [0, 1) for each device (float64 [n]); `devices` are their numbers, int64 [n]."""
    low, high = (np.uint64(word) for word in rng.key(seed, purpose, *numbers))
    with np.errstate(over="ignore"):
        mixed = _mix(_mix(devices.astype(np.uint64) * _STEP + low) + high)
    return (mixed >> np.uint64(11)) * 2.0**-53


def lognormal(seed: int, purpose: str, sigma: float, devices: np.ndarray) -> np.ndarray:
    """Return one factor for each device (float64 [n]), median 1 and `sigma` the spread of its logarithm; 1 for 0.

    The same bits on every machine, as those of `uniform`.
    """
    if sigma == 0:
        return np.ones(devices.size)
    radius = np.sqrt(-2.0 * exact.log(1.0 - uniform(seed, purpose, (0,), devices)))
    return exact.exp(sigma * (radius * exact.cos_turns(uniform(seed, purpose, (1,), devices))))


def _mix(x: np.ndarray) -> np.ndarray:
    """Return splitmix64's finaliser of uint64 [n]."""
    x = (x ^ (x >> np.uint64(30))) * _M1
    x = (x ^ (x >> np.uint64(27))) * _M2
    return np.asarray(x ^ (x >> np.uint64(31)))
