"""A device's link as four numbers, and how long a message of some bytes takes on it.

Both the links that are paced in real time and the simulated clock are made from it; it holds no queue and no clock.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fedbench.base.rng import generator


class Link(NamedTuple):
    """Rates in bit/s (infinite: no bound), latency of a message and the most that is added to it, in seconds."""

    down_bit_s: float = math.inf
    up_bit_s: float = math.inf
    latency_s: float = 0.0
    jitter_s: float = 0.0

    def transfer_s(self, size_bytes: float, *, up: bool) -> float:
        """Return how long the bytes of a message occupy the link, in seconds; latency is not in it."""
        return 8.0 * size_bytes / (self.up_bit_s if up else self.down_bit_s)

    def delay_s(self, seed: int, device: int, message: int, *, up: bool) -> float:
        """Return latency and jitter of a link's `message`-th message of one way, from the key alone, in seconds."""
        if self.jitter_s == 0:
            return self.latency_s
        drawn = generator(seed, "link jitter", device, int(up), message).random()
        return self.latency_s + self.jitter_s * float(drawn)
