"""fp16: IEEE half floats of a unit whose largest entry was brought to [1, 2), so that none is infinite.

Payload: gain (float32), the lower bytes of all entries, the upper ones (which LZ4 can shrink).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from fedbench.codec.coding import GAIN_BYTES, Codec, gain_of, power_of, read_gain, write_gain
from fedbench.codec.kernels import BYTES, CODES, IN, OUT, kernel
from fedbench.codec.loops import GROUP, LANES, inline, sum_rows

_1, _7, _8, _13, _ODD, _LOW = (np.int32(n) for n in (1, 7, 8, 13, 0xFFF - (112 << 23), 255))
_HALF_BITS = np.int32(0x3F000000)
_ZERO, _HALF, _SMALL, _TO_NORMAL = np.float32(0), np.float32(0.5), np.float32(2.0**-14), np.float32(2.0**112)


class Half(Codec):
    """Half floats: an entry is off by at most 2^-11 of itself, or 2^-25 of twice the largest one."""

    def coded_bytes(self, entries: int) -> int:
        """Return 4 + 2 entries."""
        return GAIN_BYTES + 2 * entries

    def encode(self, values: np.ndarray, out: np.ndarray) -> None:
        """Write the payload; NumericsError where an entry is no finite number."""
        self._check(values.size, out.size)
        power = power_of(values)
        energy = float(_encode(values, power, out[GAIN_BYTES:]))
        write_gain(gain_of(values, power, energy, 2.0), out)

    def decode(self, payload: np.ndarray, out: np.ndarray) -> None:
        """Write the entries; any bytes behind a sound gain are a payload."""
        self._check(out.size, payload.size)
        _decode(payload[GAIN_BYTES:], read_gain(payload, self.name), out)


@inline
def _halves(size: Any, bits: Any, shifted: Any, shifted_bits: Any, half: Any) -> None:
    """Write the half floats (int32) of entries from 0 to below 2, rounded to the nearest, ties to even.

    Below 2^-14 a half float counts 2^-24ths, which is the last place of float32 numbers from 1/2 to 1.
    """
    for i in range(GROUP):
        shifted[i] = size[i] + _HALF
    for i in range(GROUP):
        normal = (bits[i] + _ODD + (bits[i] >> _13 & _1)) >> _13
        half[i] = shifted_bits[i] - _HALF_BITS if size[i] < _SMALL else normal


@kernel(IN, types.float32, CODES, entry="to_halves")
def _encode(x: Any, power: Any, codes: Any) -> Any:
    """Write the half floats of power x; return the sum of their squares (float64)."""
    n, total = x.size, 0.0
    size, shifted, half = np.empty(GROUP, np.float32), np.empty(GROUP, np.float32), np.empty(GROUP, np.int32)
    bits, shifted_bits = size.view(np.int32), shifted.view(np.int32)
    for at in range(0, n, GROUP):
        count = min(GROUP, n - at)
        own, lower, upper = x[at : at + count], codes[at : at + count], codes[n + at : n + at + count]
        size[:] = _ZERO
        for i in range(count):
            size[i] = abs(own[i] * power)
        _halves(size, bits, shifted, shifted_bits, half)
        for i in range(count):
            lower[i] = np.uint8(half[i] & _LOW)
        for i in range(count):
            upper[i] = np.uint8(half[i] >> _8 | np.int32(own[i] < _ZERO) << _7)
        for i in range(GROUP):
            bits[i] = half[i] << _13
        for i in range(GROUP):
            size[i] = size[i] * _TO_NORMAL * (size[i] * _TO_NORMAL)
        sum_rows(size)
        for c in range(LANES):
            total += size[c]
    return total


@kernel(BYTES, types.float32, OUT, entry="from_halves")
def _decode(codes: Any, gain: Any, out: Any) -> None:
    """Write gain times the half floats."""
    n = out.size
    bits = out.view(np.int32)
    for i in range(n):
        upper = np.int32(codes[n + i])
        bits[i] = (upper & 0x7F) << 21 | np.int32(codes[i]) << 13 | (upper & 0x80) << 24
    for i in range(n):
        out[i] = out[i] * _TO_NORMAL * gain
