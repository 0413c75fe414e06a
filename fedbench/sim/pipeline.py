"""The layer pipeline in closed form: when a device has computed behind units that arrive one after the other.

    x_l = max(x_{l-1}, s_l) + t_l        unit l has crossed: it was ready at s_l, its transfer takes t_l
    c_l = max(c_{l-1}, x_l) + k_l        and the compute behind it is done, which takes k_l (methods.md 2.15, SPC)

All devices of a round go through it at once; times are seconds as float64. Nothing here knows links or bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Seconds = np.ndarray | float


def crossed(start: Seconds, ready: Sequence[Seconds], transfer: Sequence[Seconds]) -> list[Seconds]:
    """Return x_1 .. x_L over a link that is free from `start` on."""
    found, x = [], start
    for s, t in zip(ready, transfer, strict=True):
        x = np.maximum(x, s) + t
        found.append(x)
    return found


def makespan(arrived: Sequence[Seconds], compute: Sequence[Seconds]) -> Seconds:
    """Return c_L of units that arrived at x_1 .. x_L; there is at least one."""
    c: Seconds = -np.inf
    for x, k in zip(arrived, compute, strict=True):
        c = np.maximum(c, x) + k
    return c
