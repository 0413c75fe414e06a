"""Which codec each unit of a guide travels in, so that its transfer hides behind what the device computes meanwhile.

A unit must have arrived when the device comes to read it; within that, bits go where they lose the least length
(methods.md 2.15, DTC). Nothing here measures: rates and times are given, and equal ones give equal codecs.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedbench.base.arrays import Unit
from fedbench.codec import frame
from fedbench.codec.codecs import CODECS
from fedbench.codec.coding import Codec

#: What is chosen from, in ascending bits; each step up buys less than the one before. `topk` costs as much as `sign`
#: and keeps less.
LADDER: tuple[Codec, ...] = tuple(CODECS[name] for name in ("sign", "int2", "int4", "int8", "fp16", "raw"))

#: Share of the compute that the pipeline may take longer: its first units arrive when there is nothing to compute yet.
SLACK = 0.015

#: Share of the link's rate that is reckoned with; the rest is for what delays a unit, so that none is late for it.
USED = 0.92

#: What is left of a squared length of 1 by the rounding of fp16, whose cosine is 1 in every printed digit.
_HALF = 2.0**-24


class Schedule(NamedTuple):
    """A device's pass over the units: seconds of compute before it reads each (float64 [n], ascending), and in all."""

    reads_s: np.ndarray
    total_s: float


def lost(codec: Codec) -> float:
    """Return the share of a unit's squared length that its decoded direction misses: 1 - cos^2."""
    return 0.0 if codec.id == 0 else max(1.0 - codec.cosine**2, _HALF)


def allocate(units: Sequence[Unit], squares: np.ndarray, schedule: Schedule, bit_s: float) -> list[Codec]:
    """Return the codec that each unit travels in, given squared lengths (float64 [n]) and the link's rate in bit/s.

    A unit costs its whole frame, header included. Every unit begins at the least codec. Then the step up that saves
    the most of the guide's squared length for each bit is taken, over and over, while all units still arrive in time
    at `USED` of the rate; that is reverse water-filling on the units' variances, b = mean + log2(var / geometric mean)
    / 2, cut to the codecs there are. Where even the least codecs come late, the others may delay no unit further.
    """
    count = len(units)
    bits = np.array([[8.0 * frame.bound(unit, codec) for codec in LADDER] for unit in units])
    room = USED * bit_s * (schedule.reads_s + SLACK * schedule.total_s) - np.cumsum(bits[:, 0])
    if count:
        room -= min(0.0, room.min())  # a delay that the least codecs have as well is there for all
    level = np.zeros(count, np.int64)
    worth = [_worth(bits[k], float(squares[k]), 0, k) for k in range(count)]
    heapq.heapify(worth)
    while worth:
        gain, step, k = heapq.heappop(worth)
        if gain == 0.0:
            continue
        more = bits[k, step] - bits[k, level[k]]
        if room[k:].min() < more:
            continue
        room[k:] -= more
        level[k] = step
        heapq.heappush(worth, _worth(bits[k], float(squares[k]), step, k))
    return [frame.codec_of(unit, LADDER[step]) for unit, step in zip(units, level, strict=True)]


def _worth(bits: np.ndarray, square: float, level: int, unit: int) -> tuple[float, int, int]:
    """Return the best step up from a level as (minus the squared length saved per bit, step, unit); 0 where none is.

    Small units have sizes that don't ascend with the ladder, so that a step may pass some of it.
    """
    best = (0.0, level, unit)
    for step in range(level + 1, len(LADDER)):
        saved, more = square * (lost(LADDER[level]) - lost(LADDER[step])), bits[step] - bits[level]
        if saved > 0:
            best = min(best, (-saved / more if more > 0 else -np.inf, step, unit))
    return best
