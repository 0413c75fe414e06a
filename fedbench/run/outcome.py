"""What a round was, slot by slot of its sampled devices: what the runner fills in and the callbacks on rank 0 read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fedbench.comm.inbox import Inbox
from fedbench.sim.clock import Times


class Trajectory:
    """The chain h_t = sha256(h_{t-1} | what determined the round), never a time."""

    def __init__(self, digest: bytes = b"") -> None:
        self.digest = digest

    def join(self, *parts: bytes | memoryview) -> None:
        """Append to the chain."""
        chain = hashlib.sha256(self.digest)
        for part in parts:
            chain.update(part)
        self.digest = chain.digest()


class Sent(NamedTuple):
    """The plan of an exchange as it travels, with the messages that go ahead of it; None where there is none.

    The cloud spent `flops` on it, and `ahead_flops` on later plans while devices computed. `shares` are those of a
    device's compute before it reads the plan, and behind each of its units. `again`: it is the last plan once more.
    """

    ahead: tuple[Inbox, ...]
    units: Inbox | None
    flops: float = 0.0
    ahead_flops: float = 0.0
    shares: tuple[float, ...] = (1.0,)
    again: bool = False

    @property
    def unit_bytes(self) -> tuple[int, ...]:
        """Coded bytes of what goes ahead, and then of each unit, in the order in which they travel."""
        return sum(inbox.coded_bytes for inbox in self.ahead), *(() if self.units is None else self.units.unit_bytes)


class Counted(NamedTuple):
    """An exchange before the cloud combined: of each message of the plan coded bytes and the share of a device's compute
    behind it, whether it is the last plan again, the cloud's FLOPs for them and meanwhile, and of each device FLOPs and
    bytes up."""

    unit_bytes: tuple[int, ...]
    shares: tuple[float, ...]
    again: bool
    plan_flops: float
    ahead_flops: float
    flops: tuple[float, ...]
    up_bytes: tuple[int, ...]


@dataclass
class Outcome:
    """What a round was: on rank 0 complete, elsewhere the number and who answered.

    Lists have one entry for each sampled device. `took_part`: it did not drop out; `answered`: nor did it come too late
    in any exchange. `told`: bytes of replies that it got ahead of later exchanges; `resent`: of plans that it got once
    more, the last of them with `owed_bytes`, which no exchange has followed. `whole`: each exchange was combined.
    `times` and `sim_other_s` are those of the virtual clock, where there is one.
    """

    number: int
    lr: float = float("nan")
    exchanges: int = 0
    devices: tuple[int, ...] = ()
    trained: bool = True
    took_part: list[bool] = field(default_factory=list)
    answered: list[bool] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    compute_s: list[float] = field(default_factory=list)
    up_bytes: list[int] = field(default_factory=list)
    down_bytes: list[int] = field(default_factory=list)
    told: list[int] = field(default_factory=list)
    resent: list[int] = field(default_factory=list)
    sim_device_s: list[float] = field(default_factory=list)
    energy_j: list[float] = field(default_factory=list)
    plan_bytes: int = 0
    reply_bytes: int = 0
    resent_bytes: int = 0
    owed_bytes: int = 0
    whole: bool = True
    wire_bytes: int = 0
    cloud_flops: float = 0.0
    cloud_loss: float = float("nan")
    replay_ops: float = 0.0
    scalars: int = 0
    zero_scalars: int = 0
    query_radius: float = float("nan")
    round_s: float = 0.0
    times: Times | None = None
    sim_other_s: float = float("nan")
    bits: list[tuple[str, float]] = field(default_factory=list)

    def begin(self, present: tuple[int, ...]) -> None:
        """Make room for the sampled devices, of which some are present."""
        count, here = len(self.devices), set(present)
        self.took_part = [device in here for device in self.devices]
        self.answered = list(self.took_part)
        self.losses, self.sim_device_s, self.energy_j = ([float("nan")] * count for _ in range(3))
        self.flops, self.compute_s = ([0.0] * count for _ in range(2))
        self.up_bytes, self.down_bytes, self.told, self.resent = ([0] * count for _ in range(4))

    @property
    def in_force(self) -> tuple[int, ...]:
        """The devices whose answers have all counted so far."""
        return tuple(device for device, counts in zip(self.devices, self.answered, strict=True) if counts)

    @property
    def present(self) -> tuple[int, ...]:
        """The devices that took part."""
        return tuple(device for device, here in zip(self.devices, self.took_part, strict=True) if here)

    def slots(self) -> list[int]:
        """Return the slots of the devices in force."""
        return [slot for slot, counts in enumerate(self.answered) if counts]

    def next_exchange(self) -> None:
        """Begin an exchange: the devices in force get the replies so far ahead of its plan."""
        self.owed_bytes = 0
        for slot in self.slots():
            self.told[slot] = self.reply_bytes

    def resend(self, bytes_: int) -> None:
        """Account for a plan that the devices in force got once more."""
        for slot in self.slots():
            self.resent[slot] += bytes_

    def replied(self, reply_bytes: int, resent_bytes: int) -> None:
        """Account for a reply, and for the plan that the update needs once more."""
        self.reply_bytes += reply_bytes
        self.owed_bytes = resent_bytes
        self.resend(resent_bytes)

    def told_in_time(self) -> list[int]:
        """Return of each device that took part the bytes of replies that came already, less what it is owed."""
        slots = (slot for slot, here in enumerate(self.took_part) if here)
        return [self.told[slot] - (self.owed_bytes if self.answered[slot] else 0) for slot in slots]

    def count(self, inboxes: Mapping[int, Inbox], sent: Sent) -> Counted:
        """Account for an exchange up to what the devices in force sent, in their order, and return its counts."""
        for slot, inbox in zip(self.slots(), inboxes.values(), strict=True):
            self.compute_s[slot] += inbox.note.compute_s
        flops = tuple(inbox.note.flops for inbox in inboxes.values())
        up_bytes = tuple(inbox.coded_bytes for inbox in inboxes.values())
        plan = (sent.unit_bytes, sent.shares, sent.again, sent.flops, sent.ahead_flops)
        return self.add(Counted(*plan, flops, up_bytes))

    def add(self, counted: Counted) -> Counted:
        """Add an exchange's counts, those of the devices in force in their order, and return them."""
        for slot, flops, up_bytes in zip(self.slots(), counted.flops, counted.up_bytes, strict=True):
            self.flops[slot] += flops
            self.up_bytes[slot] += up_bytes
        plan_bytes = sum(counted.unit_bytes)
        if counted.again:
            self.resent_bytes += plan_bytes
            self.resend(plan_bytes)
        else:
            self.plan_bytes += plan_bytes
        self.cloud_flops += counted.plan_flops + counted.ahead_flops
        return counted

    def leave_out(self, in_time: np.ndarray) -> None:
        """Take those out of force that came too late: bool [devices in force]."""
        for slot, came in zip(self.slots(), in_time.tolist(), strict=True):
            self.answered[slot] = came

    def take(self, inboxes: Mapping[int, Inbox]) -> list[list[np.ndarray]]:
        """Account for losses and scalars that count, and return each device's arrays, in device order."""
        taken = []
        for slot, inbox in zip(self.slots(), inboxes.values(), strict=True):
            arrays = {name: np.ascontiguousarray(inbox[name]) for name in inbox}
            before = self.losses[slot] if self.exchanges else 0.0
            self.losses[slot] = before + (inbox.note.loss - before) / (self.exchanges + 1)
            scalars = arrays.get("scalars")
            if scalars is not None:
                self.scalars += scalars.size
                self.zero_scalars += int(scalars.size - np.count_nonzero(scalars))
            taken.append(list(arrays.values()))
        return taken
