"""Units on their way to a rank: waited for, checked and decoded when they are first asked for.

An inbox posts nothing and sends nothing; whoever made it gave it the buffers and requests.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from fedbench.base.arrays import Unit
from fedbench.base.clock import Clock
from fedbench.base.errors import WireError
from fedbench.codec import frame
from fedbench.codec.codecs import Codec
from fedbench.codec.frame import Note, Place
from fedbench.comm.base import Request

#: Decoded copies that an inbox keeps at a time; views of raw frames cost nothing and are all kept.
DECODED_UNITS = 2


class Waiter(Protocol):
    """Who waits for an inbox's requests: a topology, which knows deadline and names."""

    clock: Clock

    def wait(self, requests: Sequence[Request], what: str) -> None:
        """Wait for requests; past the deadline WireError says who waits for `what`."""


class Inbox(Mapping[str, np.ndarray]):
    """Units on their way to this rank, by name; reading one waits for it, checks it and decodes it."""

    def __init__(
        self, waiter: Waiter, units: Sequence[Unit], places: Sequence[Place], codecs: Sequence[Codec], sender: str
    ) -> None:
        self._waiter = waiter
        self._codecs = codecs
        self._units = units
        self._places = places
        self.sender = sender
        self._index = {unit.name: index for index, unit in enumerate(units)}
        self._frames: list[tuple[np.ndarray, Request | None]] = []
        self._notes: dict[int, Note] = {}
        self._views: dict[str, np.ndarray] = {}
        self._decoded: OrderedDict[str, np.ndarray] = OrderedDict()

    def put(self, index: int, buffer: np.ndarray, request: Request | None) -> None:
        """Add the buffer of the next unit and the request that fills it (None: it is filled)."""
        if index != len(self._frames):
            raise WireError(f"Unit {index} put where {len(self._frames)} was next.")
        self._frames.append((buffer, request))

    def __getitem__(self, name: str) -> np.ndarray:
        for kept in (self._views, self._decoded):
            if name in kept:
                return kept[name]
        index = self._index[name]
        bytes_ = self._arrived(index)
        with self._waiter.clock.span("decode"):
            unit, codec = self._units[index], self._codecs[index]
            array, note = frame.unpack(bytes_, unit, self._places[index], (codec,), self.sender)
        self._notes[index] = note
        if np.may_share_memory(array, bytes_):
            self._views[name] = array
            return array
        self._decoded[name] = array
        if len(self._decoded) > DECODED_UNITS:
            self._decoded.popitem(last=False)
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
        return sum(self._arrived(index).size - frame.HEADER_BYTES for index in range(len(self._units)))

    def _arrived(self, index: int) -> np.ndarray:
        buffer, request = self._frames[index]
        if request is None:
            return buffer
        what = f"{self._units[index].name} of round {self._places[index].round} from {self.sender}"
        self._waiter.wait([request], what)
        return buffer[: request.received_bytes]
