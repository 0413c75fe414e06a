"""What a run may ask of a topology, and which one its job wants: who sends what to whom in an exchange.

Three moves make an exchange: the cloud sends units down to all ranks, devices send units up, the cloud takes them in
device order. A topology knows no method, and all of them give a run the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from fedbench.base.arrays import Arrays, Unit
from fedbench.base.clock import Clock
from fedbench.codec.coding import Codec
from fedbench.codec.frame import NO_NOTE, Note, Place
from fedbench.comm.base import Request, Transport
from fedbench.comm.inbox import Inbox

#: What a device sends.
UnitsOf = Callable[[int], Sequence[Unit]]


class Topology(Protocol):
    """Exchanges of checked frames between the cloud and the ranks that host devices, whatever lies between them.

    All ranks call `down`, `expect`, `gather_from_ranks` and `agree` in the same order with the same units.
    """

    transport: Transport
    clock: Clock

    @property
    def is_cloud(self) -> bool:
        """Whether this rank is the cloud."""

    @property
    def peers(self) -> Sequence[int]:
        """Ranks that host devices."""

    @property
    def moved_bytes(self) -> int:
        """Bytes that the cloud knows to have been moved between any two ranks, headers included, each message once."""

    def host_of(self, device: int) -> int:
        """Return the rank that hosts a device."""

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

        It travels on the links of `devices`, each unit in its codec (all raw by default), which all ranks know. What was
        received stays valid until the next message of the same channel.
        """

    def expect(self, devices: Sequence[int], units: UnitsOf, place: Place) -> dict[int, Inbox]:
        """Return an inbox per sampled device, receives posted; empty on ranks other than the cloud."""

    def report(
        self, devices: Sequence[int], device: int, units: Sequence[Unit], arrays: Arrays, place: Place, note: Note
    ) -> None:
        """Start sending a hosted device's units to the cloud; `expect` was called before on this rank."""

    def gather(self, inboxes: Mapping[int, Inbox]) -> None:
        """Wait, as a span of `upload`, until all devices' units are here; past the deadline WireError names who is missing."""

    def gather_from_ranks(self, units: Sequence[Unit], arrays: Arrays, place: Place, note: Note) -> dict[int, Inbox]:
        """Return on rank 0 what every other rank sends of itself (its rank stands as device), elsewhere nothing."""

    def agree(self, values: Sequence[int], what: str) -> list[int]:
        """Return the element-wise maximum of a few integers over all ranks."""

    def release(self, channel: str) -> None:
        """Give back the memory of a channel that is not used again soon."""

    def poll(self) -> None:
        """Move messages from within a computation, without waiting; cheap enough for every tile."""

    def wait(self, requests: Sequence[Request], what: str, unit: str = "") -> None:
        """Wait for requests as a span of `unit`; past the deadline WireError says who waits for `what`."""

    def finish(self) -> None:
        """Complete every message; WireError if one never met another."""
