"""The round loop: plan, compute, combine, apply, exchange by exchange, until all ranks agree to stop.

It knows no metric and no file. What happened in a round is handed to callbacks on rank 0,
which may ask to stop; every rank leaves at the same round.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from fedbench.algorithms.base import Round
from fedbench.base.arrays import Arrays, Unit
from fedbench.base.clock import Clock
from fedbench.base.errors import WireError
from fedbench.codec.codecs import by_id
from fedbench.codec.coding import Codec
from fedbench.codec.feedback import PlanCoder
from fedbench.codec.frame import Note, Place
from fedbench.comm.inbox import Inbox
from fedbench.comm.topology import Topology
from fedbench.models.trainable import Trainable
from fedbench.run.adapt import chooser_of
from fedbench.run.build import Built


@dataclass
class Outcome:
    """What a round was: on rank 0 complete, elsewhere the number alone."""

    number: int
    lr: float = float("nan")
    exchanges: int = 0
    devices: tuple[int, ...] = ()
    losses: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    compute_s: list[float] = field(default_factory=list)
    up_bytes: list[int] = field(default_factory=list)
    plan_bytes: int = 0
    resent_bytes: int = 0
    reply_bytes: int = 0
    wire_bytes: int = 0
    cloud_flops: float = 0.0
    cloud_loss: float = float("nan")
    replay_ops: float = 0.0
    scalars: int = 0
    zero_scalars: int = 0
    query_radius: float = float("nan")
    round_s: float = 0.0
    bits: list[tuple[str, float]] = field(default_factory=list)


class Observer(Protocol):
    """What rank 0 tells about a run while it goes on."""

    def started(self) -> None:
        """The run is ready and no round has been played in this process."""

    def played(self, outcome: Outcome) -> bool:
        """A round is over; return whether the run has reached its goal."""


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


def weights_sha256(trainable: Trainable) -> str:
    """Return the hash of all trainable weights, by name order."""
    digest = hashlib.sha256()
    for tensor in sorted(trainable, key=lambda t: t.name):
        digest.update(tensor.name.encode())
        for _, part in tensor.pieces():
            digest.update(tensor.residency.host(part).data)
    return digest.hexdigest()


class _Sent(NamedTuple):
    """A plan as it was sent: its units, their codecs and, on the cloud, their values."""

    units: Sequence[Unit]
    made: Arrays | None
    codecs: Sequence[Codec]


class Runner:
    """One rank's part in a run."""

    def __init__(self, built: Built, star: Topology, clock: Clock) -> None:
        self.built = built
        self.star = star
        self.clock = clock
        self.trajectory = Trajectory()
        self.chooser = chooser_of(built)
        self.coder = PlanCoder(built.job.codec, feedback=built.job.config.comm.error_feedback)
        self.next_round = 0
        self._keeps = built.job.config.comm.guide_reuse == "keep"
        self._sent: _Sent | None = None

    def run(self, observers: Sequence[Observer], wants_to_stop: Callable[[], bool]) -> str:
        """Play rounds until the last one, the target or an agreed stop; return `rounds`, `target` or `stopped`."""
        rounds = self.built.job.config.run.rounds
        for observer in observers:
            observer.started()
        while self.next_round < rounds:
            outcome = self.play(self.next_round)
            self.next_round += 1
            reached = False
            for observer in observers:
                reached |= observer.played(outcome)
            stop, reached_somewhere = self.star.agree([int(wants_to_stop()), int(reached)], "end the round")
            if reached_somewhere:
                return "target"
            if stop and self.next_round < rounds:
                return "stopped"
        return "rounds"

    def play(self, number: int) -> Outcome:
        """Play one round on this rank."""
        algorithm, devices = self.built.algorithm, self.built.sampled(number)
        self.clock.begin(number)
        start, moved = time.perf_counter(), self.star.moved_bytes
        lr = self.built.job.settings.lr_at(number, self.built.job.config.run.rounds)
        outcome = Outcome(number, lr, devices=devices)
        replayed = algorithm.replay_ops
        algorithm.cloud_loss = float(
            "nan"
        )  # of this round, so that a resumed run doesn't know less than a straight one
        plan: Arrays = {}
        again = True
        while again:
            at = Round(number, outcome.exchanges, devices, lr)
            again, plan = self._exchange(at, plan, outcome)
            outcome.exchanges += 1
        outcome.replay_ops = algorithm.replay_ops - replayed
        outcome.query_radius = algorithm.query_radius
        outcome.cloud_loss = algorithm.cloud_loss
        outcome.wire_bytes = self.star.moved_bytes - moved
        outcome.round_s = time.perf_counter() - start
        if self.star.is_cloud:
            self.trajectory.join(b"round", number.to_bytes(4, "little"), np.float64(outcome.cloud_loss).tobytes())
        return outcome

    def _exchange(self, at: Round, plan: Arrays, outcome: Outcome) -> tuple[bool, Arrays]:
        """Play one exchange; return whether another follows, and the plan in force."""
        algorithm, star, clock = self.built.algorithm, self.star, self.clock
        place = Place(at.number, at.exchange, -1, 0)
        start = time.perf_counter()
        inbox = self._plan(at, place, outcome)
        plan = inbox if inbox is not None else self._again(at, plan, place, outcome)
        inboxes = star.expect(at.devices, partial(algorithm.upload_units, at), place)
        if not star.is_cloud or star.transport.size == 1:
            self._compute(at, plan, place)
        if star.is_cloud:
            with clock.span("cloud"):
                algorithm.ahead(at)
        reply, again = None, False
        if star.is_cloud:
            star.gather(inboxes)
            self._take(inboxes, outcome)
            if inbox is not None:
                outcome.plan_bytes += inbox.coded_bytes
                self._observe(inbox, inboxes, time.perf_counter() - start)
            with clock.span("cloud"):
                answer = algorithm.combine(at, inboxes)
            outcome.cloud_flops += self.built.lab.meter.take()
            reply, again = answer.arrays, answer.again
        reply_units = algorithm.reply_units(at)
        if not reply_units:
            return again, plan
        plan = self._again(at, plan, place, outcome)
        answered = star.down("reply", reply_units, reply, place, Note(again=again), at.devices)
        again = answered.note.again
        with clock.span("apply"):
            algorithm.apply(at, plan, answered)
        if star.is_cloud:
            outcome.reply_bytes += answered.coded_bytes
        return again, plan

    def _plan(self, at: Round, place: Place, outcome: Outcome) -> Inbox | None:
        """Send the plan of an exchange down, where there is one, and return it as it arrives."""
        algorithm, star = self.built.algorithm, self.star
        outline_units, made = algorithm.outline_units(at), None
        if star.is_cloud and (outline_units or algorithm.plan_units(at)):
            with self.clock.span("cloud"):
                made = algorithm.plan(at)
            outcome.cloud_flops += self.built.lab.meter.take()
        if outline_units:
            outline = star.down("outline", outline_units, made, place, devices=at.devices)
            algorithm.learn(outline)
            outcome.plan_bytes += outline.coded_bytes if star.is_cloud else 0
        plan_units = algorithm.plan_units(at)
        if not plan_units:
            return None
        if made is not None:
            made = self.coder.prepare(plan_units, made, algorithm.plan_sign(at))
        codecs = self._codecs(at, plan_units, made, place, outcome)
        inbox = star.down("plan", plan_units, made, place, devices=at.devices, codecs=codecs)
        self.coder.settle(inbox)
        self._sent = _Sent(plan_units, made, codecs)
        return inbox

    def _again(self, at: Round, plan: Arrays, place: Place, outcome: Outcome) -> Arrays:
        """Return the plan in force: sent once more where devices don't keep guides, else the one that they have."""
        sent = self._sent
        if self._keeps or sent is None or not any(unit.lossy for unit in sent.units):
            return plan
        inbox = self.star.down("plan", sent.units, sent.made, place, devices=at.devices, codecs=sent.codecs)
        if self.star.is_cloud:
            outcome.resent_bytes += inbox.coded_bytes
        return inbox

    def _codecs(
        self, at: Round, units: Sequence[Unit], made: Arrays | None, place: Place, outcome: Outcome
    ) -> Sequence[Codec]:
        """Return the codec of each unit of a plan; chosen ones are told to all ranks first, and join the trajectory."""
        if self.chooser is None or not any(unit.lossy for unit in units):
            return self.coder.codecs(units)
        choice = None
        if made is not None:
            with self.clock.span("cloud"):
                chosen = self.chooser.choose(at, units, made)
            choice = {"codecs": np.array([codec.id for codec in chosen], np.uint8)}
            outcome.bits += [(unit.name, codec.bits) for unit, codec in zip(units, chosen, strict=True)]
            self.trajectory.join(b"codecs", choice["codecs"].data)
        told = self.star.down("codecs", [Unit("codecs", (len(units),), "|u1")], choice, place, devices=at.devices)
        if made is not None:
            outcome.plan_bytes += told.coded_bytes
        codecs = [by_id(int(number)) for number in told["codecs"]]
        if None in codecs:
            raise WireError(
                f"The cloud chose codecs of numbers {sorted(set(told['codecs'].tolist()))}; some are unknown."
            )
        return [codec for codec in codecs if codec is not None]

    def _observe(self, plan: Inbox, uploads: Mapping[int, Inbox], exchange_s: float) -> None:
        """Let an adaptive choice learn how long an exchange with a plan took, where it rests on that."""
        if self.chooser is not None:
            notes = [inbox.note for inbox in uploads.values()]
            self.chooser.rates.observe(
                plan.coded_bytes, exchange_s, [note.compute_s for note in notes], [note.flops for note in notes]
            )

    def _compute(self, at: Round, plan: Arrays, place: Place) -> None:
        """Let the devices that this rank hosts compute, and send each result while the next one computes."""
        meter = self.built.lab.meter
        for device in at.devices:
            if self.star.host_of(device) != self.star.transport.rank:
                continue
            start, waited = time.perf_counter(), self.clock.seconds("wait")
            with self.clock.span("compute"):
                upload = self.built.algorithm.local(at, device, plan)
            waited = self.clock.seconds("wait") - waited
            note = Note(upload.loss, time.perf_counter() - start - waited, meter.take())
            units = self.built.algorithm.upload_units(at, device)
            self.star.report(at.devices, device, units, upload.arrays, place, note)

    def _take(self, inboxes: Mapping[int, Inbox], outcome: Outcome) -> None:
        """Account for what the devices sent, in device order, and join it to the trajectory."""
        first = outcome.exchanges == 0
        for slot, inbox in enumerate(inboxes.values()):
            arrays = {name: np.ascontiguousarray(inbox[name]) for name in inbox}
            self.trajectory.join(*(array.reshape(-1).view(np.uint8).data for array in arrays.values()))
            note = inbox.note
            if first:
                for column in (outcome.losses, outcome.flops, outcome.compute_s):
                    column.append(0.0)
                outcome.up_bytes.append(0)
            outcome.losses[slot] += (note.loss - outcome.losses[slot]) / (outcome.exchanges + 1)
            outcome.flops[slot] += note.flops
            outcome.compute_s[slot] += note.compute_s
            outcome.up_bytes[slot] += inbox.coded_bytes
            scalars = arrays.get("scalars")
            if scalars is not None:
                outcome.scalars += scalars.size
                outcome.zero_scalars += int(scalars.size - np.count_nonzero(scalars))
