"""Writes a checkpoint every few rounds, or after some time, and when the run is stopped; rank 0 only."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedbench.base.errors import ResultError
from fedbench.run.callbacks.metrics import Metrics
from fedbench.run.ckpt import Checkpoint, Store
from fedbench.run.outcome import Outcome
from fedbench.run.runner import Runner

#: Checkpoints that are due by time come at most so often that they take this share of it.
_SHARE = 0.05


class SaveCheckpoint:
    """Keeps the run resumable: saves every `every` rounds, and where the last save is `seconds` ago (0: never)."""

    def __init__(self, store: Store, runner: Runner, metrics: Metrics, every: int, seconds: float = 0.0) -> None:
        self._store = store
        self._runner = runner
        self._metrics = metrics
        self._every = every
        self._seconds = seconds
        self._begun_s = time.monotonic()
        self._took_s = 0.0
        self._saved_round: int | None = None

    def started(self) -> None:
        """Nothing has happened yet that would be lost."""
        self._begun_s = time.monotonic()

    def played(self, outcome: Outcome) -> bool:
        """Save where it is time."""
        by_round = self._every > 0 and (outcome.number + 1) % self._every == 0
        pause_s = max(self._seconds, self._took_s / _SHARE)
        if by_round or (self._seconds > 0 and time.monotonic() - self._begun_s >= pause_s):
            self.save()
        return False

    def save(self) -> None:
        """Write the state at this round boundary."""
        begun_s = time.monotonic()
        self._store.save(state_of(self._runner, self._metrics))
        self._begun_s = time.monotonic()
        self._took_s = self._begun_s - begun_s
        self._saved_round = self._runner.next_round

    def keep(self) -> None:
        """Write the state at this round boundary unless that was done."""
        if self._saved_round != self._runner.next_round:
            self.save()


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
    """Put a run on rank 0 where its checkpoint was made; ResultError where another version of fedbench made it."""
    try:
        _restore(checkpoint, runner, metrics)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise ResultError(
            f"{checkpoint.where}: the checkpoint does not fit: another version of fedbench made it "
            f"({type(error).__name__}: {error}). Go back to that one, or remove the folder to start anew."
        ) from None


def _restore(checkpoint: Checkpoint, runner: Runner, metrics: Metrics) -> None:
    weights, names = _part("weights/", checkpoint), {tensor.name for tensor in runner.built.trainable}
    if weights.keys() != names:
        raise ValueError(f"other weights: {', '.join(sorted(weights.keys() ^ names))}")
    for tensor in runner.built.trainable:
        tensor.assign(weights[tensor.name].reshape(tensor.size))
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
    runner.reached = metrics.reached()


def _part(prefix: str, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): a for name, a in checkpoint.arrays.items() if name.startswith(prefix)}
