"""The round loop: plan, compute, combine, apply, exchange by exchange, until all ranks agree to stop.

It knows no metric and no file. What happened in a round is handed to callbacks on rank 0,
which may ask to stop; every rank leaves at the same round.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np

from fedbench.algorithms.base import Round
from fedbench.base.arrays import Arrays, Unit
from fedbench.base.clock import Clock
from fedbench.codec.frame import Note, Place
from fedbench.comm.inbox import Inbox
from fedbench.comm.topology import Topology
from fedbench.models.trainable import Trainable
from fedbench.run.build import Built
from fedbench.run.outcome import Outcome, Sent, Trajectory
from fedbench.run.plans import Plans
from fedbench.run.traffic import Traffic
from fedbench.run.virtual import Virtual


class Observer(Protocol):
    """What rank 0 tells about a run while it goes on."""

    def started(self) -> None:
        """The run is ready and no round has been played in this process."""

    def played(self, outcome: Outcome) -> bool:
        """A round is over; return whether the run has reached its goal."""


def weights_sha256(trainable: Trainable) -> str:
    """Return the hash of all trainable weights, by name order."""
    digest = hashlib.sha256()
    for tensor in sorted(trainable, key=lambda t: t.name):
        digest.update(tensor.name.encode())
        for _, part in tensor.pieces():
            digest.update(tensor.residency.host(part).data)
    return digest.hexdigest()


def arrays_sha256(arrays: Mapping[str, np.ndarray]) -> str:
    """Return what `weights_sha256` returns for the same weights by name."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


class Runner:
    """One rank's part in a run."""

    def __init__(self, built: Built, star: Topology, clock: Clock) -> None:
        self.built = built
        self.star = star
        self.clock = clock
        self.trajectory = Trajectory()
        self.plans = Plans(built, star, clock, self.trajectory)
        self.next_round = 0
        self.reached = False
        if built.cut.residency.kernels == "cpu":  # a GPU's layers end behind our back; only whole spans wait for it
            built.lab.stream.clock = clock
        comm = built.job.config.comm
        edges = comm.edges if comm.topology == "tree" else 0
        self.traffic = Traffic(4 * built.trainable.size, built.algorithm.catch_up, edges)
        self.virtual: Virtual | None = None
        if built.scene is not None:
            self.virtual = Virtual(built.scene, self.traffic, built.job.config.run.train_every)

    def run(self, observers: Sequence[Observer], wants_to_stop: Callable[[], bool]) -> str:
        """Play rounds until the last one, the target or an agreed stop; return `rounds`, `target` or `stopped`."""
        rounds = self.built.job.config.run.rounds
        for observer in observers:
            observer.started()
        self.star.agree([0], "begin the rounds")  # the event that round 0 starts with on every rank
        while not self.reached and self.next_round < rounds:
            outcome = self.play(self.next_round)
            self.next_round += 1
            mine = False
            with self.clock.span("account"):
                for observer in observers:
                    mine |= observer.played(outcome)
            stop, somewhere = self.star.agree([int(wants_to_stop()), int(mine)], "end the round")
            self.reached = bool(somewhere)
            if stop and not self.reached and self.next_round < rounds:
                return "stopped"
        return "target" if self.reached else "rounds"

    def play(self, number: int) -> Outcome:
        """Play one round on this rank."""
        algorithm, virtual = self.built.algorithm, self.virtual
        self.clock.begin(number)
        start, moved = time.perf_counter(), self.star.moved_bytes
        lr = self.built.job.settings.lr_at(number, self.built.job.config.run.rounds)
        outcome = Outcome(number, lr, devices=self.built.sampled(number))
        outcome.begin(outcome.devices if virtual is None else virtual.begin(outcome))
        replayed = algorithm.replay_ops
        algorithm.cloud_loss = math.nan  # of this round: a resumed run doesn't know less than a straight one
        at = Round(number, 0, outcome.present, lr)
        outcome.trained = virtual is None or virtual.trains(at, algorithm)
        if outcome.trained:
            self._train(at, outcome)
            outcome.replay_ops = algorithm.replay_ops - replayed
            if virtual is not None:
                virtual.trained(at, algorithm, whole=outcome.whole)
        elif self.star.is_cloud and virtual is not None:
            with self.clock.span("account"):
                virtual.rehearse(at, algorithm, outcome)
        outcome.query_radius = algorithm.query_radius
        outcome.cloud_loss = algorithm.cloud_loss
        outcome.wire_bytes = self.star.moved_bytes - moved
        outcome.round_s = time.perf_counter() - start
        if self.star.is_cloud:
            with self.clock.span("account"):
                self.trajectory.join(b"round", number.to_bytes(4, "little"), np.float64(outcome.cloud_loss).tobytes())
                self._charge(outcome)
        return outcome

    def _train(self, at: Round, outcome: Outcome) -> None:
        """Play a round's exchanges, with the devices whose answers have counted so far."""
        plan: Arrays = {}
        again = True
        while again:
            at = at._replace(exchange=outcome.exchanges, devices=outcome.in_force)
            outcome.next_exchange()
            again, plan = self._exchange(at, plan, outcome)
            outcome.exchanges += 1

    def _exchange(self, at: Round, plan: Arrays, outcome: Outcome) -> tuple[bool, Arrays]:
        """Play one exchange; return whether another follows, and the plan in force."""
        algorithm, star, clock = self.built.algorithm, self.star, self.clock
        place = Place(at.number, at.exchange, -1, 0)
        sent = self.plans.send(at, place, outcome)
        plan = plan if sent.units is None else sent.units
        inboxes = star.expect(at.devices, partial(algorithm.upload_units, at), place)
        if not star.is_cloud or star.transport.size == 1:
            self._compute(at, plan, place, sent.units)
        if star.is_cloud:
            with clock.span("cloud", "ahead"):
                algorithm.ahead(at)
            sent = sent._replace(ahead_flops=self.built.lab.meter.take())
        came = self._came(at, inboxes, sent, outcome)
        if star.is_cloud:
            self.plans.observe(sent, inboxes)
        if algorithm.uses_devices and not came.devices:
            algorithm.skip(came, plan)
            outcome.whole = False
            return False, plan
        reply, again = None, False
        if star.is_cloud:
            uploads = {device: inboxes[device] for device in came.devices}
            with clock.span("account"):
                for arrays in outcome.take(uploads):
                    self.trajectory.join(*(array.reshape(-1).view(np.uint8).data for array in arrays))
            with clock.span("cloud", "combine"):
                answer = algorithm.combine(came, uploads)
            reply, again = answer.arrays, answer.again
        combine_flops = self.built.lab.meter.take() if star.is_cloud else 0.0
        outcome.cloud_flops += combine_flops
        reply_units = algorithm.reply_units(came)
        reply_bytes, resent = 0, outcome.resent_bytes
        if reply_units:
            plan = self.plans.again(came, plan, place, outcome)
            with clock.span("send", "reply"):
                answered = star.down("reply", reply_units, reply, place, Note(again=again), came.devices)
            again = answered.note.again
            with clock.span("apply"):
                algorithm.apply(came, plan, answered)
            reply_bytes = answered.coded_bytes if star.is_cloud else 0
        resent = outcome.resent_bytes - resent
        outcome.replied(reply_bytes, resent)
        if self.virtual is not None and star.is_cloud:
            self.virtual.combined(combine_flops, reply_bytes, resent)
        return again, plan

    def _came(self, at: Round, inboxes: Mapping[int, Inbox], sent: Sent, outcome: Outcome) -> Round:
        """Return the round with the devices that answered in time, on every rank alike."""
        star, virtual = self.star, self.virtual
        in_time = np.ones(len(at.devices), np.uint8)
        if star.is_cloud:
            star.gather(inboxes)
            with self.clock.span("account"):
                counted = outcome.count(inboxes, sent)
                if virtual is not None:
                    in_time = virtual.answers(at, counted, outcome).astype(np.uint8)
        if virtual is not None and virtual.scene.deadline_s < math.inf and at.devices:
            unit = Unit("in_time", in_time.shape, "|u1")
            made = {unit.name: in_time} if star.is_cloud else None
            told = star.down("in time", [unit], made, Place(at.number, at.exchange, -1, 0), devices=at.devices)
            in_time = np.array(told[unit.name])
        outcome.leave_out(in_time.astype(bool))
        return at._replace(devices=outcome.in_force)

    def _charge(self, outcome: Outcome) -> None:
        """Count what the devices that took part fetched, and close the simulated round."""
        answered = len(outcome.in_force)
        downs = self.traffic.round(
            outcome.number,
            outcome.present,
            outcome.plan_bytes,
            outcome.reply_bytes,
            answered,
            outcome.told_in_time(),
            outcome.resent_bytes,
        )
        by_device = dict(zip(outcome.present, downs, strict=True))
        outcome.down_bytes = [
            by_device.get(device, 0) + resent for device, resent in zip(outcome.devices, outcome.resent, strict=True)
        ]
        if self.virtual is not None:
            self.virtual.end(outcome, self.built.algorithm)

    def _compute(self, at: Round, plan: Arrays, place: Place, sent: Inbox | None) -> None:
        """Let the devices that this rank hosts compute, and send each result while the next one computes.

        They compute on a plan while it is arriving, unless the job says that all of it must be there first.
        """
        meter = self.built.lab.meter
        if sent is not None and not self.built.job.config.comm.overlap:
            sent.complete()
        for device in at.devices:
            if self.star.host_of(device) != self.star.transport.rank:
                continue
            start, waited = time.perf_counter(), self.clock.seconds("wait")
            with self.clock.span("compute", f"device {device}"):
                upload = self.built.algorithm.local(at, device, plan)
            waited = self.clock.seconds("wait") - waited
            link_bit_s = 0.0 if sent is None else sent.waited_bit_s
            note = Note(upload.loss, time.perf_counter() - start - waited, meter.take(), link_bit_s=link_bit_s)
            units = self.built.algorithm.upload_units(at, device)
            with self.clock.span("send", "upload"):
                self.star.report(at.devices, device, units, upload.arrays, place, note)
