"""Turns what happened into the columns of the run file: evaluation, logical bytes, times.

Lives on rank 0. It reads the model and never changes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any

import numpy as np
import torch

from fedbench.base.clock import Clock
from fedbench.base.errors import NumericsError
from fedbench.base.records import DEVICE_COLUMNS, ROUND_COLUMNS, SIMULATED
from fedbench.data.rows import Rows
from fedbench.models.cut import Cut
from fedbench.models.probe import logistic_accuracy
from fedbench.models.start import features_of
from fedbench.run.build import Built
from fedbench.run.outcome import Outcome
from fedbench.run.runner import Runner, weights_sha256
from fedbench.run.segments import Segments
from fedbench.sim.profiles import link_of

_EVALUATION_ROWS = 128

#: A run with more loss differences of exactly zero than this share is not measuring anything (methods.md 1.5).
ZERO_LIMIT = 0.01
_ZERO_SAMPLE = 300

_SIMULATED = tuple(name for name, column in ROUND_COLUMNS.items() if column.unit == SIMULATED)


class Metrics:
    """Rows and device rows of a run, as they will be stored."""

    def __init__(self, built: Built, runner: Runner, clock: Clock) -> None:
        self._built = built
        self._runner = runner
        self._clock = clock
        self._config = built.job.config
        self.rows: list[dict[str, float]] = []
        self.device_rows: list[dict[str, np.ndarray]] = []
        self.codec_rows: list[tuple[int, str, float]] = []
        self.probe_accuracy: float | None = None
        self._scalars = self._zeros = 0
        self.segments = Segments()

    def started(self) -> None:
        """Evaluate the start model, unless a checkpoint brought that row along."""
        if self.rows:
            return
        cut, splits = self._built.cut, self._built.splits
        test_features = features_of(cut, splits.test)
        public = features_of(cut, splits.public)
        self.probe_accuracy = logistic_accuracy(
            public, splits.public.labels, test_features, splits.test.labels, cut.classes
        )
        self.rows.append({"round": -1, **self._evaluated()})

    def played(self, outcome: Outcome) -> bool:
        """Add the row of a round; return whether the target is reached and the job stops there."""
        self._guard(outcome)
        here = outcome.took_part
        seconds = self._clock.seconds
        row: dict[str, float] = {
            "round": outcome.number,
            "exchanges": outcome.exchanges,
            "lr": outcome.lr,
            "device_loss": _mean([loss for loss in outcome.losses if not math.isnan(loss)]),
            "cloud_loss": outcome.cloud_loss,
            "zero_fraction": outcome.zero_scalars / outcome.scalars if outcome.scalars else float("nan"),
            "query_radius": outcome.query_radius,
            "uplink_bytes": _whole_mean(list(compress(outcome.up_bytes, here))),
            "downlink_bytes": _whole_mean(list(compress(outcome.down_bytes, here))),
            "edge_bytes": self._runner.traffic.to_edges(),
            "kept_bytes": self._kept(outcome),
            "wire_bytes": outcome.wire_bytes,
            "device_flops": _mean(list(compress(outcome.flops, here)), 0.0),
            "cloud_flops": outcome.cloud_flops,
            "replay_ops": outcome.replay_ops,
            "round_s": outcome.round_s,
            "compute_s": self._slowest(outcome),
            "cloud_s": seconds("cloud"),
            "encode_s": seconds("encode"),
            "wait_s": seconds("wait"),
            "plan_s": self._plan_s(outcome.plan_bytes + outcome.resent_bytes),
            "apply_s": seconds("apply"),
            "trained": int(outcome.trained),
            "answered": sum(outcome.answered),
            "sim_energy_j": _mean(list(compress(outcome.energy_j, here))),
            **_simulated(outcome),
        }
        if self.evaluates(outcome.number):
            row |= self._evaluated()
        self.rows.append(row)
        devices: dict[str, Sequence[float]] = {
            "device": outcome.devices,
            "loss": outcome.losses,
            "uplink_bytes": outcome.up_bytes,
            "downlink_bytes": outcome.down_bytes,
            "flops": outcome.flops,
            "compute_s": outcome.compute_s,
            "answered": outcome.answered,
            "sim_s": outcome.sim_device_s,
            "sim_energy_j": outcome.energy_j,
        }
        self.device_rows.append({name: np.array(devices[name], c.dtype) for name, c in DEVICE_COLUMNS.items()})
        self.codec_rows += [(outcome.number, unit, bits) for unit, bits in outcome.bits]
        return self.reached()

    def reached(self) -> bool:
        """Return whether the last round was evaluated, reached the target, and the job stops there."""
        row, run = self.rows[-1], self._config.run
        if run.target_accuracy is None or not run.stop_at_target or row["round"] < 0:
            return False
        return row.get("dev_accuracy", 0.0) >= run.target_accuracy

    def evaluates(self, number: int) -> bool:
        """Return whether the model is evaluated after a round."""
        done, run = number + 1, self._config.run
        return done == run.rounds or done <= run.eval_first or done % run.eval_every == 0

    def state(self) -> dict[str, Any]:
        """Return everything but what devices did as a tree that JSON can hold."""
        return {
            "rows": self.rows,
            "codec_rows": self.codec_rows,
            "probe_accuracy": self.probe_accuracy,
            "zeros": [self._zeros, self._scalars],
            "segments": self.segments.told(self._runner.next_round),
        }

    def device_columns(self) -> dict[str, np.ndarray]:
        """Return the columns of what devices did, [rounds, sampled] each."""
        rounds = len(self.device_rows)
        return {
            name: np.array([row[name] for row in self.device_rows], column.dtype).reshape(rounds, -1 if rounds else 0)
            for name, column in DEVICE_COLUMNS.items()
        }

    def restore(self, state: dict[str, Any], devices: Mapping[str, np.ndarray]) -> None:
        """Take back what `state` and `device_columns` returned."""
        self.rows = state["rows"]
        rounds = range(len(next(iter(devices.values()))))
        self.device_rows = [{name: devices[name][number] for name in DEVICE_COLUMNS} for number in rounds]
        self.codec_rows = [(number, unit, bits) for number, unit, bits in state["codec_rows"]]
        self.probe_accuracy = state["probe_accuracy"]
        self._zeros, self._scalars = state["zeros"]
        self.segments.restore(state["segments"], self._runner.next_round)

    def _evaluated(self) -> dict[str, float]:
        """Return the evaluation columns and join the weights to the trajectory."""
        self._runner.trajectory.join(b"weights", bytes.fromhex(weights_sha256(self._built.trainable)))
        with self._clock.span("evaluate"):
            accuracy, loss = evaluate(self._built.cut, self._built.splits.dev)
            test_accuracy, _ = evaluate(self._built.cut, self._built.splits.test)
        return {
            "dev_accuracy": accuracy,
            "dev_loss": loss,
            "test_accuracy": test_accuracy,
            "eval_s": self._clock.seconds("evaluate"),
        }

    def _plan_s(self, plan_bytes: int) -> float:
        """Return how long a plan takes on a paced link; NaN where links are not paced or have no rate."""
        paced = self._config.link.clock == "paced"
        seconds = link_of(self._config).transfer_s(plan_bytes, up=False) if paced else 0.0
        return seconds if seconds else float("nan")

    def _kept(self, outcome: Outcome) -> int:
        """Return the bytes of the coded guide that a device keeps: of this round, or the last one that brought any."""
        if self._config.comm.guide_reuse == "resend" or not self._built.algorithm.keeps_plan:
            return 0
        return outcome.plan_bytes or int(self.rows[-1].get("kept_bytes", 0))

    def _slowest(self, outcome: Outcome) -> float:
        """Return the longest compute of a rank: its devices one after the other; 0 in a round that is timed alone."""
        if not any(outcome.compute_s):
            return 0.0
        star = self._runner.star
        by_rank: dict[int, float] = {}
        for device, seconds in zip(outcome.devices, outcome.compute_s, strict=True):
            by_rank[star.host_of(device)] = by_rank.get(star.host_of(device), 0.0) + seconds
        return max(by_rank.values(), default=0.0)

    def _guard(self, outcome: Outcome) -> None:
        self._scalars += outcome.scalars
        self._zeros += outcome.zero_scalars
        if self._scalars >= _ZERO_SAMPLE and self._zeros > ZERO_LIMIT * self._scalars:
            raise NumericsError(
                f"Round {outcome.number}: {self._zeros} of {self._scalars} loss differences are exactly zero "
                f"(allowed: {ZERO_LIMIT:.0%}); the probing step is below what the losses resolve. Raise zo.epsilon "
                f"(or method.cooperllm.h)."
            )


def evaluate(cut: Cut, rows: Rows) -> tuple[float, float]:
    """Return accuracy 0..1 and mean loss of a split, in batches of similar length."""
    order = np.argsort(rows.lengths, kind="stable")
    right = loss = 0.0
    with torch.inference_mode():
        for start in range(0, len(order), _EVALUATION_ROWS):
            batch = cut.residency.batch(rows.batch(order[start : start + _EVALUATION_ROWS]))
            out = cut(batch)
            right += float(cut.head.hits(out, batch).sum())
            loss += float(cut.head.losses(out, batch).sum())
    return right / len(rows), loss / len(rows)


def _simulated(outcome: Outcome) -> dict[str, float]:
    """Return the columns of the virtual clock, none where there is none."""
    times = outcome.times
    if times is None:
        return dict.fromkeys(_SIMULATED, float("nan"))
    values = (times.total, times.cloud, times.trunk, times.link, times.compute, times.wait, times.bound)
    return dict(zip(_SIMULATED, (*values, outcome.sim_other_s), strict=True))


def _mean(values: list[float], empty: float = float("nan")) -> float:
    return float(np.mean(values)) if values else empty


def _whole_mean(values: list[int]) -> int:
    return round(sum(values) / len(values)) if values else 0
