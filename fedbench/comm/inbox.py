"""Units on their way to a rank: waited for, checked and decoded when they are first asked for.

An inbox posts nothing and sends nothing; whoever made it gave it the buffers and requests.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from fedbench.base.arrays import Unit
from fedbench.base.clock import Clock
from fedbench.base.errors import WireError
from fedbench.codec import frame
from fedbench.codec.codecs import CODECS
from fedbench.codec.coding import Codec
from fedbench.codec.frame import Note, Place
from fedbench.comm.base import Request

#: Seconds between two waits from which on they tell the link's rate: waits end up to 2 ms late.
_SEEN_S = 0.05


class Waiter(Protocol):
    """Who waits for an inbox's requests: a topology, which knows deadline and names."""

    clock: Clock

    def wait(self, requests: Sequence[Request], what: str, unit: str = "") -> None:
        """Wait for requests as a span of `unit`; past the deadline WireError says who waits for `what`."""


class Inbox(Mapping[str, np.ndarray]):
    """Units on their way to this rank, by name; reading one waits for it, checks it and decodes it.

    The latest decoded copy is kept, and every view of a raw frame, which costs nothing.
    """

    def __init__(
        self,
        waiter: Waiter,
        units: Sequence[Unit],
        places: Sequence[Place],
        codecs: Sequence[Codec],
        sender: str,
        channel: str = "upload",
    ) -> None:
        self._waiter = waiter
        self._codecs = codecs
        self._units = units
        self._places = places
        self.sender = sender
        self._channel = channel
        self._index = {unit.name: index for index, unit in enumerate(units)}
        self._frames: list[tuple[np.ndarray, Request | None]] = []
        self._notes: dict[int, Note] = {}
        self._views: dict[str, np.ndarray] = {}
        self._latest: tuple[str, np.ndarray] | None = None
        self._waited: list[tuple[int, float]] = []

    def put(self, index: int, buffer: np.ndarray, request: Request | None) -> None:
        """Add the buffer of the next unit and the request that fills it (None: it is filled)."""
        if index != len(self._frames):
            raise WireError(f"Unit {index} put where {len(self._frames)} was next.")
        self._frames.append((buffer, request))

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._views:
            return self._views[name]
        if self._latest is not None and self._latest[0] == name:
            return self._latest[1]
        index = self._index[name]
        bytes_ = self._arrived(index)
        self._latest = None
        with self._waiter.clock.span("decode", f"{self._channel}/{name}"):
            unit, codec = self._units[index], self._codecs[index]
            array, note = frame.unpack(bytes_, unit, self._places[index], (codec,), self.sender)
        self._notes[index] = note
        if np.may_share_memory(array, bytes_):
            self._views[name] = array
        else:
            self._latest = name, array
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._units)

    @property
    def requests(self) -> list[Request]:
        """The receives that fill this inbox."""
        return [request for _, request in self._frames if request is not None]

    @property
    def note(self) -> Note:
        """The telemetry of the first unit."""
        if 0 not in self._notes:
            self[self._units[0].name]
        return self._notes[0]

    @property
    def coded_bytes(self) -> int:
        """Payload bytes as they travelled, headers excluded; waits for all units."""
        return sum(self.unit_bytes)

    @property
    def unit_bytes(self) -> tuple[int, ...]:
        """The same unit by unit."""
        return tuple(self._arrived(index).size - frame.HEADER_BYTES for index in range(len(self._units)))

    @property
    def waited_bit_s(self) -> float:
        """The rate at which units came from the first that was waited for to the last, in bit/s; 0 where it is unknown."""
        if not self._waited:
            return 0.0
        (first, start), (last, end) = self._waited[0], self._waited[-1]
        if last <= first or end - start < _SEEN_S:
            return 0.0
        return 8.0 * sum(self._arrived(index).size for index in range(first + 1, last + 1)) / (end - start)

    def complete(self) -> None:
        """Wait for all units, one after the other."""
        for index in range(len(self._units)):
            self._arrived(index)

    def coded(self) -> dict[str, np.ndarray]:
        """Return copies of all frames by name, uint8; waits for all units."""
        return {unit.name: self._arrived(index).copy() for index, unit in enumerate(self._units)}

    def _arrived(self, index: int) -> np.ndarray:
        buffer, request = self._frames[index]
        if request is None:
            return buffer
        if not request.done():
            name = self._units[index].name
            what = f"{name} of round {self._places[index].round} from {self.sender}"
            self._waiter.wait([request], what, f"{self._channel}/{name}")
            self._waited.append((index, time.monotonic()))
        return buffer[: request.received_bytes]


class Kept(Mapping[str, np.ndarray]):
    """Units of the cloud as they travelled, from a checkpoint; the latest that was read is kept decoded."""

    def __init__(self, units: Sequence[Unit], frames: Mapping[str, np.ndarray]) -> None:
        self._units = {unit.name: (index, unit) for index, unit in enumerate(units)}
        self._frames = dict(frames)
        self._latest: tuple[str, np.ndarray] | None = None

    def __getitem__(self, name: str) -> np.ndarray:
        if self._latest is None or self._latest[0] != name:
            self._latest = None
            (index, unit), bytes_ = self._units[name], self._frames[name]
            place = frame.place_of(bytes_)._replace(device=-1, unit=index)
            self._latest = name, frame.unpack(bytes_, unit, place, CODECS.values(), "the checkpoint")[0]
        return self._latest[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._units)

    def __len__(self) -> int:
        return len(self._units)

    def coded(self) -> dict[str, np.ndarray]:
        """Return all frames by name, uint8."""
        return dict(self._frames)
