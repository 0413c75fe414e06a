"""Plans on their way down: made by the cloud, announced, coded, and what the choice of their codecs learns from them.

It knows no round: the runner says when a plan is due, and what an exchange took.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedbench.algorithms.base import Round
from fedbench.base.arrays import Arrays, Unit
from fedbench.base.clock import Clock
from fedbench.base.errors import WireError
from fedbench.codec.codecs import RAW, by_id
from fedbench.codec.coding import Codec
from fedbench.codec.feedback import PlanCoder
from fedbench.codec.frame import Place
from fedbench.comm.inbox import Inbox
from fedbench.comm.topology import Topology
from fedbench.run.adapt import chooser_of
from fedbench.run.build import Built
from fedbench.run.course import Courses
from fedbench.run.outcome import Outcome, Sent, Trajectory


class _Last(NamedTuple):
    """A plan as it was sent: its units, their codecs and, on the cloud, their values."""

    units: Sequence[Unit]
    made: Arrays | None
    codecs: Sequence[Codec]


class Plans:
    """One rank's part in sending plans."""

    def __init__(self, built: Built, star: Topology, clock: Clock, trajectory: Trajectory) -> None:
        self._built = built
        self._star = star
        self._clock = clock
        self._trajectory = trajectory
        self.chooser = chooser_of(built)
        self._courses = Courses(built)
        self.coder = PlanCoder(built.job.codec, feedback=built.job.config.comm.error_feedback, poll=star.poll)
        self._keeps = built.job.config.comm.guide_reuse == "keep"
        self._last: _Last | None = None
        self._shares: tuple[float, ...] = (1.0,)

    def send(self, at: Round, place: Place, outcome: Outcome) -> Sent:
        """Send the plan of an exchange down, where there is one, and return it as it arrives."""
        algorithm, star = self._built.algorithm, self._star
        outline_units, made, flops = algorithm.outline_units(at), None, 0.0
        if star.is_cloud and (outline_units or algorithm.plan_units(at)):
            with self._clock.span("cloud", "plan"):
                made = algorithm.plan(at)
            flops = self._built.lab.meter.take()
        ahead: list[Inbox] = []
        if outline_units:
            ahead.append(star.down("outline", outline_units, made, place, devices=at.devices))
            algorithm.learn(ahead[0])
        units = algorithm.plan_units(at)
        if not units:
            inbox = self._resent(at, place)
            shares = (1.0,) if inbox is None else self._shares
            return Sent(tuple(ahead), inbox, flops, shares=shares, again=inbox is not None)
        feeds_back = made is not None and self.coder.feedback
        if made is not None and feeds_back:
            with self._clock.span("cloud", "feedback"):
                made = self.coder.prepare(units, made, algorithm.plan_sign(at), algorithm.plan_rows(at))
        codecs = self._codecs(at, units, made, place, outcome, ahead)
        with self._clock.span("send", "plan"):
            inbox = star.down("plan", units, made, place, devices=at.devices, codecs=codecs)
        if feeds_back:
            with self._clock.span("cloud", "feedback"):
                self.coder.settle(inbox)
        course = self._courses.of(at, units)
        total = course.before + course.behind.sum()
        self._last = _Last(units, made, codecs)
        self._shares = (course.before / total, *(course.behind / total).tolist())
        return Sent(tuple(ahead), inbox, flops, shares=self._shares)

    def again(self, at: Round, plan: Arrays, place: Place, outcome: Outcome) -> Arrays:
        """Return the plan in force: sent once more where devices don't keep guides, else the one that they have."""
        inbox = self._resent(at, place)
        if inbox is None:
            return plan
        if self._star.is_cloud:
            outcome.resent_bytes += inbox.coded_bytes
        return inbox

    def _resent(self, at: Round, place: Place) -> Inbox | None:
        """Return the last plan once more, or None where devices keep it or nothing of it is coded with loss."""
        last = self._last
        if self._keeps or last is None or not any(unit.lossy for unit in last.units):
            return None
        with self._clock.span("send", "plan"):
            return self._star.down("plan", last.units, last.made, place, devices=at.devices, codecs=last.codecs)

    def observe(self, sent: Sent, uploads: Mapping[int, Inbox]) -> None:
        """Let an adaptive choice learn from an exchange with a plan, where it rests on that."""
        if self.chooser is not None and sent.units is not None:
            self.chooser.observe([inbox.note for inbox in uploads.values()])

    def _codecs(
        self,
        at: Round,
        units: Sequence[Unit],
        made: Arrays | None,
        place: Place,
        outcome: Outcome,
        ahead: list[Inbox],
    ) -> Sequence[Codec]:
        """Return the codec of each unit of a plan; chosen ones are told to all ranks first, and join the trajectory."""
        if not any(unit.lossy for unit in units):
            return [RAW] * len(units)
        if self.chooser is None:
            return self.coder.codecs(units)
        choice = None
        if made is not None:
            with self._clock.span("cloud", "choose"):
                chosen = self.chooser.choose(at, units, made, self._star.poll)
            choice = {"codecs": np.array([codec.id for codec in chosen], np.uint8)}
            outcome.bits += [(unit.name, codec.bits) for unit, codec in zip(units, chosen, strict=True)]
            self._trajectory.join(b"codecs", choice["codecs"].data)
        told = self._star.down("codecs", [Unit("codecs", (len(units),), "|u1")], choice, place, devices=at.devices)
        ahead.append(told)
        codecs = [by_id(int(number)) for number in told["codecs"]]
        if None in codecs:
            raise WireError(
                f"The cloud chose codecs of numbers {sorted(set(told['codecs'].tolist()))}; some are unknown."
            )
        return [codec for codec in codecs if codec is not None]
