"""What a finished run leaves: every rank's memory and spans brought to rank 0, and the record of the whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fedbench.base import records
from fedbench.base.arrays import Arrays, Unit
from fedbench.base.clock import Clock
from fedbench.base.errors import WireError
from fedbench.codec.frame import NO_NOTE, Place
from fedbench.comm.topology import Topology
from fedbench.run.callbacks.metrics import Metrics
from fedbench.run.memory import PHASES, Memory, device_peak, memory_columns
from fedbench.run.runner import Runner, weights_sha256

KINDS = ("compute", "cloud", "encode", "wait", "decode", "apply", "evaluate")


class Ranks(NamedTuple):
    """What all ranks reported: `memory` int64 [ranks, phases, 3], see `Memory.table`; spans as columns."""

    memory: np.ndarray
    spans: dict[str, np.ndarray]
    apart: bool = True


def gather_ranks(star: Topology, memory: Memory, clock: Clock, weights: str, *, replicas: bool) -> Ranks:
    """Return every rank's memory and spans on rank 0; WireError where a replica's weights differ from the cloud's."""
    mine_spans = list(clock.spans)
    most, together = star.agree([len(mine_spans), int(not memory.apart)], "report their spans")
    units = [
        Unit("weights", (32,), "|u1"),
        Unit("memory", (len(PHASES), 3), "<i8"),
        Unit("count", (1,), "<i8"),
        Unit("spans", (most, 4), "<f8"),
    ]
    spans = np.zeros((most, 4))
    for row, (round_, kind, start_s, length_s) in enumerate(mine_spans):
        spans[row] = round_, KINDS.index(kind), start_s, length_s
    mine: dict[str, np.ndarray] = {
        "weights": np.frombuffer(bytes.fromhex(weights), np.uint8),
        "memory": memory.table(),
        "count": np.array([len(mine_spans)], np.int64),
        "spans": spans,
    }
    place = Place(0, 0, -1, 0)
    others = star.gather_from_ranks(units, mine, place, NO_NOTE)
    tables: dict[int, Arrays] = {0: mine, **others} if star.is_cloud else {}
    columns: dict[str, list[Any]] = {name: [] for name in records.SPAN_COLUMNS}
    for rank, table in tables.items():
        if replicas and not np.array_equal(table["weights"], mine["weights"]):
            raise WireError(f"{star.transport.name_of(rank)} ended with other weights than the cloud.")
        for round_, kind_index, start_s, length_s in table["spans"][: int(table["count"][0])]:
            values = (rank, int(round_), KINDS[int(kind_index)], start_s, length_s)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
    nothing = np.empty((0, len(PHASES), 3), np.int64)
    peaks = np.stack([table["memory"] for table in tables.values()]) if tables else nothing
    return Ranks(peaks, {name: np.array(values) for name, values in columns.items()}, not together)


def assemble(
    runner: Runner, metrics: Metrics, ranks: Ranks, stop_reason: str, provenance: Mapping[str, Any]
) -> records.Run:
    """Return the complete record of a run on rank 0."""
    rows = metrics.rows
    rounds = {
        name: np.array([row.get(name, _missing(column)) for row in rows], np.dtype(column.dtype))
        for name, column in records.ROUND_COLUMNS.items()
    }
    sampled = len(metrics.device_rows[0]["device"])
    devices = {
        name: np.array([row[name] for row in metrics.device_rows], np.dtype(column.dtype)).reshape(
            len(metrics.device_rows), sampled
        )
        for name, column in records.DEVICE_COLUMNS.items()
    }
    return records.Run(
        config=dict(runner.built.job.tree),
        provenance=dict(provenance),
        summary=_summary(runner, metrics, ranks, stop_reason, rounds),
        rounds=rounds,
        devices=devices,
        memory=memory_columns(ranks.memory, apart=ranks.apart),
        spans=ranks.spans,
    )


def _summary(
    runner: Runner, metrics: Metrics, ranks: Ranks, stop_reason: str, rounds: Mapping[str, np.ndarray]
) -> records.Summary:
    """Return a run's figures from its columns, and close its trajectory with the last weights."""
    built, star = runner.built, runner.star
    job = built.job
    weights = weights_sha256(built.trainable)
    runner.trajectory.join(b"end", bytes.fromhex(weights))
    played = rounds["round"] >= 0
    dev, test = rounds["dev_accuracy"], rounds["test_accuracy"]
    target = job.config.run.target_accuracy
    reached = rounds["round"][dev >= target] if target is not None else np.empty(0)
    up = int(rounds["uplink_bytes"].sum())
    return records.Summary(
        run_id=job.run_id,
        method=job.config.method_name,
        complete=True,
        stop_reason=stop_reason,
        rounds=int(played.sum()),
        seed=job.config.run.seed,
        ranks=star.transport.size,
        devices=job.config.federation.devices,
        final_accuracy=float(test[~np.isnan(test)][-1]),
        best_accuracy=float(test[int(np.nanargmax(dev))]),
        initial_accuracy=float(test[0]),
        probe_accuracy=metrics.probe_accuracy,
        target_accuracy=target,
        rounds_to_target=int(reached[0]) + 1 if len(reached) else None,
        device_flops=float(np.nansum(rounds["device_flops"])),
        cloud_flops=float(np.nansum(rounds["cloud_flops"])),
        replay_ops=float(np.nansum(rounds["replay_ops"])),
        uplink_bytes=up,
        downlink_bytes=int(rounds["downlink_bytes"].sum()) + metrics.traffic.closing(),
        uplink_bytes_per_device_round=up / int(played.sum()),
        wire_bytes=int(rounds["wire_bytes"].sum()),
        peak_device_bytes=device_peak(ranks.memory, star.peers),
        round_s_median=float(np.median(rounds["round_s"][played])),
        sim_s=None if runner.virtual is None else float(np.nansum(rounds["sim_s"])),
        hidden_fraction=None,
        weights_sha256=weights,
        trajectory_sha256=runner.trajectory.digest.hex(),
    )


def _missing(column: records.Column) -> float:
    return float("nan") if column.dtype.startswith("f") else 0
