"""Bringing all ranks to where rank 0 took up a checkpoint: what it found is agreed on, weights and state are shared."""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np

from fedbench.algorithms.base import CLOUD
from fedbench.base.arrays import Arrays, Unit
from fedbench.codec.frame import Place
from fedbench.run.runner import Runner

#: Kinds of rounds that the virtual clock knows apart: without and with a new plan.
_KINDS = (0, 1)


class Found(NamedTuple):
    """What rank 0 finds of a run before its first round, as integers that all ranks agree on; elsewhere nothing.

    An exit code that all leave with, whether the run is done, and of a checkpoint that was taken up: the next round,
    whether the target is reached, and of which kinds a whole round was trained.
    """

    code: int = 0
    done: int = 0
    resumed: int = 0
    next_round: int = 0
    reached: int = 0
    plain_known: int = 0
    plan_known: int = 0


def standing(runner: Runner) -> Found:
    """Return where a run stands that has just taken up its checkpoint."""
    known = frozenset[int]() if runner.virtual is None else runner.virtual.known
    return Found(0, 0, 1, runner.next_round, int(runner.reached), *(int(kind in known) for kind in _KINDS))


def share(runner: Runner, found: Found) -> None:
    """Bring every rank to the round, the weights and the method's state of the cloud."""
    star, tensors = runner.star, runner.built.trainable
    runner.next_round, runner.reached = found.next_round, bool(found.reached)
    if runner.virtual is not None:  # rounds that are due on the cloud are due everywhere
        known = (found.plain_known, found.plan_known)
        runner.virtual.known = frozenset(kind for kind in _KINDS if known[kind])
    weights: Arrays | None = {t.name: t.values() for t in tensors} if star.is_cloud else None
    units = [Unit(t.name, (t.size,)) for t in tensors]
    place = Place(runner.next_round, 0, -1, 0)
    inbox = star.down("resume", units, weights, place)
    for tensor in tensors:
        tensor.assign(inbox[tensor.name])
    if star.transport.size > 1:
        _share_state(runner, place)
    for channel in ("resume", "state table", "state"):  # all weights once more, which no round needs
        star.release(channel)


def _share_state(runner: Runner, place: Place) -> None:
    """Give every rank's method the state that the cloud took from its checkpoint; its table of units goes first."""
    star, algorithm = runner.star, runner.built.algorithm
    own = algorithm.state() if star.is_cloud else {}
    state = {name: np.ascontiguousarray(a) for name, a in own.items() if not name.startswith(CLOUD)}
    table = json.dumps([[name, a.shape, a.dtype.str] for name, a in state.items()]).encode()
    (size,) = star.agree([len(table) if star.is_cloud else 0], "resume")
    units = [Unit("table", (size,), "|u1")]
    told = star.down("state table", units, {"table": np.frombuffer(table, np.uint8)}, place)["table"].tobytes()
    units = [Unit(name, tuple(shape), dtype) for name, shape, dtype in json.loads(told)]
    inbox = star.down("state", units, state, place)
    if not star.is_cloud:
        algorithm.restore({unit.name: np.array(inbox[unit.name]) for unit in units})
