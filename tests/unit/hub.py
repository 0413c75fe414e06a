"""A world of several ranks in one thread, for tests of topologies: whoever is asked to wait has waited enough."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np

from fedbench.base.errors import WireError
from fedbench.comm.base import Missing, Poll, Request, nothing_held


class Message:
    """A send or receive of the hub below."""

    def __init__(self, buffer: np.ndarray) -> None:
        self.buffer = buffer
        self.complete = False
        self.received_bytes = 0

    def done(self) -> bool:
        return self.complete


class Hub:
    """Mailboxes of a world of several ranks, all played by one thread; a sent buffer is read when it is received."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.moved = [0] * size
        self.boxes: dict[tuple[int, int, int, str], deque[Message]] = {}

    def meet(self, source: int, target: int, tag: int, mine: Message, *, sending: bool) -> Message:
        ways = ("send", "receive") if sending else ("receive", "send")
        waiting = self.boxes.get((source, target, tag, ways[1]))
        if not waiting:
            self.boxes.setdefault((source, target, tag, ways[0]), deque()).append(mine)
            return mine
        other = waiting.popleft()
        giver, taker = (mine, other) if sending else (other, mine)
        assert giver.buffer.size <= taker.buffer.size
        taker.buffer[: giver.buffer.size] = giver.buffer
        taker.received_bytes = giver.buffer.size
        mine.complete = other.complete = True
        for rank in (source, target):
            self.moved[rank] += giver.buffer.size
        return mine


class Rank:
    """The transport of one rank of a hub; waiting never helps, since all ranks are one thread."""

    def __init__(self, hub: Hub, rank: int) -> None:
        self.hub, self.rank, self.size = hub, rank, hub.size
        self.open_requests = 0
        self.takes_threads = True

    @property
    def moved_bytes(self) -> int:
        return self.hub.moved[self.rank]

    def send(self, buffer: np.ndarray, peer: int, tag: int) -> Message:
        return self.hub.meet(self.rank, peer, tag, Message(buffer), sending=True)

    def receive(self, buffer: np.ndarray, peer: int, tag: int) -> Message:
        return self.hub.meet(peer, self.rank, tag, Message(buffer), sending=False)

    def progress(self) -> None:
        """Do nothing: what meets is done."""

    def wait(self, requests: Sequence[Request], deadline_s: float, missing: Missing, poll: Poll = nothing_held) -> None:
        while 0 <= poll() < math.inf:
            continue
        left = [index for index, request in enumerate(requests) if not request.done()]
        if left:
            raise WireError(missing(left))

    def agree(self, values: Sequence[int], deadline_s: float, what: str, poll: Poll = nothing_held) -> list[int]:
        return list(values)

    def name_of(self, rank: int) -> str:
        return f"rank {rank} on host{rank}"
