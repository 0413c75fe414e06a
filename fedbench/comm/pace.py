"""Links in real time: when the emulated transfer of a message is over, and the messages that are held back until then.

A link belongs to a device and carries one message after the other each way. Nothing here sends by itself: whoever
polls starts what is due.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Sequence

from fedbench.base.link import Link
from fedbench.comm.base import Request


class Pacer:
    """The links of all devices; `link_of` tells a device's, `seed` draws its jitter."""

    def __init__(self, link_of: Callable[[int], Link], seed: int, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self._link_of = link_of
        self._seed = seed
        self._free: dict[tuple[int, bool], float] = {}
        self._last: dict[tuple[int, bool], float] = {}
        self._count: dict[tuple[int, bool], int] = {}

    def due(self, size_bytes: int, devices: Sequence[int], *, up: bool) -> float:
        """Return when the last of the devices has a message that is handed over now.

        Each device's copy takes its own link, all at once. On one link bytes follow each other, and a message never
        overtakes the one before.
        """
        now = over = self.now()
        for device in devices:
            way, link = (device, up), self._link_of(device)
            count = self._count[way] = self._count.get(way, -1) + 1
            free = self._free[way] = max(now, self._free.get(way, now)) + link.transfer_s(size_bytes, up=up)
            arrival = max(free + link.delay_s(self._seed, device, count, up=up), self._last.get(way, now))
            self._last[way] = arrival
            over = max(over, arrival)
        return over


class Held:
    """A message that starts when it is due."""

    received_bytes = 0

    def __init__(self, start: Callable[[], Request]) -> None:
        self._start = start
        self._started: Request | None = None

    def start(self) -> None:
        """Start it."""
        self._started = self._start()

    def done(self) -> bool:
        """Return whether it was started and has completed."""
        return self._started is not None and self._started.done()


class Outbox:
    """Messages that are held back, by the time at which they are due."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._heap: list[tuple[float, int, Held]] = []
        self._count = 0
        self._latest: dict[tuple[int, int], float] = {}

    def hold(self, due: float, peer: int, tag: int, start: Callable[[], Request]) -> Held:
        """Return a message that starts when it is due, and not before an earlier one to this peer with this tag."""
        due = self._latest[peer, tag] = max(due, self._latest.get((peer, tag), due))
        held = Held(start)
        heapq.heappush(self._heap, (due, self._count, held))
        self._count += 1
        return held

    def release(self) -> float:
        """Start what is due; return the seconds until the next one is (0: something was started, infinite: none is)."""
        now, started = self._now(), False
        while self._heap and self._heap[0][0] <= now:
            heapq.heappop(self._heap)[2].start()
            started = True
        if started:
            return 0.0
        return self._heap[0][0] - now if self._heap else math.inf
