"""The star: rank 0 is the cloud, every rank but it hosts devices (rank 0 too, when it is alone).

Both ends know every unit's size before it travels. Units are decoded when they are first asked for, so a device can
compute on the first layer while the next ones are under way.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import numpy as np

from fedbench.base.arrays import Arrays, Unit
from fedbench.base.clock import Clock
from fedbench.base.errors import WireError
from fedbench.codec import frame
from fedbench.codec.codecs import RAW
from fedbench.codec.coding import Codec
from fedbench.codec.frame import NO_NOTE, Note, Place
from fedbench.comm.base import Request, Transport
from fedbench.comm.frames import DOWN, Frames
from fedbench.comm.inbox import Inbox
from fedbench.comm.mail import AT_WAITS, Mail, Progress, Slot
from fedbench.comm.pace import Pacer
from fedbench.comm.topology import UnitsOf

#: The devices that a rank hosts, on whose links a message goes to it.
Links = Mapping[int, Sequence[int]]


class Star:
    """Exchanges of checked frames between the cloud and the ranks that host devices, with nothing between them."""

    def __init__(
        self,
        transport: Transport,
        deadline_s: float,
        clock: Clock,
        pacer: Pacer | None = None,
        progress: Progress = AT_WAITS,
        *,
        lz4: bool = False,
    ) -> None:
        self.transport = transport
        self.clock = clock
        self._mail = Mail(transport, clock, deadline_s, pacer, progress)
        self._frames = Frames(self, self._mail, lz4=lz4)
        self._receiving: dict[Slot, Request] = {}

    #: Deadlines that the cloud waits for devices: whoever knows best who is missing must speak first.
    _patience = 1.0

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

    @property
    def moved_bytes(self) -> int:
        """Bytes of all messages, each once: the cloud is an end of every one."""
        return self.transport.moved_bytes

    @property
    def _parent(self) -> int:
        """The rank that this one has everything from and sends everything to."""
        return 0

    @property
    def _source(self) -> str:
        """Where this rank has everything from, in words."""
        return self.transport.name_of(0)

    @property
    def _children(self) -> Sequence[int]:
        """The ranks that this one sends on to what comes down."""
        return self.peers if self.is_cloud else ()

    def down(
        self,
        channel: str,
        units: Sequence[Unit],
        arrays: Arrays | None,
        place: Place,
        note: Note = NO_NOTE,
        devices: Sequence[int] = (),
        codecs: Sequence[Codec] | None = None,
    ) -> Inbox:
        """Return what the cloud sends to everyone; `arrays` is given on rank 0 and None elsewhere.

        It travels on the links of `devices`. `codecs` has one for each unit, the same on all ranks; None is raw for all.
        Every rank, the cloud too, reads what was decoded. What was received stays valid until the next message of the
        same channel.
        """
        self._frames.next_move()
        codecs = codecs or [RAW] * len(units)
        places = [place._replace(device=-1, unit=index) for index in range(len(units))]
        inbox = Inbox(self, units, places, codecs, self._source, channel)
        receiving, links = not self.is_cloud or 0 in self.peers, self._links(devices)
        if receiving:
            for index, unit in enumerate(units):
                self._await_down(inbox, (channel, index), unit, codecs[index], links)
        if self.is_cloud:
            if arrays is None:
                raise WireError("The cloud has nothing to send where devices wait for it.")
            for index, unit in enumerate(units):
                slot = ("out", channel, index)
                packed = self._frames.pack(slot, arrays[unit.name], unit, places[index], note, codecs[index])
                self._send_down(slot, packed, self._frames.tag(DOWN, index), links)
                if not receiving:
                    inbox.put(index, packed, None)
                self._mail.drive_at_times()
        return inbox

    def expect(self, devices: Sequence[int], units: UnitsOf, place: Place) -> dict[int, Inbox]:
        """Return an inbox per sampled device, receives posted; empty on ranks other than the cloud.

        `units(device)` tells what that device sends; every rank says the same.
        """
        self._frames.next_move()
        if not self.is_cloud:
            return {}
        inboxes = {}
        for slot, device in enumerate(devices):
            host = self.host_of(device)
            sender = f"device {device} ({self.transport.name_of(host)})"
            inboxes[device] = self._frames.post(slot, host, units(device), place._replace(device=device), sender)
        return inboxes

    def report(
        self, devices: Sequence[int], device: int, units: Sequence[Unit], arrays: Arrays, place: Place, note: Note
    ) -> None:
        """Start sending a hosted device's units to the cloud; `expect` was called before on this rank."""
        slot = bisect_left(devices, device)  # they ascend
        self._frames.send(slot, self._parent, units, arrays, place._replace(device=device), note, (device,))

    def gather(self, inboxes: Mapping[int, Inbox]) -> None:
        """Wait, as a span of `upload`, until all devices' units are here; past the deadline WireError names who is missing."""
        self._wait_for_all(inboxes)

    def gather_from_ranks(self, units: Sequence[Unit], arrays: Arrays, place: Place, note: Note) -> dict[int, Inbox]:
        """Return on rank 0 what every other rank sends of itself (its rank stands as device), elsewhere nothing."""
        self._frames.next_move()
        inboxes = {}
        if self.is_cloud:
            for rank in range(1, self.transport.size):
                own = place._replace(device=rank)
                inboxes[rank] = self._frames.post(rank - 1, rank, units, own, self.transport.name_of(rank))
            self._wait_for_all(inboxes)
        else:
            rank = self.transport.rank
            self._frames.send(rank - 1, 0, units, arrays, place._replace(device=rank), note)
        return inboxes

    def agree(self, values: Sequence[int], what: str) -> list[int]:
        """Return the element-wise maximum of a few integers over all ranks."""
        return self._mail.agree(values, what)

    def release(self, channel: str) -> None:
        """Give back the memory of a channel, once its messages have come and gone on."""
        for slot in [slot for slot in self._receiving if slot[0] == channel]:
            self._settle(slot)
        self._mail.release(channel)

    def poll(self) -> None:
        """Move messages from within a computation, if the policy says so and it is time."""
        self._mail.drive_at_times()

    def wait(self, requests: Sequence[Request], what: str, unit: str = "") -> None:
        """Wait for requests as a span of `unit`; past the deadline WireError says who waits for `what`."""
        self._mail.wait(requests, what, unit)

    def finish(self) -> None:
        """Complete every send, and every receive that nobody here asked for; WireError if a message never met another."""
        self._mail.finish(self._settle_all)

    def _wait_for_all(self, inboxes: Mapping[int, Inbox]) -> None:
        waiting = [(inbox, request) for inbox in inboxes.values() for request in inbox.requests]

        def missing(left: Sequence[int]) -> str:
            senders = list(dict.fromkeys(waiting[index][0].sender for index in left))
            return f"{self.transport.name_of(0)} still waits for {', '.join(senders)}."

        self._mail.wait_for([request for _, request in waiting], missing, "upload", self._patience)

    def _await_down(self, inbox: Inbox, place: tuple[str, int], unit: Unit, codec: Codec, links: Links) -> None:
        """Post the receive of the next unit of an inbox, whose channel and number are its place.

        What was sent down last in its slot is waited for first: a rank whose devices sit a round out never read it.
        """
        slot, index = place, place[1]
        tag = self._frames.tag(DOWN, index)
        self._settle(slot)
        self._mail.settle(("in", *slot))
        buffer = self._mail.buffer(("in", *slot), frame.bound(unit, codec))
        request = self._relayed(self._mail.receive(buffer, self._parent, tag), slot, buffer, tag, links)
        self._receiving[slot] = request
        inbox.put(index, buffer, request)

    def _relayed(self, request: Request, slot: Slot, buffer: np.ndarray, tag: int, links: Links) -> Request:
        """Return a receive from above as it is: nobody is below."""
        return request

    def _links(self, devices: Sequence[int]) -> Links:
        """Return which of some devices each child hosts; nothing where links are not paced and nobody asks."""
        found: dict[int, list[int]] = {}
        for device in devices if self._mail.paced else ():
            found.setdefault(self.host_of(device), []).append(device)
        return found

    def _send_down(self, slot: Slot, packed: np.ndarray, tag: int, links: Links) -> None:
        """Send a frame to all children, to each on the links of its own devices."""
        for child in self._children:
            self._mail.send(slot, packed, child, tag, links.get(child, ()))

    def _settle_all(self) -> None:
        for slot in list(self._receiving):
            self._settle(slot)

    def _settle(self, slot: Slot) -> None:
        request = self._receiving.pop(slot, None)
        if request is not None:
            self.wait([request], f"the last {slot[0]} from {self._source}", f"last {slot[0]}")
