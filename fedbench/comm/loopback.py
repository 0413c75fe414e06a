"""The transport of a run in one process: messages to oneself, by a copy.

It keeps the rules of the real one (buffers, tags, lengths), so that one rank and many
run the same code.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence

import numpy as np

from fedbench.base.errors import WireError
from fedbench.comm.base import BACKOFF_S, Missing, Poll, Request, nothing_held


class _Pending:
    def __init__(self, buffer: np.ndarray) -> None:
        self.buffer = buffer
        self.complete = False
        self.received_bytes = 0

    def done(self) -> bool:
        return self.complete


class Loopback:
    """World of one rank; a send is matched with the receive of the same tag, in order."""

    rank = 0
    size = 1
    takes_threads = True

    def __init__(self) -> None:
        self.moved_bytes = 0
        self._lock = threading.Lock()
        self._sends: dict[int, deque[_Pending]] = {}
        self._receives: dict[int, deque[_Pending]] = {}

    @property
    def open_requests(self) -> int:
        """Messages that were started and have not met their other half."""
        return sum(map(len, self._sends.values())) + sum(map(len, self._receives.values()))

    def send(self, buffer: np.ndarray, peer: int, tag: int) -> _Pending:
        """Hand a uint8 buffer to the receive of the same tag."""
        self._check(peer)
        return self._meet(_Pending(buffer), self._sends, self._receives, tag, sending=True)

    def receive(self, buffer: np.ndarray, peer: int, tag: int) -> _Pending:
        """Take a message of the same tag into a uint8 buffer."""
        self._check(peer)
        return self._meet(_Pending(buffer), self._receives, self._sends, tag, sending=False)

    def progress(self) -> None:
        """Do nothing: a copy is over when it has begun."""

    def wait(self, requests: Sequence[Request], deadline_s: float, missing: Missing, poll: Poll = nothing_held) -> None:
        """Raise WireError at once where a message can never come: nobody else would send it, and nothing is held back."""
        end = time.monotonic() + deadline_s
        while True:
            due_s = poll()
            left = [index for index, request in enumerate(requests) if not request.done()]
            if not left:
                return
            if due_s == math.inf or time.monotonic() > end:
                raise WireError(missing(left))
            time.sleep(min(due_s, BACKOFF_S[1]))

    def agree(self, values: Sequence[int], deadline_s: float, what: str, poll: Poll = nothing_held) -> list[int]:
        """Return the values: one rank agrees with itself."""
        return list(values)

    def name_of(self, rank: int) -> str:
        """Return a name for messages."""
        return f"rank {rank}"

    def _check(self, peer: int) -> None:
        if peer != 0:
            raise WireError(f"Loopback has rank 0 alone; asked for rank {peer}.")

    def _meet(
        self,
        mine: _Pending,
        queue: dict[int, deque[_Pending]],
        others: dict[int, deque[_Pending]],
        tag: int,
        *,
        sending: bool,
    ) -> _Pending:
        with self._lock:
            waiting = others.get(tag)
            if not waiting:
                queue.setdefault(tag, deque()).append(mine)
                return mine
            other = waiting.popleft()
            source, target = (mine, other) if sending else (other, mine)
            sent, room = source.buffer.size, target.buffer.size
            if sent > room:
                raise WireError(f"Message of {sent} bytes for a buffer of {room} (tag {tag}).")
            target.buffer[:sent] = source.buffer
            target.received_bytes = sent
            self.moved_bytes += sent
            mine.complete = other.complete = True
            return mine
