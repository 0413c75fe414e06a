"""What is done to one group: 1,024 entries as 64 rows of 16 lanes, a lane being one block of 64 entries.

Sums and maxima over blocks go row by row, so they are plain vector code and their order is fixed. Arrays x, y, t hold a
group, `told` and `scale` a value for each lane. Nothing is checked here, and nothing is compiled by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba.extending import register_jitable

ROWS, LANES = 64, 16
GROUP = ROWS * LANES

_F = np.float32
_ZERO = _F(0)
#: What turns a sum over rows into a mean.
MEAN = _F(1 / ROWS)
_TINY = _F(2.0**-60)  # a scale below it is none: the largest entry of the unit is at least 2**-22
#: Signs of the rows, entry by entry, before a block is turned.
_FLIPS = np.repeat(np.array([1 - 2 * (0x9E3779B97F4A7C15 >> row & 1) for row in range(ROWS)], np.float32), LANES)

inline: Callable[[Any], Any] = register_jitable(error_model="numpy", forceinline=True)


@inline
def _add_halves(t: Any, size: int) -> None:
    for i in range(size):
        t[i] += t[i + size]


@inline
def sum_rows(t: Any) -> None:
    """Leave the sum over rows in the first one."""
    _add_halves(t, 512)
    _add_halves(t, 256)
    _add_halves(t, 128)
    _add_halves(t, 64)
    _add_halves(t, 32)
    _add_halves(t, 16)


@inline
def _max_halves(t: Any, size: int) -> None:
    for i in range(size):
        t[i] = max(t[i], t[i + size])


@inline
def largest(y: Any, t: Any) -> None:
    """Leave the largest |y| of each lane in the first row of t."""
    for i in range(GROUP):
        t[i] = abs(y[i])
    _max_halves(t, 512)
    _max_halves(t, 256)
    _max_halves(t, 128)
    _max_halves(t, 64)
    _max_halves(t, 32)
    _max_halves(t, 16)


@inline
def _double(t: Any, size: int) -> None:
    for i in range(size):
        t[size + i] = t[i]


@inline
def spread(t: Any) -> None:
    """Write the first row to all others: loops over lanes alone are too short to be made vector code."""
    _double(t, 16)
    _double(t, 32)
    _double(t, 64)
    _double(t, 128)
    _double(t, 256)
    _double(t, 512)


@inline
def _three_stages(y: Any, h: int) -> None:
    for start in range(0, GROUP, 8 * h):
        for i in range(start, start + h):
            a0, a1, a2, a3 = y[i], y[i + h], y[i + 2 * h], y[i + 3 * h]
            a4, a5, a6, a7 = y[i + 4 * h], y[i + 5 * h], y[i + 6 * h], y[i + 7 * h]
            b0, b1, b2, b3, b4, b5, b6, b7 = a0 + a1, a0 - a1, a2 + a3, a2 - a3, a4 + a5, a4 - a5, a6 + a7, a6 - a7
            a0, a1, a2, a3, a4, a5, a6, a7 = b0 + b2, b1 + b3, b0 - b2, b1 - b3, b4 + b6, b5 + b7, b4 - b6, b5 - b7
            y[i], y[i + h], y[i + 2 * h], y[i + 3 * h] = a0 + a4, a1 + a5, a2 + a6, a3 + a7
            y[i + 4 * h], y[i + 5 * h], y[i + 6 * h], y[i + 7 * h] = a0 - a4, a1 - a5, a2 - a6, a3 - a7


@inline
def _hadamard(y: Any) -> None:
    """Multiply every lane by the 64 x 64 matrix of Hadamard, entries +-1."""
    _three_stages(y, LANES)
    _three_stages(y, 8 * LANES)


@inline
def turn(x: Any, at: int, power: Any, y: Any) -> None:
    """Write a group times `power` with every block turned: signs by row, then Hadamard, which makes it 8 times as long."""
    for i in range(GROUP):
        y[i] = x[at + i] * (power * _FLIPS[i])
    _hadamard(y)


@inline
def turn_back(y: Any, gain: Any, out: Any, at: int) -> None:
    _hadamard(y)
    for i in range(GROUP):
        out[at + i] = y[i] * (gain * _FLIPS[i])


@inline
def round_scales(t: Any, half: int, told: Any, scale: Any, scale_bits: Any) -> None:
    """Round the scales in t to four binary places; `half` 0x40000 rounds to the nearest, 0x7FFFF up."""
    for c in range(LANES):
        scale[c] = t[c] if t[c] >= _TINY else _ZERO
    for c in range(LANES):
        told[c] = (scale_bits[c] + half) >> 19
        scale_bits[c] = told[c] << 19


@inline
def inverse(levels: Any, scale: Any, out: Any) -> None:
    for c in range(LANES):
        out[c] = levels / scale[c] if scale[c] > _ZERO else _ZERO
    spread(out)
