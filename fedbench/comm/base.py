"""What the rest of fedbench may ask of a transport: non-blocking byte messages between ranks.

A transport moves buffers and counts them; it knows neither frames nor rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

#: Waits back off from the first to the second value (seconds), so that a waiting rank leaves its core to others.
BACKOFF_S = (50e-6, 2e-3)

#: A wait is brisk for this long (seconds) before it begins to back off, and again after each arrival.
BRISK_S = 1e-3

Missing = Callable[[Sequence[int]], str]

#: What moves messages besides the one that is waited for: returns the seconds until something held back is due, 0 where
#: it has just moved something, infinity where nothing is held back.
Poll = Callable[[], float]


def nothing_held() -> float:
    """Return infinity: the poll of who holds nothing back."""
    return math.inf


class Request(Protocol):
    """A message under way."""

    def done(self) -> bool:
        """Return whether the message has completed; afterwards `received_bytes` is valid."""

    @property
    def received_bytes(self) -> int:
        """Length of the received message in bytes (0 for sends)."""
        ...


class Transport(Protocol):
    """Byte messages between `size` ranks, of which this is `rank`.

    `moved_bytes` counts each message that this rank sent or received.
    """

    rank: int
    size: int
    moved_bytes: int

    @property
    def open_requests(self) -> int:
        """Messages started and not yet done."""

    @property
    def takes_threads(self) -> bool:
        """Whether several threads may call at once."""

    def send(self, buffer: np.ndarray, peer: int, tag: int) -> Request:
        """Start sending a uint8 buffer, which belongs to the transport until the request is done."""

    def receive(self, buffer: np.ndarray, peer: int, tag: int) -> Request:
        """Start receiving into a uint8 buffer that is at least as long as the message."""

    def progress(self) -> None:
        """Let the library move what is under way, without waiting."""

    def wait(self, requests: Sequence[Request], deadline_s: float, missing: Missing, poll: Poll = nothing_held) -> None:
        """Return when all requests are done; after `deadline_s` seconds raise WireError with `missing(indices)`."""

    def agree(self, values: Sequence[int], deadline_s: float, what: str, poll: Poll = nothing_held) -> list[int]:
        """Return the element-wise maximum over all ranks of a few 64-bit integers."""

    def name_of(self, rank: int) -> str:
        """Return a rank's name for messages, host included where known."""
