"""The virtual clock's side of a round: who takes part, who answers in time, and rounds that are timed and not played.

It turns counted FLOPs and bytes into the loads of `sim`, on the job's topology and beside it on the other one. It moves
no message and changes no weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedbench.algorithms.base import Algorithm, Round
from fedbench.run.callbacks.traffic import Traffic
from fedbench.run.outcome import Counted, Outcome
from fedbench.sim.clock import Load, RoundClock
from fedbench.sim.scene import Scene


class Virtual:
    """One rank's view of the simulation; the cloud alone adds up times."""

    def __init__(self, scene: Scene, traffic: Traffic, train_every: int) -> None:
        self.scene = scene
        self._traffic = traffic
        self._train_every = train_every
        self._clocks: tuple[RoundClock, ...] = ()
        self._reply_bytes = 0
        #: Of each exchange of the last trained round: unit bytes and shares, FLOPs of the plan and meanwhile, a device's
        #: mean FLOPs and bytes up, FLOPs of combining.
        self._played: list[list[Any]] = []

    def trains(self, number: int) -> bool:
        """Return whether a round is played and not only timed."""
        return number % self._train_every == 0

    def begin(self, outcome: Outcome) -> tuple[int, ...]:
        """Start a round; return its devices that have not dropped out."""
        other = self.scene._replace(tree=not self.scene.tree)
        self._clocks = tuple(RoundClock(scene, outcome.number) for scene in (self.scene, other))
        self._reply_bytes = 0
        return self.scene.present(outcome.number, outcome.devices)

    def answers(self, at: Round, counted: Counted, outcome: Outcome) -> np.ndarray:
        """Let an exchange with the devices of `at` pass; return which answered in time (bool [n])."""
        missed = [self._traffic.ahead(d, at.number) if at.exchange == 0 else 0 for d in at.devices]
        load = Load(
            plan_flops=counted.plan_flops,
            ahead_flops=counted.ahead_flops,
            unit_bytes=np.array(counted.unit_bytes, np.float64),
            shares=np.array(counted.shares, np.float64),
            missed_bytes=np.array(missed, np.float64),
            reply_bytes=float(self._reply_bytes),
            flops=np.array(counted.flops, np.float64),
            up_bytes=np.array(counted.up_bytes, np.float64),
        )
        answer, _ = (clock.play(np.asarray(at.devices, np.int64), load) for clock in self._clocks)
        for slot, seconds in zip(outcome.slots(), answer.tolist(), strict=True):
            outcome.sim_device_s[slot] = seconds
        if self.trains(at.number):
            self._played = self._played[: at.exchange]
            means = [float(np.mean(own)) if own else 0.0 for own in (counted.flops, counted.up_bytes)]
            plan = [list(counted.unit_bytes), list(counted.shares)]
            self._played.append([*plan, counted.plan_flops, counted.ahead_flops, *means, 0.0])
        return np.asarray(answer <= self.scene.deadline_s)

    def combined(self, number: int, flops: float, reply_bytes: int) -> None:
        """Let the cloud combine; its reply goes ahead of the next exchange."""
        for clock in self._clocks:
            clock.cloud(flops)
        self._reply_bytes = reply_bytes
        if self.trains(number):
            self._played[-1][-1] = flops

    def end(self, outcome: Outcome, *, needs_devices: bool) -> None:
        """Write the round's times and its devices' energy into the outcome, whose bytes are complete."""
        nobody = needs_devices and not outcome.present
        times, other = (clock.end(nobody=nobody) for clock in self._clocks)
        outcome.times, outcome.sim_other_s = times, other.total
        for slot, here in enumerate(outcome.took_part):
            if here:
                moved = outcome.up_bytes[slot] + outcome.down_bytes[slot]
                outcome.energy_j[slot] = self.scene.joules(outcome.flops[slot], moved)

    def rehearse(self, at: Round, algorithm: Algorithm, outcome: Outcome) -> None:
        """Time a round as the last trained one was counted, on this round's devices; nothing is computed or sent."""
        for exchange, kept in enumerate(self._played):
            unit_bytes, shares, plan_flops, ahead_flops, flops, up_bytes, combine_flops = kept
            at = at._replace(exchange=exchange)
            planned = bool(algorithm.plan_units(at))
            plan = (tuple(unit_bytes), tuple(shares)) if planned else ((0,), (1.0,))
            count, spent = len(at.devices), plan_flops if planned else 0.0
            outcome.told_bytes = outcome.reply_bytes
            counted = Counted(*plan, spent, ahead_flops, (flops,) * count, (round(up_bytes),) * count)
            for slot in outcome.slots():
                outcome.flops[slot] += flops
                outcome.up_bytes[slot] += round(up_bytes)
            outcome.leave_out(self.answers(at, counted, outcome))
            at = at._replace(devices=outcome.in_force)
            outcome.exchanges += 1
            outcome.plan_bytes += sum(plan[0])
            outcome.cloud_flops += spent + ahead_flops
            if algorithm.uses_devices and not at.devices:
                break
            reply = sum(unit.raw_bytes for unit in algorithm.reply_units(at))
            self.combined(at.number, combine_flops, reply)
            outcome.cloud_flops += combine_flops
            outcome.reply_bytes += reply

    def state(self) -> list[list[Any]]:
        """Return the counts of the last trained round as a tree that JSON can hold."""
        return self._played

    def restore(self, state: list[list[Any]]) -> None:
        """Take back what `state` returned."""
        self._played = [list(exchange) for exchange in state]
