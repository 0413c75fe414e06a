"""The transport over MPI: the only place, beside `run/launch.py`, that touches mpi4py.

Upper-case non-blocking calls on buffers that the caller owns, one thread at a time; waiting
tests and, after a brisk millisecond, sleeps with a growing pause, so that it never burns the core of a computing rank.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedbench.base.errors import WireError
from fedbench.comm.base import BACKOFF_S, BRISK_S, Missing, Poll, Request, nothing_held

#: MPI counts are 32-bit in MPI 1-3; frames are far smaller, and a larger one is an error here.
MAX_MESSAGE_BYTES = 1 << 30


class _Pending:
    def __init__(self, request: Any, owner: MpiTransport, *, receiving: bool) -> None:
        from mpi4py import MPI

        self._request = request
        self._owner = owner
        self._receiving = receiving
        self._status = MPI.Status()
        self._byte = MPI.BYTE
        self._complete = False
        self.received_bytes = 0

    def done(self) -> bool:
        """Test the request once; count it when it has just completed."""
        if self._complete:
            return True
        with self._owner.lock:
            if not self._complete and self._request.Test(self._status):
                if self._receiving:
                    self.received_bytes = self._status.Get_count(self._byte)
                    self._owner.moved_bytes += self.received_bytes
                self._owner.open_requests -= 1
                self._complete = True
        return self._complete


class MpiTransport:
    """Byte messages over one communicator of its own."""

    def __init__(self, communicator: Any) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self._comm = communicator.Dup()
        self._agreements = communicator.Dup()
        self._silent = communicator.Dup()
        self.lock = threading.RLock()
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()
        self.moved_bytes = 0
        self.open_requests = 0
        self._tag_limit = int(self._comm.Get_attr(MPI.TAG_UB))
        names = np.zeros((self.size, 64), np.uint8)
        mine = np.frombuffer(MPI.Get_processor_name().encode()[:64].ljust(64, b"\0"), np.uint8)
        self._comm.Allgather(np.ascontiguousarray(mine), names)
        self._hosts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in names]

    @property
    def takes_threads(self) -> bool:
        """Whether the library grants THREAD_MULTIPLE."""
        return bool(self._mpi.Query_thread() >= self._mpi.THREAD_MULTIPLE)

    @property
    def thread_level(self) -> str:
        """The thread level that the library grants, by its name in the standard."""
        levels = ("THREAD_SINGLE", "THREAD_FUNNELED", "THREAD_SERIALIZED", "THREAD_MULTIPLE")
        return next(f"MPI_{name}" for name in levels if getattr(self._mpi, name) == self._mpi.Query_thread())

    @property
    def library(self) -> str:
        """The library's own words about itself."""
        return str(self._mpi.Get_library_version()).strip("\0\n ").splitlines()[0]

    def send(self, buffer: np.ndarray, peer: int, tag: int) -> _Pending:
        """Start `Isend` of a uint8 buffer."""
        self._check(buffer, tag)
        with self.lock:
            self.moved_bytes += buffer.size
            self.open_requests += 1
            return _Pending(self._comm.Isend([buffer, self._mpi.BYTE], peer, tag), self, receiving=False)

    def receive(self, buffer: np.ndarray, peer: int, tag: int) -> _Pending:
        """Start `Irecv` into a uint8 buffer."""
        self._check(buffer, tag)
        with self.lock:
            self.open_requests += 1
            return _Pending(self._comm.Irecv([buffer, self._mpi.BYTE], peer, tag), self, receiving=True)

    def progress(self) -> None:
        """Probe where nobody ever sends: a probe that finds nothing makes the library move all that is under way."""
        with self.lock:
            self._silent.Iprobe(self._mpi.ANY_SOURCE, self._mpi.ANY_TAG)

    def wait(self, requests: Sequence[Request], deadline_s: float, missing: Missing, poll: Poll = nothing_held) -> None:
        """Return when all requests are done; after `deadline_s` seconds raise WireError with `missing(indices)`."""
        now = time.monotonic()
        end, brisk_end, pause = now + deadline_s, now + BRISK_S, BACKOFF_S[0]
        left = [index for index, request in enumerate(requests) if not request.done()]
        while left:
            due_s = poll()
            waiting = [index for index in left if not requests[index].done()]
            now = time.monotonic()
            if due_s == 0 or len(waiting) < len(left):
                brisk_end, pause = now + BRISK_S, BACKOFF_S[0]
            elif now > end:
                raise WireError(f"After {deadline_s:g} s: {missing(waiting)}")
            elif now < brisk_end:
                time.sleep(0)
            else:
                time.sleep(min(pause, due_s))
                pause = min(2 * pause, BACKOFF_S[1])
            left = waiting

    def agree(self, values: Sequence[int], deadline_s: float, what: str, poll: Poll = nothing_held) -> list[int]:
        """Return the element-wise maximum over all ranks; rank 0 collects, so that it can name who is missing.

        The other ranks wait twice as long: rank 0 may come late, and is the one that should speak.
        """
        values_ = np.array([values] * self.size, np.int64)
        if self.rank == 0:
            with self.lock:
                came = [self._pending(self._agreements.Irecv(values_[peer], peer)) for peer in range(1, self.size)]
            self.wait(came, deadline_s, lambda left: f"{self._names(left)} did not come to {what}.", poll)
            most = values_.max(axis=0)
            with self.lock:
                told = [self._pending(self._agreements.Isend(most, peer)) for peer in range(1, self.size)]
            self.wait(told, deadline_s, lambda left: f"{self._names(left)} did not hear the agreement to {what}.", poll)
        else:
            most = np.empty_like(values_[0])
            with self.lock:
                both = [self._agreements.Irecv(most, 0), self._agreements.Isend(values_[0], 0)]
                asked = [self._pending(request) for request in both]
            silent = f"{self.name_of(self.rank)} still waits for {self.name_of(0)} to {what}."
            self.wait(asked, 2 * deadline_s, lambda _: silent, poll)
        return [int(value) for value in most]

    def _pending(self, request: Any) -> _Pending:
        """Return a request of an agreement, whose few bytes are not counted."""
        self.open_requests += 1
        return _Pending(request, self, receiving=False)

    def _names(self, peers: Sequence[int]) -> str:
        """Return the names of ranks given by their place after rank 0."""
        return ", ".join(self.name_of(1 + peer) for peer in peers)

    def name_of(self, rank: int) -> str:
        """Return a rank's name with its host."""
        return f"rank {rank} on {self._hosts[rank]}"

    def _check(self, buffer: np.ndarray, tag: int) -> None:
        if buffer.size > MAX_MESSAGE_BYTES:
            raise WireError(f"A message of {buffer.size} bytes; at most {MAX_MESSAGE_BYTES} are sent at once.")
        if not 0 <= tag <= self._tag_limit:
            raise WireError(f"Tag {tag} is outside MPI's 0..{self._tag_limit}.")

    def ping_pong(self, buffer: np.ndarray, turns: int, other: int = 1) -> None:
        """Let ranks 0 and `other` pass a uint8 buffer there and back by blocking calls: what a benchmark compares with."""
        message, peer = [buffer, self._mpi.BYTE], other if self.rank == 0 else 0
        for _ in range(turns if self.rank in (0, other) else 0):
            for sending in (self.rank == 0, self.rank == other):
                if sending:
                    self._comm.Send(message, peer)
                else:
                    self._comm.Recv(message, peer)
