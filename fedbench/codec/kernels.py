"""Compiled kernels that codecs share, each made ready at its first use: largest entry, sum of squares, blocks.

No size is checked here and no gain computed; float32 arithmetic is rounded operation by operation in the order written.
`power` is a power of two that brings the largest entry of a unit near 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from fedbench.base import compiled
from fedbench.codec import groups
from fedbench.codec.loops import GROUP, LANES, sum_rows


def array(kind: Any, *, writes: bool = False) -> Any:
    """Return the numba type of a contiguous vector."""
    return types.Array(kind, 1, "C", readonly=not writes)


IN, OUT = array(types.float32), array(types.float32, writes=True)
BITS, BYTES, CODES = array(types.int32), array(types.uint8), array(types.uint8, writes=True)
_TOLD, _ENERGY = array(types.int32, writes=True), array(types.float64, writes=True)


def kernel(*arguments: Any, entry: str) -> Callable[[Any], Any]:
    """Make a function one that is compiled for these types when it is first called; `entry` is its own in the cache."""

    def wrap(function: Any) -> Any:
        """Return what is called in the function's place."""
        ready = functools.cache(lambda: compiled.kernel(function, arguments, entry))
        return functools.wraps(function)(lambda *given: ready()(*given))

    return wrap


@kernel(BITS, entry="largest")
def largest_bits(x: Any) -> Any:
    """Return the largest absolute value of float32 entries, given and told as bits."""
    most = np.int32(0)
    for i in range(x.size):
        most = max(most, x[i] & np.int32(0x7FFFFFFF))
    return most


@kernel(IN, types.float32, entry="squares")
def square_sum(x: Any, power: Any) -> Any:
    """Return the sum of (power x)^2 as float64."""
    t = np.empty(GROUP, np.float32)
    total = 0.0
    whole = x.size // GROUP * GROUP
    for at in range(0, whole, GROUP):
        for i in range(GROUP):
            value = x[at + i] * power
            t[i] = value * value
        sum_rows(t)
        for c in range(LANES):
            total += t[c]
    for i in range(whole, x.size):
        total += np.float64(x[i] * power) * np.float64(x[i] * power)
    return total


# ---- Blocks: whole groups ----


def _encoder(width: int, code: Any) -> Any:
    size = GROUP * width // 8

    @kernel(IN, types.float32, _TOLD, _ENERGY, CODES, entry=f"encode{width}")
    def encode(x: Any, power: Any, told: Any, energy: Any, codes: Any) -> None:
        """Write codes, each block's scale (a float's bits >> 19) and its energy: the squares of scale times level."""
        y, t = np.empty(GROUP, np.float32), np.empty(GROUP, np.float32)
        u, v = np.empty(GROUP, np.float32), np.empty(GROUP, np.float32)
        scale, own = np.empty(LANES, np.float32), np.empty(LANES, np.int32)
        bits = scale.view(np.int32)
        for g in range(x.size // GROUP):
            code(x, g * GROUP, power, y, t, u, v, own, scale, bits, codes[g * size : (g + 1) * size])
            for c in range(LANES):
                told[g * LANES + c] = own[c]
                energy[g * LANES + c] = np.float64(scale[c]) * np.float64(scale[c]) * np.float64(t[c])

    return encode


def _decoder(width: int, value: Any) -> Any:
    size = GROUP * width // 8

    @kernel(BYTES, IN, types.float32, OUT, entry=f"decode{width}")
    def decode(codes: Any, scale: Any, gain: Any, out: Any) -> None:
        """Write gain times scale times level, turned back where blocks were turned."""
        y, t = np.empty(GROUP, np.float32), np.empty(GROUP, np.float32)
        for g in range(out.size // GROUP):
            lanes = scale[g * LANES : (g + 1) * LANES]
            value(codes[g * size : (g + 1) * size], lanes, gain, y, t, out, g * GROUP)

    return decode


#: Kernels by the width of codes in bits.
ENCODE_GROUPS = {
    8: _encoder(8, groups.code8), 4: _encoder(4, groups.code4), 2: _encoder(2, groups.code2), 1: _encoder(1, groups.code1),
}  # fmt: skip
DECODE_GROUPS = {
    8: _decoder(8, groups.value8), 4: _decoder(4, groups.value4), 2: _decoder(2, groups.value2), 1: _decoder(1, groups.value1),
}  # fmt: skip
