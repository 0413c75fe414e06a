"""The codes of one group and what they stand for, in 8, 4, 2 and 1 bits an entry.

Arrays y, t, u, v hold a group (`loops.py`), `told` and `scale` a value for each lane. A function to codes leaves the
rounded scales, and in the first row of t the sum of its levels' squares. Nothing is checked here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedbench.codec.loops import (
    GROUP,
    LANES,
    MEAN,
    ROWS,
    inline,
    inverse,
    largest,
    round_scales,
    spread,
    sum_rows,
    turn,
    turn_back,
)

#: Levels of two bits, and the limit between them over the root mean square: Lloyd's and Max's for a normal variable.
INNER, OUTER, LIMIT = np.float32(0.4528), np.float32(1.510), np.float32(0.9816)

_QUARTER, _EIGHTH = GROUP // 4, GROUP // 8
_F = np.float32
_ZERO, _HALF, _ONE, _EIGHT = _F(0), _F(0.5), _F(1), _F(8)
_1, _2, _4, _8, _15, _128 = (np.int32(n) for n in (1, 2, 4, 8, 15, 128))


@inline
def code8(
    x: Any, at: int, power: Any, y: Any, t: Any, u: Any, v: Any, told: Any, scale: Any, bits: Any, codes: Any
) -> None:
    """q = 127 x / s rounded, with s = max |x|: codes q + 128."""
    for i in range(GROUP):
        y[i] = x[at + i] * power
    largest(y, t)
    round_scales(t, 0x7FFFF, told, scale, bits)
    inverse(_F(127), scale, u)
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
    turn(x, at, power, y)
    largest(y, t)
    round_scales(t, 0x7FFFF, told, scale, bits)
    inverse(_EIGHT, scale, u)
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
    turn(x, at, power, y)
    for i in range(GROUP):
        t[i] = y[i] * y[i]
    sum_rows(t)
    for c in range(LANES):
        v[c] = LIMIT * np.sqrt(t[c] * MEAN)
    spread(v)
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
    round_scales(t, 0x40000, told, scale, bits)
    for c in range(LANES):
        t[c] = u[c]


@inline
def code1(
    x: Any, at: int, power: Any, y: Any, t: Any, u: Any, v: Any, told: Any, scale: Any, bits: Any, codes: Any
) -> None:
    """Signs of the turned block y: a bit for minus; s = mean |y|."""
    turn(x, at, power, y)
    for i in range(GROUP):
        t[i] = abs(y[i])
    sum_rows(t)
    for c in range(LANES):
        t[c] *= MEAN
    round_scales(t, 0x40000, told, scale, bits)
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
    spread(t)


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
    turn_back(y, gain, out, at)


@inline
def value2(codes: Any, scale: Any, gain: Any, y: Any, t: Any, out: Any, at: int) -> None:
    """Gain s level, turned back."""
    _spread_scales(scale, t)
    for k in range(4):
        for i in range(_QUARTER):
            code = np.int32(codes[i]) >> np.int32(2 * k)
            level = OUTER if code & _2 else INNER
            y[i + k * _QUARTER] = (-level if code & _1 else level) * t[i]
    turn_back(y, gain, out, at)


@inline
def value1(codes: Any, scale: Any, gain: Any, y: Any, t: Any, out: Any, at: int) -> None:
    """Gain s sign, turned back."""
    _spread_scales(scale, t)
    for k in range(8):
        for i in range(_EIGHTH):
            minus = np.int32(codes[i]) >> np.int32(k) & _1
            y[i + k * _EIGHTH] = -t[i] if minus else t[i]
    turn_back(y, gain, out, at)
