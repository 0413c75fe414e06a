"""The virtual clock's side of a round: who takes part, who answers in time, and rounds that are timed and not played.

It turns counted FLOPs and bytes into the loads of `sim`, on the job's topology and beside it on the other one. It moves
no message and changes no weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fedbench.algorithms.base import Algorithm, Round
from fedbench.base.arrays import Unit
from fedbench.run.callbacks.traffic import Traffic
from fedbench.run.outcome import Outcome
from fedbench.sim.clock import Load, RoundClock, Times
from fedbench.sim.scene import Scene


@dataclass(frozen=True)
class Counts:
    """One exchange as the last trained round counted it: per device, but for the cloud's FLOPs."""

    unit_bytes: tuple[int, ...] = ()
    flops: float = 0.0
    up_bytes: float = 0.0
    plan_flops: float = 0.0
    combine_flops: float = 0.0


class Virtual:
    """One rank's view of the simulation; the cloud alone adds up times."""

    def __init__(self, scene: Scene, traffic: Traffic, train_every: int) -> None:
        self.scene = scene
        self._traffic = traffic
        self._train_every = train_every
        self._counts: list[Counts] = []
        self._clocks: tuple[RoundClock, ...] = ()
        self._reply_bytes = 0

    def trains(self, number: int) -> bool:
        """Return whether a round is played and not only timed."""
        return number % self._train_every == 0

    def begin(self, number: int) -> None:
        """Start a round on the cloud: on the job's topology, and on the other one beside it."""
        other = self.scene._replace(tree=not self.scene.tree)
        self._clocks = (RoundClock(self.scene, number), RoundClock(other, number))
        self._reply_bytes = 0

    def exchange(self, at: Round, counted: Counts, slots: Sequence[int], outcome: Outcome) -> np.ndarray:
        """Let an exchange with the devices of `at` pass; return which of them answered in time (bool [n]).

        `outcome` has what each device of a slot counted in this exchange.
        """
        if at.exchange == 0 and self.trains(at.number):
            self._counts = []
        devices = np.asarray(at.devices, np.int64)
        missed = [float(self._traffic.ahead(d, at.number)) if at.exchange == 0 else 0.0 for d in at.devices]
        load = Load(
            plan_flops=counted.plan_flops,
            unit_bytes=np.array(counted.unit_bytes, np.float64),
            missed_bytes=np.array(missed),
            reply_bytes=float(self._reply_bytes),
            flops=np.array([outcome.exchange_flops[slot] for slot in slots]),
            up_bytes=np.array([float(outcome.exchange_up_bytes[slot]) for slot in slots]),
        )
        answers = [clock.play(devices, load) for clock in self._clocks][0]
        for slot, seconds in zip(slots, answers, strict=True):
            outcome.sim_device_s[slot] = float(seconds)
        if self.trains(at.number):
            kept = self._counts[at.exchange : at.exchange + 1]
            assert not kept
            self._counts.append(counted)
        return np.asarray(answers <= self.scene.deadline_s)

    def combined(self, flops: float, reply_bytes: int) -> None:
        """Let the cloud combine; its reply goes ahead of the next exchange."""
        for clock in self._clocks:
            clock.cloud(flops)
        self._reply_bytes = reply_bytes
        self._counts[-1:] = [replace(c, combine_flops=flops) for c in self._counts[-1:]]
