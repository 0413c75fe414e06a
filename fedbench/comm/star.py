"""The star: rank 0 is the cloud, every rank but it hosts devices (rank 0 too, when it is alone).

Three moves make an exchange: the cloud sends units down to all ranks, devices send
units up, the cloud takes them in device order. Both ends know every unit's size
before it travels. Units are decoded when they are first asked for, so a device can
compute on the first layer while the next ones are under way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fedbench.base.arrays import Arrays, Unit
from fedbench.base.clock import Clock
from fedbench.base.errors import WireError
from fedbench.codec import frame
from fedbench.codec.codecs import RAW, Codec
from fedbench.codec.frame import NO_NOTE, Note, Place
from fedbench.comm.base import Request, Transport
from fedbench.comm.inbox import Inbox

_DOWN, _UP = 0, 1

#: Units of one sender that have tags of their own, and tags that every MPI has (MPI_TAG_UB is at least 32767).
_UNITS, _TAGS = 509, 32764

#: What a device sends.
UnitsOf = Callable[[int], Sequence[Unit]]


class Star:
    """Exchanges of checked frames between the cloud and the ranks that host devices."""

    def __init__(self, transport: Transport, deadline_s: float, clock: Clock, *, lz4: bool = False) -> None:
        self.transport = transport
        self.clock = clock
        self._lz4 = lz4
        self._deadline_s = deadline_s
        self._buffers: dict[tuple[object, ...], np.ndarray] = {}
        self._sending: dict[tuple[object, ...], list[Request]] = {}
        self._receiving: dict[tuple[object, ...], Request] = {}
        self._moves = 0

    @property
    def is_cloud(self) -> bool:
        """Whether this rank is the cloud."""
        return self.transport.rank == 0

    @property
    def peers(self) -> range:
        """Ranks that host devices."""
        return range(1, self.transport.size) if self.transport.size > 1 else range(1)

    def host_of(self, device: int) -> int:
        """Return the rank that hosts a device."""
        return self.peers[device % len(self.peers)]

    def down(
        self,
        channel: str,
        units: Sequence[Unit],
        arrays: Arrays | None,
        place: Place,
        note: Note = NO_NOTE,
        codecs: Sequence[Codec] | None = None,
    ) -> Inbox:
        """Return what the cloud sends to everyone; `arrays` is given on rank 0 and None elsewhere.

        `codecs` has one for each unit, the same on all ranks; None is raw for all. Every rank, the cloud too, reads what
        was decoded. What was received stays valid until the next message of the same channel.
        """
        self._moves += 1
        codecs = codecs or [RAW] * len(units)
        hosting = self.transport.rank in self.peers
        slots = [(channel, index) for index in range(len(units))]
        places = [place._replace(device=-1, unit=index) for index in range(len(units))]
        inbox = Inbox(self, units, places, codecs, self.transport.name_of(0))
        if hosting:
            for index, (unit, slot) in enumerate(zip(units, slots, strict=True)):
                self._settle(slot)
                buffer = self._buffer(("in", *slot), frame.bound(unit, codecs[index]))
                request = self.transport.receive(buffer, 0, self._tag(_DOWN, index))
                self._receiving[slot] = request
                inbox.put(index, buffer, request)
        if self.is_cloud:
            if arrays is None:
                raise WireError("The cloud has nothing to send where devices wait for it.")
            for index, (unit, slot) in enumerate(zip(units, slots, strict=True)):
                packed = self._pack(("out", *slot), arrays[unit.name], unit, places[index], note, codecs[index])
                self._sending["out", *slot] = [
                    self.transport.send(packed, peer, self._tag(_DOWN, index)) for peer in self.peers
                ]
                if not hosting:
                    inbox.put(index, packed, None)
        return inbox

    def expect(self, devices: Sequence[int], units: UnitsOf, place: Place) -> dict[int, Inbox]:
        """Return an inbox per sampled device, receives posted; empty on ranks other than the cloud.

        `units(device)` tells what that device sends; every rank says the same.
        """
        self._moves += 1
        if not self.is_cloud:
            return {}
        inboxes = {}
        for slot, device in enumerate(devices):
            host = self.host_of(device)
            sender = f"device {device} ({self.transport.name_of(host)})"
            inboxes[device] = self._post(slot, device, host, units(device), place, sender)
        return inboxes

    def report(
        self, devices: Sequence[int], device: int, units: Sequence[Unit], arrays: Arrays, place: Place, note: Note
    ) -> None:
        """Start sending a hosted device's units to the cloud; `expect` was called before on this rank."""
        slot = list(devices).index(device)
        for index, unit in enumerate(units):
            key = ("out up", slot, index)
            packed = self._pack(key, arrays[unit.name], unit, place._replace(device=device, unit=index), note)
            self._sending[key] = [self.transport.send(packed, 0, self._tag(_UP, index, slot))]

    def gather(self, inboxes: Mapping[int, Inbox]) -> None:
        """Wait until every device's units have arrived; past the deadline WireError names all that are missing."""
        waiting = [(inbox, request) for inbox in inboxes.values() for request in inbox.requests]

        def missing(left: Sequence[int]) -> str:
            senders = list(dict.fromkeys(waiting[index][0].sender for index in left))
            return f"{self.transport.name_of(0)} still waits for {', '.join(senders)}."

        requests = [request for _, request in waiting]
        if not all([request.done() for request in requests]):
            with self.clock.span("wait"):
                self.transport.wait(requests, self._deadline_s, missing)

    def gather_from_ranks(self, units: Sequence[Unit], arrays: Arrays, place: Place, note: Note) -> dict[int, Inbox]:
        """Return on rank 0 what every other rank sends of itself (its rank stands as device), elsewhere nothing."""
        self._moves += 1
        others = list(range(1, self.transport.size))
        inboxes = {}
        if self.is_cloud:
            for slot, rank in enumerate(others):
                inboxes[rank] = self._post(slot, rank, rank, units, place, self.transport.name_of(rank))
            self.gather(inboxes)
        else:
            self.report(others, self.transport.rank, units, arrays, place, note)
        return inboxes

    def agree(self, values: Sequence[int], what: str) -> list[int]:
        """Return the element-wise maximum of a few integers over all ranks."""
        with self.clock.span("wait"):
            return self.transport.agree(values, self._deadline_s, what)

    def finish(self) -> None:
        """Complete every send, and every receive that nobody here asked for; WireError if a message never met another."""
        for requests in self._sending.values():
            self.wait(requests, "its own messages to be taken")
        self._sending.clear()
        for slot in list(self._receiving):
            self._settle(slot)
        if self.transport.open_requests:
            raise WireError(f"{self.transport.open_requests} messages are still open at the end of the run.")

    def wait(self, requests: Sequence[Request], what: str) -> None:
        """Wait for requests; past the deadline WireError says who waits for `what`."""
        if all([request.done() for request in requests]):
            return
        me = self.transport.name_of(self.transport.rank)
        with self.clock.span("wait"):
            self.transport.wait(requests, self._deadline_s, lambda _: f"{me} still waits for {what}.")

    def _settle(self, slot: tuple[object, ...]) -> None:
        """Wait for what was sent down last in a slot: a rank whose devices sit a round out may never have read it."""
        request = self._receiving.pop(slot, None)
        if request is not None:
            self.wait([request], f"the last {slot[0]} from the cloud")

    def _post(self, slot: int, device: int, host: int, units: Sequence[Unit], place: Place, sender: str) -> Inbox:
        """Return an inbox with receives posted for all units of one sender."""
        places = [place._replace(device=device, unit=index) for index in range(len(units))]
        inbox = Inbox(self, units, places, [RAW] * len(units), sender)
        for index, unit in enumerate(units):
            buffer = self._buffer(("in up", slot, index), frame.bound(unit))
            tag = self._tag(_UP, index, slot)
            inbox.put(index, buffer, self.transport.receive(buffer, host, tag))
        return inbox

    def _pack(
        self, key: tuple[object, ...], array: np.ndarray, unit: Unit, place: Place, note: Note, codec: Codec = RAW
    ) -> np.ndarray:
        self.wait(self._sending.pop(key, []), "its own messages to be taken")
        with self.clock.span("encode"):
            out = self._buffer(key, frame.bound(unit, codec))
            return frame.pack(array, unit, place, codec, note, out, lz4=self._lz4).frame

    def _buffer(self, key: tuple[object, ...], size: int) -> np.ndarray:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.size < size:
            buffer = self._buffers[key] = np.empty(size, np.uint8)
        return buffer[:size]

    def _tag(self, way: int, index: int, slot: int = 0) -> int:
        """Return a tag from direction, parity of the move, unit and sender, so that a stale message meets no receive.

        Messages of one tag between two ranks keep their order, so tags may meet again in very large rounds.
        """
        return (((slot * _UNITS + index) * 2 + self._moves % 2) * 2 + way) % _TAGS
