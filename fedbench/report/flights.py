"""Messages of one round on their way, from the spans of sender and receiver; both told since the round's agreed start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedbench.base.lanes import Lane

#: What travels, in the order of a round: how the units of each begin in spans.
CHANNELS = ("plan", "upload", "reply")

#: Lanes agree on the start of a round within this (seconds), so a message may seem to be taken that early.
_LOOSE_S = 0.005


class Flight(NamedTuple):
    """A message: channel, when it was coded and when its receiver began to decode it, seconds since the round's start."""

    channel: str
    left_s: float
    taken_s: float


def flights(cloud: Lane, devices: Sequence[Lane]) -> list[Flight]:
    """Return the messages between the cloud and the ranks drawn; what goes to all of them counts until the last has it."""
    found: list[Flight] = []
    for channel in CHANNELS:
        pairs = [(lane, cloud) if channel == "upload" else (cloud, lane) for lane in devices]
        latest: dict[tuple[str, int], Flight] = {}
        for number, (sender, receiver) in enumerate(pairs):
            for i, (unit, left, taken) in enumerate(_met(channel, sender, receiver)):
                key = (unit, i + number * len(sender.kind)) if channel == "upload" else (unit, i)
                flight = Flight(channel, left, max(left, taken))
                latest[key] = max(flight, latest.get(key, flight), key=lambda f: f.taken_s)
        found.extend(latest.values())
    return found


def _met(channel: str, sender: Lane, receiver: Lane) -> list[tuple[str, float, float]]:
    """Return unit, end of coding and start of decoding of each message that the receiver took."""
    units, ends = _of(sender, "encode", channel, sender.end_s)
    taken_units, starts = _of(receiver, "decode", channel, receiver.start_s)
    met = []
    for unit, end in zip(units.tolist(), ends.tolist(), strict=True):
        later = starts[(taken_units == unit) & (starts >= end - _LOOSE_S)]
        if len(later):
            met.append((unit, end, float(later.min())))
    return met


def _of(lane: Lane, kind: str, channel: str, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    own = (lane.kind == kind) & np.char.startswith(lane.unit, f"{channel}/")
    return lane.unit[own], at[own]
