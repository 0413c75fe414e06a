"""The virtual clock of a round: simulated seconds from counted FLOPs and exact bytes, never from a real clock.

An exchange goes down from the cloud (through edges in a tree) to the devices, which compute behind arriving units and
send up. Everybody starts at once and shares fairly what is shared. What is in the messages is nobody's business here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fedbench.sim import pipeline
from fedbench.sim.scene import Scene


@dataclass(frozen=True)
class Load:
    """What an exchange asks of n devices, and of the cloud before they compute and meanwhile.

    `unit_bytes` [units]: the plan's units in the order in which they travel and are needed, at least one (of 0 bytes
    where there is no plan); `shares` [units]: those of a device's FLOPs that are spent behind each. `missed_bytes` [n]:
    what a device fetches first, from the history that its server keeps. `reply_bytes`: the last exchange's reply, from
    the cloud.
    """

    plan_flops: float
    unit_bytes: np.ndarray
    shares: np.ndarray
    missed_bytes: np.ndarray
    reply_bytes: float
    flops: np.ndarray
    up_bytes: np.ndarray
    ahead_flops: float = 0.0


class Times(NamedTuple):
    """A round in seconds. Of the cloud and of the last device to answer: busy time by stage, which overlap; `wait` is
    for a deadline; no schedule beats `bound`."""

    total: float = 0.0
    cloud: float = 0.0
    trunk: float = 0.0
    link: float = 0.0
    compute: float = 0.0
    wait: float = 0.0
    bound: float = 0.0

    def plus(self, **more: float) -> Times:
        """Return the times with some of them increased."""
        return self._replace(**{name: getattr(self, name) + value for name, value in more.items()})


class _Paths(NamedTuple):
    """How n devices are reached in an exchange: own rates and shares of their server's link (byte/s), edge of each."""

    down: np.ndarray
    up: np.ndarray
    share: np.ndarray
    edge: np.ndarray
    trunk: float

    def seconds(self, own: np.ndarray, bytes_: np.ndarray | float) -> np.ndarray:
        """Return the time of some bytes over a device's own link and its share of the server's."""
        return np.asarray(bytes_ / np.minimum(own, self.share))


class Drawn(NamedTuple):
    """What the key says of n devices in an exchange: FLOP/s, own rates down and up (byte/s), latencies both ways (s)."""

    speeds: np.ndarray
    down: np.ndarray
    up: np.ndarray
    lag_down: np.ndarray
    lag_up: np.ndarray


@dataclass
class RoundClock:
    """One round on a scene; `now` is the cloud's time since its start."""

    scene: Scene
    round: int
    now: float = 0.0
    exchange: int = 0
    times: Times = field(default_factory=Times)

    def draw(self, devices: np.ndarray) -> Drawn:
        """Return what is drawn of the devices of the next exchange, on any topology."""
        scene = self.scene
        lags = (scene.latency(self.round, self.exchange, devices, up=up) for up in (False, True))
        return Drawn(scene.speeds(devices), *scene.rates(devices), *lags)

    def play(self, devices: np.ndarray, load: Load, drawn: Drawn) -> np.ndarray:
        """Let an exchange take place; return when each device answered, in seconds since its start (float64 [n]).

        A device that answers after the deadline is left out: the cloud goes on at the deadline. `now` is then the time
        at which the cloud has all answers.
        """
        began, scene = self.now, self.scene
        self.cloud(load.plan_flops)
        if not devices.size:
            self.cloud(load.ahead_flops)
            return np.empty(0)
        paths, lag = _paths(scene, devices, drawn), drawn.lag_down
        units, whole = load.unit_bytes, float(load.unit_bytes.sum())
        compute = load.flops / drawn.speeds
        hop = scene.trunk_latency_s if scene.tree else 0.0
        free = began + load.reply_bytes / paths.trunk
        ready = [x + hop for x in pipeline.crossed(free, [self.now] * units.size, list(units / paths.trunk))]
        first = (
            free + (hop if load.reply_bytes else 0.0) + paths.seconds(paths.down, load.missed_bytes + load.reply_bytes)
        )
        arrived = pipeline.crossed(first, ready, [paths.seconds(paths.down, u) for u in units])
        done = pipeline.makespan([x + lag for x in arrived], [share * compute for share in load.shares])
        sent = paths.seconds(paths.up, load.up_bytes) + drawn.lag_up
        answer = np.asarray(done + sent) - began
        stages = np.maximum(first, self.now + hop) + np.maximum(paths.seconds(paths.down, whole), compute)
        soonest = np.maximum(stages, self.now + hop + whole / paths.trunk) + lag + sent - began
        meanwhile = load.ahead_flops / scene.cloud_flops_per_s
        busy = self.now + meanwhile
        self._close(began, answer, load, paths)
        self.now = max(self.now, busy)
        self.times = self.times.plus(cloud=meanwhile)
        self._account(answer, soonest, compute, load, paths)
        self.exchange += 1
        return answer

    def cloud(self, flops: float) -> None:
        """Let the cloud compute."""
        took = flops / self.scene.cloud_flops_per_s
        self.now += took
        self.times = self.times.plus(cloud=took, bound=took)

    def end(self, *, nobody: bool = False) -> Times:
        """Return the round's times; where nobody could be reached, that took a call there and back."""
        if nobody:
            self.now += 2 * self.scene.link.latency_s
        return self.times._replace(total=self.now)

    def _close(self, began: float, answer: np.ndarray, load: Load, paths: _Paths) -> None:
        """Set `now` to when the cloud has the answers: at the last one, or at the deadline where one is late."""
        scene = self.scene
        limit, late = scene.deadline_s, answer > scene.deadline_s
        if not scene.tree:
            self.now = began + (limit if late.any() else float(answer.max()))
            return
        closed = np.zeros(scene.edges)
        np.maximum.at(closed, paths.edge, np.minimum(answer, limit))
        sums = np.bincount(paths.edge, np.where(late, 0.0, load.up_bytes), scene.edges)
        serving = np.bincount(paths.edge, minlength=scene.edges) > 0
        self.now = began + float((closed + sums / paths.trunk)[serving].max()) + scene.trunk_latency_s

    def _account(self, answer: np.ndarray, soonest: np.ndarray, compute: np.ndarray, load: Load, paths: _Paths) -> None:
        """Add the stages of the last device that came in time, and the wait for a deadline."""
        scene, in_time = self.scene, answer <= self.scene.deadline_s
        if not in_time.any():
            self.times = self.times.plus(wait=scene.deadline_s)
            return
        whole = float(load.unit_bytes.sum())
        i = int(np.argmax(np.where(in_time, answer, -np.inf)))
        down = load.missed_bytes[i] + load.reply_bytes + whole
        stages = {"trunk": 0.0, "link": 0.0, "compute": float(compute[i])}
        for own, bytes_ in ((paths.down[i], down), (paths.up[i], load.up_bytes[i])):
            slower = "link" if own <= paths.share[i] else "trunk"
            stages[slower] += float(bytes_ / min(own, paths.share[i]))
        if scene.tree:
            own_edge = (paths.edge == paths.edge[i]) & in_time
            above = float(load.up_bytes[own_edge].sum()) / paths.trunk + scene.trunk_latency_s
            stages["trunk"] += (whole + load.reply_bytes) / paths.trunk + above
        wait = scene.deadline_s - float(answer[i]) if not in_time.all() else 0.0
        rest = float(soonest[in_time].max()) + (scene.trunk_latency_s if scene.tree else 0.0)
        self.times = self.times.plus(
            **stages, wait=wait, bound=max(0.0, rest - load.plan_flops / scene.cloud_flops_per_s)
        )


def _paths(scene: Scene, devices: np.ndarray, drawn: Drawn) -> _Paths:
    """Return how the devices of an exchange are reached, all at once and each with a fair share."""
    down, up = drawn.down, drawn.up
    trunk = scene.trunk_bit_s / 8
    if not scene.tree:
        return _Paths(down, up, np.full(devices.size, trunk / devices.size), np.zeros(devices.size, np.int64), np.inf)
    edge = devices % scene.edges
    served = np.bincount(edge, minlength=scene.edges)
    return _Paths(down, up, trunk / served[edge], edge, trunk / int((served > 0).sum()))
