"""What a codec is: float32 entries to bytes whose number is known beforehand, and back, with the same length as a vector.

A codec knows entries alone: no names, no frames, no other units. What a payload says is checked before it is used.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from fedbench.base.errors import NumericsError, WireError
from fedbench.codec import kernels

#: Most entries of a tile: 1 MiB of float32, so at most 1 MiB in any codec.
TILE_ENTRIES = 256 * 1024

#: Bytes of the gain, a float32, that every lossy payload begins with.
GAIN_BYTES = 4

_NO_NUMBER = 0x7F800000  # bits of infinity
_GREATEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Codec(ABC):
    """One way to code a unit.

    `id` stands in frames. `bits` is the payload for each entry of a large unit, `cosine` the one between many normal
    entries and what they are decoded to.
    """

    id: int
    name: str
    bits: float
    cosine: float

    @abstractmethod
    def coded_bytes(self, entries: int) -> int:
        """Return the exact size of the payload of so many entries."""

    @abstractmethod
    def encode(self, values: np.ndarray, out: np.ndarray) -> None:
        """Write the payload of float32 [n] to uint8 [coded_bytes(n)]; NumericsError where an entry is no finite number."""

    @abstractmethod
    def decode(self, payload: np.ndarray, out: np.ndarray) -> None:
        """Write float32 [n] from uint8 [coded_bytes(n)]; WireError where that can't be a payload."""

    def _check(self, entries: int, payload: int) -> None:
        """Refuse sizes that disagree: kernels would read or write beyond an end."""
        if payload != self.coded_bytes(entries):
            raise WireError(
                f"{self.name}: a payload of {payload} bytes for {entries} entries, expected {self.coded_bytes(entries)}."
            )


class Raw(Codec):
    """Float32 as it is, little-endian."""

    def coded_bytes(self, entries: int) -> int:
        """4 bytes an entry."""
        return 4 * entries

    def encode(self, values: np.ndarray, out: np.ndarray) -> None:
        """Copy; any bits are allowed."""
        self._check(values.size, out.size)
        out[:] = values.view(np.uint8)

    def decode(self, payload: np.ndarray, out: np.ndarray) -> None:
        """Copy."""
        self._check(out.size, payload.size)
        out.view(np.uint8)[:] = payload


def power_of(values: np.ndarray) -> np.float32:
    """Return a power of two that brings the largest entry to [1, 2), or as near as float32 can where that is tiny.

    1 where all entries are 0; NumericsError where one is infinite or no number.
    """
    bits = int(kernels.largest_bits(values.view(np.int32)))
    if bits >= _NO_NUMBER:
        raise NumericsError(f"Found infinity or NaN among {values.size:,} values; lossy codecs take finite ones alone.")
    return np.float32(math.ldexp(1.0, min(127, 127 - (bits >> 23)))) if bits else np.float32(1)


def gain_of(values: np.ndarray, power: np.float32, energy: float, decoded_peak: float) -> np.float32:
    """Return what makes the decoded entries, whose squares sum to `energy` without it, as long as the values.

    Within a few per cent of the greatest float32 it is smaller: `decoded_peak` times it must not be infinite.
    """
    if energy == 0.0:
        return np.float32(0)
    length = math.sqrt(float(kernels.square_sum(values, power)) / energy) / float(power)
    return np.float32(min(length, _GREATEST * (1 - 2.0**-20) / max(decoded_peak, 1.0)))


def write_gain(gain: np.float32, payload: np.ndarray) -> None:
    """Write the gain into the first bytes."""
    payload[:GAIN_BYTES] = np.array([gain], "<f4").view(np.uint8)


def read_gain(payload: np.ndarray, name: str) -> np.float32:
    """Return the gain; WireError where it is none."""
    gain = np.float32(payload[:GAIN_BYTES].copy().view("<f4")[0])
    if not 0 <= gain < np.inf:
        raise WireError(f"{name}: a gain of {gain}, expected a finite number from 0.")
    return gain
