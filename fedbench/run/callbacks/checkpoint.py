"""Writes a checkpoint every few rounds and when the run is stopped; rank 0 only."""

from __future__ import annotations

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
        built, runner = self._runner.built, self._runner
        arrays = {f"weights/{t.name}": t.values() for t in built.trainable}
        arrays |= {f"method/{name}": array for name, array in built.algorithm.state().items()}
        arrays |= {f"coder/{name}": array for name, array in runner.plans.coder.state().items()}
        state: dict[str, Any] = {
            "next_round": runner.next_round,
            "trajectory": runner.trajectory.digest.hex(),
            "metrics": self._metrics.state(),
            "rates": {} if runner.plans.chooser is None else runner.plans.chooser.state(),
        }
        self._store.save(Checkpoint(arrays, state))


def take_up(checkpoint: Checkpoint, runner: Runner, metrics: Metrics) -> None:
    """Put a run on rank 0 where its checkpoint was made."""
    for tensor in runner.built.trainable:
        tensor.assign(checkpoint.arrays[f"weights/{tensor.name}"])
    runner.built.algorithm.restore(_part("method/", checkpoint))
    runner.plans.coder.restore(_part("coder/", checkpoint))
    runner.next_round = int(checkpoint.state["next_round"])
    runner.trajectory.digest = bytes.fromhex(checkpoint.state["trajectory"])
    if runner.plans.chooser is not None:
        runner.plans.chooser.restore(checkpoint.state["rates"])
    metrics.restore(dict(checkpoint.state["metrics"]))


def _part(prefix: str, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): a for name, a in checkpoint.arrays.items() if name.startswith(prefix)}
