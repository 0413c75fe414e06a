"""Arrays of one rank as frames in the mail: packed into slots, posted and sent with tags that no stale message meets.

Who sends what to whom is a topology's business; what a frame holds is the codecs'.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedbench.base.arrays import Arrays, Unit
from fedbench.codec import frame
from fedbench.codec.codecs import RAW
from fedbench.codec.coding import Codec
from fedbench.codec.frame import Note, Place
from fedbench.comm.inbox import Inbox, Waiter
from fedbench.comm.mail import Mail, Slot

DOWN, UP = 0, 1

#: Units of one sender that have tags of their own, and tags that every MPI has (MPI_TAG_UB is at least 32767).
_UNITS, _TAGS = 509, 32764


class Frames:
    """Frames of one rank, move by move; all ranks count the same moves."""

    def __init__(self, waiter: Waiter, mail: Mail, *, lz4: bool) -> None:
        self._waiter = waiter
        self._mail = mail
        self._lz4 = lz4
        self._moves = 0

    def next_move(self) -> None:
        """Begin a move: what is sent from now on has other tags than in the one before."""
        self._moves += 1

    def tag(self, way: int, index: int, slot: int = 0) -> int:
        """Return a tag from direction, parity of the move, unit and sender, so that a stale message meets no receive.

        Messages of one tag between two ranks keep their order, so tags may meet again in very large rounds.
        """
        return (((slot * _UNITS + index) * 2 + self._moves % 2) * 2 + way) % _TAGS

    def pack(
        self, slot: Slot, array: np.ndarray, unit: Unit, place: Place, note: Note, codec: Codec = RAW
    ) -> np.ndarray:
        """Return an array's frame in the buffer of a slot, once what was sent from it before is taken."""
        self._mail.settle(slot)
        channel = slot[1] if slot[0] == "out" else "upload"
        with self._waiter.clock.span("encode", f"{channel}/{unit.name}"):
            out = self._mail.buffer(slot, frame.bound(unit, codec))
            return frame.pack(array, unit, place, codec, note, out, lz4=self._lz4).frame

    def post(self, slot: int, source: int, units: Sequence[Unit], place: Place, sender: str) -> Inbox:
        """Return an inbox with receives posted for all units of the device in `place`, which rank `source` sends."""
        places = [place._replace(unit=index) for index in range(len(units))]
        inbox = Inbox(self._waiter, units, places, [RAW] * len(units), sender)
        for index, unit in enumerate(units):
            buffer = self._mail.buffer(("in up", slot, index), frame.bound(unit))
            inbox.put(index, buffer, self._mail.receive(buffer, source, self.tag(UP, index, slot)))
        return inbox

    def send(
        self,
        slot: int,
        target: int,
        units: Sequence[Unit],
        arrays: Arrays,
        place: Place,
        note: Note,
        links: Sequence[int] = (),
    ) -> None:
        """Send all units of the device in `place` to rank `target`, on the links of some devices."""
        for index, unit in enumerate(units):
            key = ("out up", slot, index)
            packed = self.pack(key, arrays[unit.name], unit, place._replace(unit=index), note)
            self._mail.send(key, packed, target, self.tag(UP, index, slot), links, up=True)
