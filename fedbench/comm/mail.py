"""The messages of one rank: buffers by slot, what is under way, waits with a deadline, progress while others compute.

A topology says who gets what and with which tag; this module packs nothing and decodes nothing.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from fedbench.base.clock import Clock
from fedbench.base.errors import ConfigError, WireError
from fedbench.comm.base import BACKOFF_S, Missing, Request, Transport
from fedbench.comm.pace import Outbox, Pacer

#: Watched messages of one kind that a poll looks at: they come in order, so that the next few are enough.
WINDOW = 8

Slot = tuple[object, ...]


class Progress(NamedTuple):
    """What moves messages while a rank computes: nothing, calls from its loop, or a thread, `interval_s` apart."""

    policy: Literal["none", "poll", "thread"] = "none"
    interval_s: float = 1e-3


#: Messages move where a rank waits for some, and nowhere else.
AT_WAITS = Progress()


def refuse_missing_threads(transport: Transport, policy: str) -> None:
    """Raise ConfigError where a policy needs a thread and the transport can't be called from two."""
    if policy == "thread" and not transport.takes_threads:
        raise ConfigError(
            "comm.progress: found 'thread', but the MPI library does not grant THREAD_MULTIPLE; allowed with it: "
            "'none', 'poll'."
        )


class Mail:
    """Sends and receives of one rank; with a pacer, what goes over a device's link is held back until it is due."""

    def __init__(
        self, transport: Transport, clock: Clock, deadline_s: float, pacer: Pacer | None, progress: Progress
    ) -> None:
        refuse_missing_threads(transport, progress.policy)
        self.transport = transport
        self.clock = clock
        self.deadline_s = deadline_s
        self.paced = pacer is not None
        self._pacer = pacer
        self._outbox = Outbox() if pacer is None else Outbox(pacer.now)
        self._progress = progress
        self.lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._over = threading.Event()
        self._next_drive = 0.0
        self._buffers: dict[Slot, np.ndarray] = {}
        self._sending: dict[Slot, list[Request]] = {}
        self._watched: dict[str, deque[Request]] = {}

    def buffer(self, slot: Slot, size: int) -> np.ndarray:
        """Return `size` bytes that belong to a slot; the next call for it returns the same memory."""
        buffer = self._buffers.get(slot)
        if buffer is None or buffer.size < size:
            buffer = self._buffers[slot] = np.empty(size, np.uint8)
        return buffer[:size]

    def send(
        self, slot: Slot, buffer: np.ndarray, peer: int, tag: int, links: Sequence[int] = (), *, up: bool = False
    ) -> None:
        """Send the buffer of a slot, on the links of some devices where links are paced."""
        self._begin()
        with self.lock:
            self._sending.setdefault(slot, []).append(self._started(buffer, peer, tag, links, up=up))

    def receive(self, buffer: np.ndarray, peer: int, tag: int) -> Request:
        """Start receiving."""
        self._begin()
        return self.transport.receive(buffer, peer, tag)

    def watch(self, kind: str, request: Request) -> Request:
        """Return a request that is tested, in its turn among its kind, whenever messages are moved."""
        with self.lock:
            self._watched.setdefault(kind, deque()).append(request)
        return request

    def settle(self, slot: Slot) -> None:
        """Wait until what was sent from a slot is taken, so that its buffer may be written."""
        with self.lock:
            sent = self._sending.pop(slot, [])
        self.wait(sent, "its own messages to be taken", "own messages")

    def release(self, channel: str) -> None:
        """Give back the buffers of a channel whose messages are over."""
        for slot in [slot for slot in self._buffers if channel in slot[1:2]]:
            self.settle(slot)
            del self._buffers[slot]

    def poll(self) -> float:
        """Start what is due and pass on what is here; return the seconds until something is due, 0 after a move.

        The library itself is left alone: whoever waits tests requests, which moves it.
        """
        with self.lock:
            moved = sum([_advance(queue) for queue in self._watched.values()])
            due_s = self._outbox.release()
        return 0.0 if moved else due_s

    def drive(self) -> float:
        """Let the library move what it can, then poll."""
        self.transport.progress()
        return self.poll()

    def drive_at_times(self) -> None:
        """Drive if the policy is to poll and the interval has passed since the last time."""
        if self._progress.policy == "poll":
            now = time.monotonic()
            if now >= self._next_drive:
                self._next_drive = now + self._progress.interval_s
                self.drive()

    def wait(self, requests: Sequence[Request], what: str, unit: str = "") -> None:
        """Wait for requests as a span of `unit`; past the deadline WireError says who waits for `what`."""
        me = self.transport.name_of(self.transport.rank)
        self.wait_for(requests, lambda _: f"{me} still waits for {what}.", unit)

    def wait_for(self, requests: Sequence[Request], missing: Missing, unit: str, patience: float = 1.0) -> None:
        """Wait for requests as a span of `unit`; past `patience` deadlines WireError says what is missing."""
        if not all([request.done() for request in requests]):
            with self.clock.span("wait", unit):
                self.transport.wait(requests, patience * self.deadline_s, missing, self.poll)

    def agree(self, values: Sequence[int], what: str) -> list[int]:
        """Return the element-wise maximum of a few integers over all ranks."""
        with self.clock.span("wait", "agreement"):
            return self.transport.agree(values, self.deadline_s, what, self.poll)

    def finish(self, left: Callable[[], None]) -> None:
        """Complete what is watched, what was sent, then what `left` knows; WireError if a message never met another."""
        with self.lock:  # a progress thread has some of a queue in its hands for moments
            watched = [request for queue in self._watched.values() for request in queue]
        self.wait(watched, "messages to pass on", "messages to pass on")
        for slot in list(self._sending):
            self.settle(slot)
        left()
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        if self.transport.open_requests:
            raise WireError(f"{self.transport.open_requests} messages are still open at the end of the run.")

    def _started(self, buffer: np.ndarray, peer: int, tag: int, links: Sequence[int], *, up: bool) -> Request:
        if self._pacer is None:
            return self.transport.send(buffer, peer, tag)
        due = self._pacer.due(buffer.size, links, up=up)
        held = self._outbox.hold(due, peer, tag, lambda: self.transport.send(buffer, peer, tag))
        self._outbox.release()
        return held

    def _begin(self) -> None:
        """Start the progress thread with the first message, where there is to be one."""
        if self._progress.policy == "thread" and self._thread is None:
            self._thread = threading.Thread(target=self._keep_driving, name="progress", daemon=True)
            self._thread.start()

    def _keep_driving(self) -> None:
        while not self._over.is_set():
            due_s = self.drive()
            if due_s > 0:
                self._over.wait(max(BACKOFF_S[0], min(due_s, self._progress.interval_s)))


def _advance(queue: deque[Request]) -> int:
    """Test the first requests of a queue and drop those that are done; return how many these are."""
    first = [queue.popleft() for _ in range(min(WINDOW, len(queue)))]
    left = [request for request in first if not request.done()]
    queue.extendleft(reversed(left))
    return len(first) - len(left)
