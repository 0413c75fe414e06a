"""What the rest of fedbench may ask of a transport: non-blocking byte messages between ranks.

A transport moves buffers and counts them; it knows neither frames nor rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

#: Waits back off from the first to the second value (seconds), so that a waiting rank leaves its core to others.
BACKOFF_S = (50e-6, 2e-3)

Missing = Callable[[Sequence[int]], str]


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

    def send(self, buffer: np.ndarray, peer: int, tag: int) -> Request:
        """Start sending a uint8 buffer, which belongs to the transport until the request is done."""

    def receive(self, buffer: np.ndarray, peer: int, tag: int) -> Request:
        """Start receiving into a uint8 buffer that is at least as long as the message."""

    def wait(self, requests: Sequence[Request], deadline_s: float, missing: Missing) -> None:
        """Return when all requests are done; after `deadline_s` seconds raise WireError with `missing(indices)`."""

    def agree(self, values: Sequence[int], deadline_s: float, what: str) -> list[int]:
        """Return the element-wise maximum over all ranks of a few 64-bit integers."""

    def name_of(self, rank: int) -> str:
        """Return a rank's name for messages, host included where known."""
