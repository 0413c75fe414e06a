"""Writes a checkpoint every few rounds and when the run is stopped; rank 0 only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedbench.run.callbacks.metrics import Metrics
from fedbench.run.ckpt import Checkpoint, Store
from fedbench.run.outcome import Outcome
from fedbench.run.runner import Runner


class SaveCheckpoint:
    """Keeps the run resumable."""

    def __init__(self, store: Store, runner: Runner, metrics: Metrics, every: int) -> None:
        self._store = store
        self._runner = runner
        self._metrics = metrics
        self._every = every

    def started(self) -> None:
        """Nothing has happened yet that would be lost."""

    def played(self, outcome: Outcome) -> bool:
        """Save after every `every` rounds (0: never)."""
        if self._every and (outcome.number + 1) % self._every == 0:
            self.save()
        return False

    def save(self) -> None:
        """Write the state at this round boundary."""
        self._store.save(state_of(self._runner, self._metrics))


def state_of(runner: Runner, metrics: Metrics) -> Checkpoint:
    """Return what a run on rank 0 goes on from at this round boundary: what grows with devices as arrays."""
    parts: dict[str, Mapping[str, np.ndarray]] = {
        "weights": {t.name: t.values() for t in runner.built.trainable},
        "method": runner.built.algorithm.state(),
        "coder": runner.plans.coder.state(),
        "traffic": runner.traffic.state(),
        "devices": metrics.device_columns(),
    }
    state: dict[str, Any] = {
        "next_round": runner.next_round,
        "trajectory": runner.trajectory.digest.hex(),
        "metrics": metrics.state(),
        "virtual": None if runner.virtual is None else runner.virtual.state(),
        "rates": {} if runner.plans.chooser is None else runner.plans.chooser.state(),
    }
    return Checkpoint({f"{part}/{name}": a for part, arrays in parts.items() for name, a in arrays.items()}, state)


def take_up(checkpoint: Checkpoint, runner: Runner, metrics: Metrics) -> None:
    """Put a run on rank 0 where its checkpoint was made."""
    for tensor in runner.built.trainable:
        tensor.assign(checkpoint.arrays[f"weights/{tensor.name}"])
    runner.built.algorithm.restore(_part("method/", checkpoint))
    runner.plans.coder.restore(_part("coder/", checkpoint))
    runner.traffic.restore(_part("traffic/", checkpoint))
    runner.next_round = int(checkpoint.state["next_round"])
    runner.trajectory.digest = bytes.fromhex(checkpoint.state["trajectory"])
    if runner.plans.chooser is not None:
        runner.plans.chooser.restore(checkpoint.state["rates"])
    if runner.virtual is not None:
        runner.virtual.restore(checkpoint.state["virtual"])
    metrics.restore(dict(checkpoint.state["metrics"]), _part("devices/", checkpoint))


def _part(prefix: str, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): a for name, a in checkpoint.arrays.items() if name.startswith(prefix)}
