"""Codes of one group and back: 1,024 entries as 64 rows of 16 lanes, a lane being one block of 64 entries.

Sums and maxima over blocks go row by row, so they are plain vector code and their order is fixed. Arrays y, t, u, v
hold a group, `told` and `scale` a value for each lane. Nothing is checked here, and nothing is compiled by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba.extending import register_jitable

ROWS, LANES = 64, 16
GROUP = ROWS * LANES
_QUARTER, _EIGHTH = GROUP // 4, GROUP // 8

#: Levels of two bits, and the limit between them over the root mean square: Lloyd's and Max's for a normal variable.
INNER, OUTER, LIMIT = np.float32(0.4528), np.float32(1.510), np.float32(0.9816)

_F = np.float32
_ZERO, _HALF, _ONE, _EIGHT = _F(0), _F(0.5), _F(1), _F(8)
_1, _2, _4, _8, _15, _128 = (np.int32(n) for n in (1, 2, 4, 8, 15, 128))
_MEAN = _F(1 / ROWS)
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
def _largest(y: Any, t: Any) -> None:
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
def _spread(t: Any) -> None:
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
def _turn(x: Any, at: int, power: Any, y: Any) -> None:
    """Write a group times `power` with every block turned: signs by row, then Hadamard, which makes it 8 times as long."""
    for i in range(GROUP):
        y[i] = x[at + i] * (power * _FLIPS[i])
    _hadamard(y)


@inline
def _turn_back(y: Any, gain: Any, out: Any, at: int) -> None:
    _hadamard(y)
    for i in range(GROUP):
        out[at + i] = y[i] * (gain * _FLIPS[i])


@inline
def _round_scales(t: Any, half: int, told: Any, scale: Any, scale_bits: Any) -> None:
    """Round the scales in t to four binary places; `half` 0x40000 rounds to the nearest, 0x7FFFF up."""
    for c in range(LANES):
        scale[c] = t[c] if t[c] >= _TINY else _ZERO
    for c in range(LANES):
        told[c] = (scale_bits[c] + half) >> 19
        scale_bits[c] = told[c] << 19


@inline
def _inverse(levels: Any, scale: Any, out: Any) -> None:
    for c in range(LANES):
        out[c] = levels / scale[c] if scale[c] > _ZERO else _ZERO
    _spread(out)


# ---- To codes: each leaves the rounded scales, and in the first row of t the sum of its levels' squares ----


@inline
def code8(
    x: Any, at: int, power: Any, y: Any, t: Any, u: Any, v: Any, told: Any, scale: Any, bits: Any, codes: Any
) -> None:
    """q = 127 x / s rounded, with s = max |x|: codes q + 128."""
    for i in range(GROUP):
        y[i] = x[at + i] * power
    _largest(y, t)
    _round_scales(t, 0x7FFFF, told, scale, bits)
    _inverse(_F(127), scale, u)
    for i in range(GROUP):
        q = np.floor(y[i] * u[i] + _HALF)
        t[i] = q * q
        codes[i] = np.uint8(np.int32(q) + _128)
    sum_rows(t)


@inline
def _cell(y: Any, inverse: Any) -> Any:
    return min(max(np.floor(y * inverse), -_EIGHT), _F(7))


@inline
def code4(
    x: Any, at: int, power: Any, y: Any, t: Any, u: Any, v: Any, told: Any, scale: Any, bits: Any, codes: Any
) -> None:
    """Level q + 1/2 with q = floor(8 y / s) of the turned block y, s = max |y|: codes q + 8."""
    _turn(x, at, power, y)
    _largest(y, t)
    _round_scales(t, 0x7FFFF, told, scale, bits)
    _inverse(_EIGHT, scale, u)
    for i in range(GROUP // 2):
        low, high = _cell(y[i], u[i]), _cell(y[i + GROUP // 2], u[i])
        t[i] = (low + _HALF) * (low + _HALF) + (high + _HALF) * (high + _HALF)
        codes[i] = np.uint8((np.int32(low) + _8) | (np.int32(high) + _8) << _4)
    for i in range(GROUP // 2, GROUP):
        t[i] = _ZERO
    sum_rows(t)


@inline
def _sign_and_level(y: Any, square: Any) -> Any:
    return np.int32(y < _ZERO) | np.int32(square > _ONE) << _1


@inline
def code2(
    x: Any, at: int, power: Any, y: Any, t: Any, u: Any, v: Any, told: Any, scale: Any, bits: Any, codes: Any
) -> None:
    """Levels +-INNER and +-OUTER of the turned block y: codes with a bit for minus, and a bit for outer above it.

    s = sum |y| level / sum level^2 is the scale that comes nearest to y.
    """
    _turn(x, at, power, y)
    for i in range(GROUP):
        t[i] = y[i] * y[i]
    sum_rows(t)
    for c in range(LANES):
        v[c] = LIMIT * np.sqrt(t[c] * _MEAN)
    _spread(v)
    for i in range(GROUP):
        level = OUTER if abs(y[i]) > v[i] else INNER
        t[i] = abs(y[i]) * level
        u[i] = level * level
    for i in range(_QUARTER):
        low = _sign_and_level(y[i], u[i]) | _sign_and_level(y[i + _QUARTER], u[i + _QUARTER]) << _2
        third, last = i + 2 * _QUARTER, i + 3 * _QUARTER
        high = _sign_and_level(y[third], u[third]) | _sign_and_level(y[last], u[last]) << _2
        codes[i] = np.uint8(low | high << _4)
    sum_rows(t)
    sum_rows(u)
    for c in range(LANES):
        t[c] /= u[c]
    _round_scales(t, 0x40000, told, scale, bits)
    for c in range(LANES):
        t[c] = u[c]


@inline
def code1(
    x: Any, at: int, power: Any, y: Any, t: Any, u: Any, v: Any, told: Any, scale: Any, bits: Any, codes: Any
) -> None:
    """Signs of the turned block y: a bit for minus; s = mean |y|."""
    _turn(x, at, power, y)
    for i in range(GROUP):
        t[i] = abs(y[i])
    sum_rows(t)
    for c in range(LANES):
        t[c] *= _MEAN
    _round_scales(t, 0x40000, told, scale, bits)
    for i in range(_EIGHTH):
        byte = np.int32(y[i] < _ZERO)
        for k in range(1, 8):
            byte |= np.int32(y[i + k * _EIGHTH] < _ZERO) << np.int32(k)
        codes[i] = np.uint8(byte)
    for c in range(LANES):
        t[c] = _F(ROWS)


# ---- Back: codes and the scales s of a group's blocks to gain times what they stand for; t is room ----


@inline
def _spread_scales(scale: Any, t: Any) -> None:
    for c in range(LANES):
        t[c] = scale[c]
    _spread(t)


@inline
def value8(codes: Any, scale: Any, gain: Any, y: Any, t: Any, out: Any, at: int) -> None:
    """Gain s (code - 128)."""
    _spread_scales(scale, t)
    for i in range(GROUP):
        out[at + i] = _F(np.int32(codes[i]) - _128) * t[i] * gain


@inline
def value4(codes: Any, scale: Any, gain: Any, y: Any, t: Any, out: Any, at: int) -> None:
    """Gain s (code - 7.5), turned back."""
    _spread_scales(scale, t)
    for i in range(GROUP // 2):
        byte = np.int32(codes[i])
        y[i] = (_F(byte & _15) - _F(7.5)) * t[i]
        y[i + GROUP // 2] = (_F(byte >> _4) - _F(7.5)) * t[i]
    _turn_back(y, gain, out, at)


@inline
def value2(codes: Any, scale: Any, gain: Any, y: Any, t: Any, out: Any, at: int) -> None:
    """Gain s level, turned back."""
    _spread_scales(scale, t)
    for k in range(4):
        for i in range(_QUARTER):
            code = np.int32(codes[i]) >> np.int32(2 * k)
            level = OUTER if code & _2 else INNER
            y[i + k * _QUARTER] = (-level if code & _1 else level) * t[i]
    _turn_back(y, gain, out, at)


@inline
def value1(codes: Any, scale: Any, gain: Any, y: Any, t: Any, out: Any, at: int) -> None:
    """Gain s sign, turned back."""
    _spread_scales(scale, t)
    for k in range(8):
        for i in range(_EIGHTH):
            minus = np.int32(codes[i]) >> np.int32(k) & _1
            y[i + k * _EIGHTH] = -t[i] if minus else t[i]
    _turn_back(y, gain, out, at)
