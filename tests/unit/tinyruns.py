"""Small runs in one process: the embedded model, a few devices and rows, the loopback transport."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np

from fedbench.algorithms.base import Lab
from fedbench.base import config
from fedbench.base.clock import Clock
from fedbench.base.config import Setting
from fedbench.base.errors import FedbenchError
from fedbench.comm.connect import connect
from fedbench.comm.loopback import Loopback
from fedbench.comm.star import Star
from fedbench.comm.topology import Topology
from fedbench.models.trainable import Tensor, Trainable
from fedbench.run import build
from fedbench.run.build import METHODS, Built, Job, resolve
from fedbench.run.callbacks.metrics import Metrics
from fedbench.run.runner import Outcome, Runner
from fedbench.sim.profiles import link_of
from fedbench.zo.kernels import reference
from fedbench.zo.ranges import Guide

#: Methods whose devices compute.
WORKING = sorted(name for name, method in METHODS.items() if method.uses_devices)

#: Splits are read-only, so that runs on the same data can share them.
_splits = functools.cache(build.load_splits)

SMALL: dict[str, Any] = {
    "run.rounds": 3,
    "federation.devices": 3,
    "federation.batch_size": 3,
    "data.public_per_class": 4,
}


def make_job(method: str, changes: Mapping[str, Any] | None = None) -> Job:
    """Return a small job; `changes` maps dotted keys to values."""
    tree: dict[str, Any] = {"method": {"name": method}}
    for key, value in (SMALL | dict(changes or {})).items():
        setting, node = Setting(tuple(key.split(".")), value), tree
        for part in setting.path[:-1]:
            node = node.setdefault(part, {})
        node[setting.path[-1]] = setting.value
    return resolve(config.check(tree, source="test"), "test")


def make(method: str, changes: Mapping[str, Any] | None = None, *, evaluated: int = 32) -> Built:
    """Return a small run ready to start; its dev and test splits have `evaluated` rows."""
    with mock.patch.object(build, "load_splits", _splits):
        return shrunk(build.construct(make_job(method, changes)), evaluated)


def shrunk(built: Built, evaluated: int) -> Built:
    """Return a run with the first rows of its dev and test splits."""
    dev, test = (rows.take(np.arange(min(evaluated, len(rows)))) for rows in (built.splits.dev, built.splits.test))
    return replace(built, splits=replace(built.splits, dev=dev, test=test))


def with_lab(built: Built, **changes: Any) -> Built:
    """Return a run whose method works in a changed lab."""
    lab: Lab = replace(built.lab, **changes)
    return replace(built, lab=lab, algorithm=type(built.algorithm)(built.job.settings, lab))


class Tiny:
    """One run on one rank: runner, metrics and what was exchanged."""

    def __init__(self, built: Built) -> None:
        self.built = built
        self.clock = Clock()
        config = built.job.config
        self.star: Topology = Star(Loopback(), 5.0, self.clock, lz4=config.comm.lz4)
        if config.link.clock == "paced":
            self.star = connect(Loopback(), self.clock, config.comm, link_of(config), config.run.seed)
        self.runner = Runner(built, self.star, self.clock)
        self.metrics = Metrics(built, self.runner, self.clock)

    def run(self, *observers: Any, wants_to_stop: Callable[[], bool] = lambda: False) -> str:
        """Play the run with metrics and more observers; return why it ended."""
        return self.runner.run([self.metrics, *observers], wants_to_stop)

    def play(self, rounds: int) -> list[Outcome]:
        """Play the next rounds without any observer."""
        outcomes = []
        for _ in range(rounds):
            outcomes.append(self.runner.play(self.runner.next_round))
            self.runner.next_round += 1
        return outcomes


def weights(trainable: Trainable) -> dict[str, np.ndarray]:
    """Return copies of the trainable weights, flat, by name."""
    return {tensor.name: tensor.flat.copy() for tensor in trainable}


def same(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> bool:
    """Return whether two sets of weights have the same bits."""
    return left.keys() == right.keys() and all(left[n].tobytes() == right[n].tobytes() for n in left)


def flat(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return all arrays as one float64 vector, in the order of their names."""
    return np.concatenate([np.asarray(arrays[name], np.float64).reshape(-1) for name in sorted(arrays)])


def drawn(trainable: Trainable, key: np.ndarray, *, gaussian: bool = False) -> dict[str, np.ndarray]:
    """Return the direction z of a key uint64 [2] by the kernels' specification, flat float32 by name."""
    z = {}
    for tensor in trainable:
        z[tensor.name] = np.empty(tensor.size, np.float32)
        reference.draw(reference.stream_keys(key[None], tensor.key)[0], 0, z[tensor.name], gaussian)
    return z


def written_out(guide: Guide, tensor: Tensor) -> np.ndarray:
    """Return a guide's part in a tensor, flat, zeros written out."""
    whole = np.zeros(tensor.size, np.float32)
    for low, high, values in guide.pieces(tensor, 0, tensor.size):
        whole[low:high] = values if values.size else 0.0
    return whole


def never(*_: Any) -> Sequence[Any]:
    """Stand in for what must not be asked for."""
    raise FedbenchError("the test said that this is never asked for")
