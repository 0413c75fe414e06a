"""The tree: rank 0 is the cloud, the next ranks are edges, the others host devices and speak with one edge each.

An edge passes units on downwards one by one, unit k while k + 1 is under way, and sends what its devices report up in
device order, in bundles. It opens no frame, so that the cloud and the devices see what they would see in a star; links
lie between edges and devices, between cloud and edges is the bare transport.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedbench.base.clock import Clock
from fedbench.codec import frame
from fedbench.codec.codecs import RAW
from fedbench.codec.frame import Place
from fedbench.comm import bundle
from fedbench.comm.base import Request, Transport
from fedbench.comm.bundle import Line, PassedOn, Piece
from fedbench.comm.frames import UP
from fedbench.comm.inbox import Inbox
from fedbench.comm.mail import AT_WAITS, Progress, Slot
from fedbench.comm.pace import Pacer
from fedbench.comm.star import Links, Star
from fedbench.comm.topology import UnitsOf


def edge_count(edges: int, size: int) -> int:
    """Return how many of `size` ranks are edges where `edges` are asked for: each has a rank with devices below it."""
    return min(edges, (size - 1) // 2)


class Tree(Star):
    """A star whose rays are edges; `edges` of `edge_count` are ranks 1 and following, bundles have `chunk_bytes` at most."""

    #: An edge, which knows the devices that are missing below it, ends the run before the cloud does.
    _patience = 1.5

    def __init__(
        self,
        transport: Transport,
        deadline_s: float,
        clock: Clock,
        pacer: Pacer | None = None,
        progress: Progress = AT_WAITS,
        *,
        edges: int,
        chunk_bytes: int,
        lz4: bool = False,
    ) -> None:
        super().__init__(transport, deadline_s, clock, pacer, progress, lz4=lz4)
        self._edges = range(1, 1 + edges)
        self._chunk_bytes = chunk_bytes
        self._is_edge = transport.rank in self._edges
        self._uploads: list[tuple[Sequence[Piece], PassedOn]] = []
        self._below_bytes = 0
        self._down_line = Line(self._mail.lock)

    @property
    def peers(self) -> range:
        """Ranks that host devices."""
        return range(self._edges.stop, self.transport.size)

    @property
    def moved_bytes(self) -> int:
        """Bytes of all messages, each once: of those between edges and devices the cloud knows every frame's size."""
        return self.transport.moved_bytes + self._below_bytes

    @property
    def _parent(self) -> int:
        rank = self.transport.rank
        return self._edge_of(rank) if rank in self.peers else 0

    @property
    def _source(self) -> str:
        cloud = self.transport.name_of(0)
        return f"{cloud}, by edge {self.transport.name_of(self._parent)}" if self._parent else cloud

    @property
    def _children(self) -> Sequence[int]:
        if self.is_cloud:
            return self._edges
        return [rank for rank in self.peers if self._is_edge and self._edge_of(rank) == self.transport.rank]

    def expect(self, devices: Sequence[int], units: UnitsOf, place: Place) -> dict[int, Inbox]:
        """Return an inbox per sampled device, receives posted; empty on ranks other than the cloud."""
        if self.transport.rank in self.peers:
            return super().expect(devices, units, place)
        self._frames.next_move()
        pieces = [Piece(s, d, i, unit) for s, d in enumerate(devices) for i, unit in enumerate(units(d))]
        if self._is_edge:
            own = [piece for piece in pieces if self._edge_of(self.host_of(piece.device)) == self.transport.rank]
            lines: dict[int, Line] = {}
            self._uploads = [
                (group, self._collect(number, group, lines))
                for number, group in enumerate(bundle.groups(own, self._chunk_bytes))
            ]
            return {}
        coming: dict[tuple[int, int], tuple[np.ndarray, Request]] = {}
        for edge in self._edges:
            own = [piece for piece in pieces if self._edge_of(self.host_of(piece.device)) == edge]
            for number, group in enumerate(bundle.groups(own, self._chunk_bytes)):
                coming.update(self._await_bundle(edge, number, group))
        inboxes = {}
        for device in devices:
            mine = units(device)
            places = [place._replace(device=device, unit=index) for index in range(len(mine))]
            inboxes[device] = Inbox(self, mine, places, [RAW] * len(mine), self._sender(device))
            for index in range(len(mine)):
                inboxes[device].put(index, *coming[device, index])
        return inboxes

    def gather(self, inboxes: Mapping[int, Inbox]) -> None:
        """Wait, as a span of `upload`, until all devices' units are here; past the deadline WireError names who is missing."""
        super().gather(inboxes)
        self._below_bytes += sum(request.received_bytes for inbox in inboxes.values() for request in inbox.requests)

    def wait(self, requests: Sequence[Request], what: str, unit: str = "") -> None:
        """Wait for requests; past the deadline WireError says who waits for `what`, and at an edge for which devices."""
        self._mail.wait_for(requests, lambda _: f"{self._name()} still waits for {what}{self._late()}.", unit)

    def _edge_of(self, rank: int) -> int:
        return self._edges[(rank - self.peers.start) % len(self._edges)]

    def _name(self) -> str:
        name = self.transport.name_of(self.transport.rank)
        return f"{name} (edge)" if self._is_edge else name

    def _sender(self, device: int) -> str:
        host = self.host_of(device)
        edge = self.transport.name_of(self._edge_of(host))
        return f"device {device} ({self.transport.name_of(host)}, by edge {edge})"

    def _late(self) -> str:
        """Return which devices below this edge have not reported in full, as the end of a sentence."""
        late = {
            f"device {piece.device} ({self.transport.name_of(self.host_of(piece.device))})": None
            for group, upload in self._uploads
            for piece, request in zip(group, upload.requests, strict=True)
            if not request.done()
        }
        return f", and for {', '.join(late)}" if late else ""

    def _send_down(self, slot: Slot, packed: np.ndarray, tag: int, links: Links) -> None:
        super()._send_down(slot, packed, tag, links)
        if self.is_cloud:
            self._below_bytes += packed.size * len(self.peers)

    def _relayed(self, request: Request, slot: Slot, buffer: np.ndarray, tag: int, links: Links) -> Request:
        """Return a receive from above that an edge passes on when it is here."""
        if not self._is_edge:
            return request

        def send(sizes: Sequence[int]) -> None:
            self._send_down(("in", *slot), buffer[: sizes[0]], tag, links)

        passed = self._down_line.add([request], send)
        self._mail.watch("down", passed)
        return passed

    def _collect(self, number: int, group: Sequence[Piece], lines: dict[int, Line]) -> PassedOn:
        """Return the receives of a group of frames, which go up as one when all are here, in the line of their tag."""
        buffers, requests = [], []
        for slot, device, index, unit in group:
            key = ("in up", slot, index)
            self._mail.settle(key)
            buffers.append(self._mail.buffer(key, frame.bound(unit)))
            host, tag = self.host_of(device), self._frames.tag(UP, index, slot)
            requests.append(self._mail.receive(buffers[-1], host, tag))
        tag = self._frames.tag(UP, number, self.transport.rank)
        out: Slot = ("in up", group[0].slot, group[0].number) if len(group) == 1 else ("bundle", number)
        self._mail.settle(out)
        room = self._mail.buffer(out, bundle.bound(group))

        def send(sizes: Sequence[int]) -> None:
            frames = [buffer[:size] for buffer, size in zip(buffers, sizes, strict=True)]
            packed = frames[0] if len(frames) == 1 else bundle.pack(frames, room)
            self._mail.send(out, packed, 0, tag)

        upload = lines.setdefault(tag, Line(self._mail.lock)).add(requests, send)
        self._mail.watch("up", upload)
        return upload

    def _await_bundle(
        self, edge: int, number: int, group: Sequence[Piece]
    ) -> dict[tuple[int, int], tuple[np.ndarray, Request]]:
        """Return by device and unit the buffers and requests of what an edge sends as one."""
        buffers = [self._mail.buffer(("in up", piece.slot, piece.number), frame.bound(piece.unit)) for piece in group]
        keys = [(piece.device, piece.number) for piece in group]
        tag = self._frames.tag(UP, number, edge)
        if len(group) == 1:
            return {keys[0]: (buffers[0], self._mail.receive(buffers[0], edge, tag))}
        room = self._mail.buffer(("bundle", edge, number), bundle.bound(group))
        sender = f"edge {self.transport.name_of(edge)}"
        whole = bundle.Split(self._mail.receive(room, edge, tag), room, buffers, sender)
        return {key: (buffer, bundle.Part(whole, n)) for n, (key, buffer) in enumerate(zip(keys, buffers, strict=True))}
