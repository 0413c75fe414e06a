"""int8, int4, int2 and sign: blocks of 64 entries with a scale of 8 bits each, and codes of 8, 4, 2 or 1 bits.

Payload: gain (float32), a byte for the scale of each block, codes. A group is 16 blocks of 64, interleaved entry by entry;
what is left over at the end is one group of fewer blocks, filled up with zeros. A scale is a number of 4 binary places
that may lie up to 15 binades below the largest one of its unit; a block still smaller is coded as zeros.

int4, int2 and sign turn each block before it is coded: fixed signs, then Hadamard's matrix. That makes its entries
look normal whatever they were, so heavy tails, outliers and flat blocks come back as well as normal ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedbench.codec import kernels
from fedbench.codec.coding import GAIN_BYTES, Codec, gain_of, power_of, read_gain, write_gain
from fedbench.codec.loops import GROUP, LANES, ROWS

_TOP = 240  # scale codes 240 .. 255 are the binade [1, 2)
_ONE = np.float32(1)
#: What scales are multiplied with, so that decoded entries are near 1 without the gain: levels, and Hadamard's growth.
_UNIT = {8: 2.0**-7, 4: 2.0**-9, 2: 2.0**-6, 1: 2.0**-6}
_LARGE = 2.0**-120  # a power below it: the largest entries are so large that the decoded ones might be infinite


@dataclass(frozen=True)
class Blocks(Codec):
    """A codec of `width` bits an entry besides its block's scale."""

    width: int

    def coded_bytes(self, entries: int) -> int:
        """Return 4 + b (1 + 8 width) for b = ceil(entries / 64) blocks."""
        return GAIN_BYTES + -(-entries // ROWS) * (1 + ROWS * self.width // 8)

    def encode(self, values: np.ndarray, out: np.ndarray) -> None:
        """Write the payload; NumericsError where an entry is no finite number."""
        self._check(values.size, out.size)
        power = power_of(values)
        n, blocks = values.size, -(-values.size // ROWS)
        told, energy = np.zeros(blocks, np.int32), np.zeros(blocks, np.float64)
        whole = n // GROUP * GROUP
        scales, codes = self._parts(out, blocks)
        split = whole * self.width // 8
        kernels.ENCODE_GROUPS[self.width](values[:whole], power, told, energy, codes[:split])
        if whole < n:
            left = blocks - whole // ROWS
            told[-left:], codes[split:] = self._encode_end(values[whole:], left, power)
        binade = (told.max(initial=0) >> 4) << 4
        scales[:] = np.where(told > 0, np.maximum(told - binade + _TOP, 0), 0)
        growth = 1 if self.width == 8 else ROWS
        energy *= (scales > 0) * growth * (_UNIT[self.width] * 2.0 ** (127 - binade / 16)) ** 2
        total = float(energy.sum())
        if whole < n:
            end = np.empty(n - whole, np.float32)
            self._decode_end(scales[-left:], codes[split:], _ONE, end)
            total += float(np.square(end, dtype=np.float64).sum())
        write_gain(gain_of(values, power, total, 1.0), out)
        if power < _LARGE:
            self._stay_finite(values, power, total, out)

    def decode(self, payload: np.ndarray, out: np.ndarray) -> None:
        """Write the entries; any bytes behind a sound gain are a payload."""
        self._check(out.size, payload.size)
        gain = read_gain(payload, self.name)
        self._decode(payload, gain, out)

    def _decode(self, payload: np.ndarray, gain: np.float32, out: np.ndarray) -> None:
        n = out.size
        scales, codes = self._parts(payload, -(-n // ROWS))
        whole = n // GROUP * GROUP
        split = whole * self.width // 8
        kernels.DECODE_GROUPS[self.width](codes[:split], self._scale(scales[: whole // ROWS]), gain, out[:whole])
        if whole < n:
            self._decode_end(scales[whole // ROWS :], codes[split:], gain, out[whole:])

    def _stay_finite(self, values: np.ndarray, power: np.float32, energy: float, out: np.ndarray) -> None:
        """Write a smaller gain where an entry would be decoded to infinity."""
        plain = np.empty(values.size, np.float32)
        self._decode(out, _ONE, plain)
        write_gain(gain_of(values, power, energy, float(np.abs(plain).max(initial=0))), out)

    def _parts(self, payload: np.ndarray, blocks: int) -> tuple[np.ndarray, np.ndarray]:
        return payload[GAIN_BYTES : GAIN_BYTES + blocks], payload[GAIN_BYTES + blocks :]

    def _encode_end(self, values: np.ndarray, blocks: int, power: np.float32) -> tuple[np.ndarray, np.ndarray]:
        """Return scales and codes of fewer than 1,024 entries: the lanes that a whole group would have beyond them go."""
        group = np.zeros((ROWS, LANES), np.float32)
        filled = np.zeros(ROWS * blocks, np.float32)
        filled[: values.size] = values
        group[:, :blocks] = filled.reshape(ROWS, blocks)
        told, energy = np.empty(LANES, np.int32), np.empty(LANES, np.float64)
        codes = np.empty(GROUP * self.width // 8, np.uint8)
        kernels.ENCODE_GROUPS[self.width](group.reshape(-1), power, told, energy, codes)
        return told[:blocks], codes.reshape(-1, LANES)[:, :blocks].reshape(-1)

    def _decode_end(self, scales: np.ndarray, codes: np.ndarray, gain: np.float32, out: np.ndarray) -> None:
        blocks = scales.size
        lanes = np.zeros(LANES, np.uint8)
        lanes[:blocks] = scales
        rows = np.zeros((GROUP * self.width // 8 // LANES, LANES), np.uint8)
        rows[:, :blocks] = codes.reshape(-1, blocks)
        group = np.empty(GROUP, np.float32)
        kernels.DECODE_GROUPS[self.width](rows.reshape(-1), self._scale(lanes), gain, group)
        out[:] = group.reshape(ROWS, LANES)[:, :blocks].reshape(-1)[: out.size]

    def _scale(self, codes: np.ndarray) -> np.ndarray:
        """Return scales as float32: 0, or 4 binary places below 2, times the unit."""
        bits = (codes.astype(np.int32) + ((127 << 4) - _TOP)) << 19
        return np.where(codes > 0, bits.view(np.float32) * np.float32(_UNIT[self.width]), np.float32(0))
