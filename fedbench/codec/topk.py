"""topk: the largest sixteenth of a unit's entries, each as a place and a byte; all others are decoded to 0.

Payload: gain (float32); how many entries each 256 kept (uint16); places within the 256, ascending; a byte each: sign, and
a number of 3 binary places that may lie up to 15 binades below the largest. Of equals at the limit the first are kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from fedbench.base.errors import WireError
from fedbench.codec.coding import GAIN_BYTES, Codec, gain_of, power_of, read_gain, write_gain
from fedbench.codec.kernels import BITS, BYTES, CODES, OUT, array, kernel

#: One entry in so many is kept.
KEEP = 16
#: Entries that share a count; a place among them is a byte.
RUN = 256

_TOP, _PLACES = 120, 20  # values 120 .. 127 are the binade [1, 2); bits of a float32 below 3 binary places
_COUNTS = array(types.uint16, writes=True)


class TopK(Codec):
    """The largest entries by size, to within 1/16 of each; what is kept stands for the whole unit's length."""

    def coded_bytes(self, entries: int) -> int:
        """Return 4 + 2 ceil(n / 256) + 2 ceil(n / 16) for n entries."""
        return GAIN_BYTES + 2 * -(-entries // RUN) + 2 * -(-entries // KEEP)

    def encode(self, values: np.ndarray, out: np.ndarray) -> None:
        """Write the payload; NumericsError where an entry is no finite number."""
        self._check(values.size, out.size)
        power = power_of(values)
        kept = -(-values.size // KEEP)
        counts, places, codes = self._parts(out, values.size)
        found, bits = np.zeros(counts.size // 2, np.uint16), values.view(np.int32)
        limit, equals = _limit(bits, kept) if kept else (0, 0)
        where = np.empty(kept, np.int64)
        _choose(bits, limit, equals, found, places, where)
        counts[:] = found.astype("<u2").view(np.uint8)
        largest = values[where] * power
        told = (np.abs(largest).view(np.int32) + (1 << (_PLACES - 1))) >> _PLACES
        binade = int(told.max(initial=0)) >> 3
        value = np.where(told > 0, np.maximum(told - 8 * binade + _TOP, 0), 0)
        codes[:] = value | np.where(largest < 0, 128, 0)
        decoded = _values(codes)
        energy = float(np.square(decoded, dtype=np.float64).sum())
        write_gain(gain_of(values, power, energy, float(np.abs(decoded).max(initial=0))), out)

    def decode(self, payload: np.ndarray, out: np.ndarray) -> None:
        """Write the entries; WireError where counts or places can't be those of so many entries."""
        self._check(out.size, payload.size)
        gain = read_gain(payload, self.name)
        counts, places, codes = self._parts(payload, out.size)
        found = counts.copy().view("<u2").astype(np.uint16)
        if int(found.sum()) != places.size or int(found.max(initial=0)) > RUN:
            raise WireError(f"{self.name}: counts of {int(found.sum())} entries, expected {places.size}.")
        if not _place(found, places, _values(codes) * gain, out):
            raise WireError(f"{self.name}: places that don't ascend, or lie beyond {out.size} entries.")

    def _parts(self, payload: np.ndarray, entries: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        kept = -(-entries // KEEP)
        end = payload.size
        return payload[GAIN_BYTES : end - 2 * kept], payload[end - 2 * kept : end - kept], payload[end - kept :]


def _values(codes: np.ndarray) -> np.ndarray:
    """Return what bytes stand for without the gain: 0, or a sign and 3 binary places below 2."""
    size = codes.astype(np.int32) & 127
    bits = (size + ((127 << 3) - _TOP)) << _PLACES
    values = np.where(size > 0, bits.view(np.float32), np.float32(0))
    return np.where(codes > 127, -values, values)


@kernel(BITS, types.int64, entry="limit")
def _limit(x: Any, kept: int) -> Any:
    """Return the size (as bits) of the entry that is number `kept` by size, and how many of just that size are kept."""
    prefix, left = 0, kept
    counts: Any = np.empty(2048, np.int64)
    for shift, width in ((20, 11), (10, 10), (0, 10)):
        counts[:] = 0
        for i in range(x.size):
            size = np.int64(x[i] & np.int32(0x7FFFFFFF))
            if size >> (shift + width) == prefix:
                counts[size >> shift & ((1 << width) - 1)] += 1
        digit = (1 << width) - 1
        while counts[digit] < left:
            left -= counts[digit]
            digit -= 1
        prefix = prefix << width | digit
    return prefix, left


@kernel(BITS, types.int64, types.int64, _COUNTS, CODES, array(types.int64, writes=True), entry="choose")
def _choose(x: Any, limit: int, equals: int, counts: Any, places: Any, where: Any) -> None:
    """Write counts, places in their run and indices of the entries above the limit, and of the first equal to it."""
    kept = 0
    for i in range(x.size):
        size = np.int64(x[i] & np.int32(0x7FFFFFFF))
        if size < limit or kept == where.size:
            continue
        if size == limit:
            if equals == 0:
                continue
            equals -= 1
        counts[i // 256] += np.uint16(1)
        places[kept] = np.uint8(i % 256)
        where[kept] = i
        kept += 1


@kernel(array(types.uint16), BYTES, array(types.float32), OUT, entry="place")
def _place(counts: Any, places: Any, values: Any, out: Any) -> Any:
    """Write values to their places and 0 elsewhere; return whether places ascend and lie within."""
    out[:] = 0
    kept = 0
    for run in range(counts.size):
        before = np.int64(-1)
        for _ in range(counts[run]):
            at = np.int64(places[kept])
            if at <= before or run * 256 + at >= out.size:
                return False
            out[run * 256 + at] = values[kept]
            before = at
            kept += 1
    return True
