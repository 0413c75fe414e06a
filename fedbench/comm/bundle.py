"""What an edge does with messages: passes them on as they come, or several small ones as one.

A bundle of several frames begins with their sizes (u64, little-endian); one frame travels as it is. Nothing here opens
a frame: it is checked where it is decoded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np

from fedbench.base.arrays import Unit
from fedbench.base.errors import WireError
from fedbench.codec import frame
from fedbench.comm.base import Request

_SIZE = np.dtype("<u8")


class Piece(NamedTuple):
    """One frame of an exchange: the place of its device among those sampled, the device, its unit's number, the unit."""

    slot: int
    device: int
    number: int
    unit: Unit


def groups(pieces: Sequence[Piece], most_bytes: int) -> list[list[Piece]]:
    """Return the pieces in order, in groups whose `bound` is at most `most_bytes`; larger pieces are alone."""
    found: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        size = frame.bound(piece.unit) + _SIZE.itemsize
        if size > room:
            found.append([])
            room = most_bytes
        found[-1].append(piece)
        room -= size
    return found


def bound(pieces: Sequence[Piece]) -> int:
    """Return the largest number of bytes that a group of pieces can travel as."""
    frames = sum(frame.bound(piece.unit) for piece in pieces)
    return frames if len(pieces) == 1 else frames + _SIZE.itemsize * len(pieces)


class Line:
    """Messages that go on in the order in which they were announced, whichever is here first.

    Between two ranks messages of one tag keep their order; whoever passes them on has to keep it too.
    """

    def __init__(self, lock: AbstractContextManager[object]) -> None:
        self._lock = lock
        self._waiting: deque[PassedOn] = deque()

    def add(self, requests: Sequence[Request], send: Callable[[Sequence[int]], None]) -> PassedOn:
        """Return messages that go on together when all of them are here and all before them have gone."""
        message = PassedOn(requests, send, self)
        self._waiting.append(message)
        return message

    def advance(self) -> None:
        """Pass on what may go."""
        with self._lock:
            while self._waiting and self._waiting[0].go():
                self._waiting.popleft()


class PassedOn:
    """Messages that go on in their place of a line; done when they have gone."""

    def __init__(self, requests: Sequence[Request], send: Callable[[Sequence[int]], None], line: Line) -> None:
        self.requests = requests
        self._send = send
        self._line = line
        self._over = False
        self.received_bytes = 0

    def done(self) -> bool:
        """Let the line advance; return whether these have gone."""
        if not self._over:
            self._line.advance()
        return self._over

    def go(self) -> bool:
        """Send once everything is here; return whether that has happened."""
        if not all(request.done() for request in self.requests):
            return False
        sizes = [request.received_bytes for request in self.requests]
        self.received_bytes = sizes[0]
        self._send(sizes)
        self._over = True
        return True


def pack(frames: Sequence[np.ndarray], out: np.ndarray) -> np.ndarray:
    """Return the bundle of some frames, written into `out`."""
    table = np.array([part.size for part in frames], _SIZE).view(np.uint8)
    size = table.size + sum(part.size for part in frames)
    return np.concatenate([table, *frames], out=out[:size])


class Split:
    """A bundle on its way to the cloud, whose frames are laid into buffers of their own when it is here."""

    def __init__(self, request: Request, bundle: np.ndarray, buffers: Sequence[np.ndarray], sender: str) -> None:
        self._request = request
        self._bundle = bundle
        self._buffers = buffers
        self._sender = sender
        self.sizes: list[int] | None = None

    def done(self) -> bool:
        """Return whether the bundle is here, split; WireError where its table doesn't fit it."""
        if self.sizes is None and self._request.done():
            self.sizes = self._split(self._bundle[: self._request.received_bytes])
        return self.sizes is not None

    def _split(self, bundle: np.ndarray) -> list[int]:
        count = len(self._buffers)
        at = _SIZE.itemsize * count
        sizes = [int(size) for size in bundle[: min(at, bundle.size // 8 * 8)].view(_SIZE)]
        if len(sizes) != count or at + sum(sizes) != bundle.size:
            raise WireError(f"Bundle of {count} frames from {self._sender}: {bundle.size} bytes with sizes {sizes}.")
        for size, buffer in zip(sizes, self._buffers, strict=True):
            if size > buffer.size:
                raise WireError(f"Bundle from {self._sender}: a frame of {size} bytes, at most {buffer.size} fit.")
            buffer[:size] = bundle[at : at + size]
            at += size
        return sizes


class Part:
    """One frame of a bundle, as the request that fills its buffer."""

    def __init__(self, whole: Split, number: int) -> None:
        self._whole = whole
        self._number = number

    def done(self) -> bool:
        """Return whether the bundle is here."""
        return self._whole.done()

    @property
    def received_bytes(self) -> int:
        """The frame's own bytes."""
        return 0 if self._whole.sizes is None else self._whole.sizes[self._number]
