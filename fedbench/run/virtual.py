"""The virtual clock's side of a round: who takes part, who answers in time, and rounds that are timed and not played.

It turns counted FLOPs and bytes into the loads of `sim`, on the job's topology and beside it on the other one. It moves
no message and changes no weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fedbench.algorithms.base import Algorithm, Round
from fedbench.run.outcome import Counted, Outcome
from fedbench.run.traffic import Traffic
from fedbench.sim.clock import Load, RoundClock
from fedbench.sim.scene import Scene


class _Exchange(NamedTuple):
    """What an exchange of a trained round took: coded bytes of each message of the plan and the share of a device's compute
    behind it, whether it was the last plan again, a device's mean FLOPs and bytes up, the cloud's FLOPs for the plan,
    meanwhile and to combine, and the bytes of the plan that the update needed again."""

    unit_bytes: tuple[int, ...]
    shares: tuple[float, ...]
    again: bool
    flops: float
    up_bytes: int
    plan_flops: float
    ahead_flops: float
    combine_flops: float = 0.0
    resent_bytes: int = 0


class _Played(NamedTuple):
    """A trained round, all of whose exchanges were combined, and replayed directions for each device that answered."""

    exchanges: list[_Exchange]
    replay_ops: float


class Virtual:
    """One rank's view of the simulation; the cloud alone adds up times.

    Timed rounds with new plans count as the last trained round with one, the others as the last without.
    """

    def __init__(self, scene: Scene, traffic: Traffic, train_every: int) -> None:
        self.scene = scene
        #: Of which kinds, without (0) and with a new plan (1), a whole round was trained; the same on every rank.
        self.known: frozenset[int] = frozenset()
        self._traffic = traffic
        self._train_every = train_every
        self._clocks: tuple[RoundClock, ...] = ()
        self._ahead_bytes = 0
        self._exchanges: list[_Exchange] = []
        self._played: dict[int, _Played] = {}

    def trains(self, at: Round, algorithm: Algorithm) -> bool:
        """Return whether a round is played and not only timed: when it is due, or no whole round of its kind has been."""
        return at.number % self._train_every == 0 or _kind(at, algorithm) not in self.known

    def trained(self, at: Round, algorithm: Algorithm, *, whole: bool) -> None:
        """Remember on every rank that a round was trained, where the others can be timed like it."""
        if whole:
            self.known |= {_kind(at, algorithm)}

    def begin(self, outcome: Outcome) -> tuple[int, ...]:
        """Start a round; return its devices that have not dropped out."""
        other = self.scene._replace(tree=not self.scene.tree)
        self._clocks = tuple(RoundClock(scene, outcome.number) for scene in (self.scene, other))
        self._ahead_bytes = 0
        self._exchanges = []
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
            reply_bytes=float(self._ahead_bytes),
            flops=np.array(counted.flops, np.float64),
            up_bytes=np.array(counted.up_bytes, np.float64),
        )
        devices = np.asarray(at.devices, np.int64)
        drawn = self._clocks[0].draw(devices)
        answer, _ = (clock.play(devices, load, drawn) for clock in self._clocks)
        for slot, seconds in zip(outcome.slots(), answer.tolist(), strict=True):
            outcome.sim_device_s[slot] = seconds
        flops, up_bytes = (float(np.mean(own)) if own else 0.0 for own in (counted.flops, counted.up_bytes))
        plan = (counted.unit_bytes, counted.shares, counted.again)
        self._exchanges.append(_Exchange(*plan, flops, round(up_bytes), counted.plan_flops, counted.ahead_flops))
        return np.asarray(answer <= self.scene.deadline_s)

    def combined(self, flops: float, reply_bytes: int, resent_bytes: int) -> None:
        """Let the cloud combine; its reply, and the plan once more, go ahead of the next exchange."""
        for clock in self._clocks:
            clock.cloud(flops)
        self._ahead_bytes = reply_bytes + resent_bytes
        self._exchanges[-1] = self._exchanges[-1]._replace(combine_flops=flops, resent_bytes=resent_bytes)

    def end(self, outcome: Outcome, algorithm: Algorithm) -> None:
        """Write the round's times and its devices' energy into the outcome, whose bytes are complete."""
        nobody = algorithm.uses_devices and not outcome.present
        times, other = (clock.end(nobody=nobody) for clock in self._clocks)
        outcome.times, outcome.sim_other_s = times, other.total
        for slot, here in enumerate(outcome.took_part):
            if here:
                moved = outcome.up_bytes[slot] + outcome.down_bytes[slot]
                outcome.energy_j[slot] = self.scene.joules(outcome.flops[slot], moved)
        if outcome.trained and outcome.whole:
            kind = _kind(Round(outcome.number, 0, outcome.devices, outcome.lr), algorithm)
            self._played[kind] = _Played(self._exchanges, outcome.replay_ops / max(1, len(outcome.in_force)))

    def rehearse(self, at: Round, algorithm: Algorithm, outcome: Outcome) -> None:
        """Time a round as the last trained one of its kind was counted, on this round's devices; nothing is computed."""
        played = self._played[_kind(at, algorithm)]
        for exchange, kept in enumerate(played.exchanges):
            at = at._replace(exchange=exchange)
            count = len(at.devices)
            outcome.next_exchange()
            flops, up_bytes = (kept.flops,) * count, (kept.up_bytes,) * count
            plan = (kept.unit_bytes, kept.shares, kept.again, kept.plan_flops, kept.ahead_flops)
            counted = outcome.add(Counted(*plan, flops, up_bytes))
            outcome.leave_out(self.answers(at, counted, outcome))
            at = at._replace(devices=outcome.in_force)
            outcome.exchanges += 1
            if algorithm.uses_devices and not at.devices:
                break
            reply = sum(unit.raw_bytes for unit in algorithm.reply_units(at))
            outcome.cloud_flops += kept.combine_flops
            outcome.resent_bytes += kept.resent_bytes
            outcome.replied(reply, kept.resent_bytes)
            self.combined(kept.combine_flops, reply, kept.resent_bytes)
        outcome.replay_ops = played.replay_ops * len(outcome.in_force)

    def state(self) -> dict[str, Any]:
        """Return the counts of the last trained rounds as a tree that JSON can hold."""
        return {str(kind): [list(map(list, kept.exchanges)), kept.replay_ops] for kind, kept in self._played.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        self._played = {
            int(kind): _Played([_Exchange(tuple(b), tuple(s), *more) for b, s, *more in exchanges], replay_ops)
            for kind, (exchanges, replay_ops) in state.items()
        }
        self.known = frozenset(self._played)


def _kind(at: Round, algorithm: Algorithm) -> int:
    """Return 1 for a round with a new plan, else 0."""
    return int(bool(algorithm.plan_units(at._replace(exchange=0))))
