"""What a finished run leaves: every rank's memory and spans brought to rank 0, and the record of the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedbench.base import provenance, records
from fedbench.base.arrays import Arrays, Unit
from fedbench.base.clock import Clock
from fedbench.base.errors import WireError
from fedbench.codec.frame import NO_NOTE, Place
from fedbench.comm.topology import Topology
from fedbench.run import launch, spans
from fedbench.run.callbacks.metrics import Metrics
from fedbench.run.hidden import hidden_fraction
from fedbench.run.memory import PHASES, Memory, device_peak, memory_columns, memory_rounds
from fedbench.run.outcome import Trajectory
from fedbench.run.runner import Runner, weights_sha256


class Ranks(NamedTuple):
    """What all ranks reported: `memory` int64 [ranks, phases, 3], see `Memory.table`; spans and rounds' memory as columns."""

    memory: np.ndarray
    spans: dict[str, np.ndarray]
    memory_rounds: dict[str, np.ndarray]
    unaccounted: float = 0.0
    apart: bool = True


def gather_ranks(star: Topology, memory: Memory, clock: Clock, weights: str, *, replicas: bool) -> Ranks:
    """Return every rank's memory and spans on rank 0; WireError where a replica's weights differ from the cloud's."""
    own, log = spans.packed(clock), memory.log()
    sizes = [len(own["spans"]), len(own["names"]), len(log), int(not memory.apart)]
    rows, name_bytes, log_rows, together = star.agree(sizes, "report their spans")
    units = [
        Unit("weights", (32,), "|u1"),
        Unit("memory", (len(PHASES), 3), "<i8"),
        Unit("log", (log_rows, 3), "<i8", at_most=True),
        *spans.units(rows, name_bytes),
    ]
    mine: dict[str, np.ndarray] = {
        "weights": np.frombuffer(bytes.fromhex(weights), np.uint8),
        "memory": memory.table(),
        "log": log,
        **own,
    }
    others = star.gather_from_ranks(units, mine, Place(0, 0, -1, 0), NO_NOTE)
    reports: dict[int, Arrays] = {0: mine, **others} if star.is_cloud else {}
    for rank, report in reports.items():
        if replicas and not np.array_equal(report["weights"], mine["weights"]):
            raise WireError(f"{star.transport.name_of(rank)} ended with other weights than the cloud.")
    nothing = np.empty((0, len(PHASES), 3), np.int64)
    return Ranks(
        np.stack([report["memory"] for report in reports.values()]) if reports else nothing,
        spans.columns(reports),
        memory_rounds({rank: report["log"] for rank, report in reports.items()}),
        spans.unaccounted(reports),
        not together,
    )


def assemble(
    runner: Runner, metrics: Metrics, ranks: Ranks, stop_reason: str, origin: Mapping[str, Any]
) -> records.Run:
    """Return the complete record of a run on rank 0."""
    rows = metrics.rows
    rounds = {
        name: np.array([row.get(name, _missing(column)) for row in rows], np.dtype(column.dtype))
        for name, column in records.ROUND_COLUMNS.items()
    }
    return records.Run(
        config=dict(runner.built.job.tree),
        provenance=dict(origin),
        summary=_summary(runner, metrics, ranks, stop_reason, rounds),
        rounds=rounds,
        devices=metrics.device_columns(),
        memory=memory_columns(ranks.memory, apart=ranks.apart),
        memory_rounds=ranks.memory_rounds,
        spans=ranks.spans,
        codec=_codec(metrics.codec_rows),
    )


def provenance_of(runner: Runner, metrics: Metrics) -> dict[str, Any]:
    """Return where a run that ends now comes from: its world, data, model and segments."""
    built, transport, config = runner.built, runner.star.transport, runner.built.job.config
    segments = metrics.segments.told(runner.next_round)
    return provenance.collect(
        {
            "mpi": launch.library(transport),
            "hosts": sorted({transport.name_of(rank).rpartition(" ")[2] for rank in range(transport.size)}),
            "threads_per_rank": config.run.threads,
            "started": segments[0]["started"],
            "ended": segments[-1]["ended"],
            "segments": segments,
            "data": dict(built.splits.source),
            "model": {
                "name": config.model.name,
                "weights": built.cut.weights,
                "device": built.cut.residency.told(),
                "trainable_entries": built.trainable.size,
            },
        }
    )


def _codec(rows: Sequence[tuple[int, str, float]]) -> dict[str, np.ndarray]:
    """Return the columns of the codecs that were chosen unit by unit; nothing where none was."""
    if not rows:
        return {}
    columns = zip(records.CODEC_COLUMNS.items(), zip(*rows, strict=True), strict=True)
    return {name: np.array(values, np.str_ if c.dtype == "str" else c.dtype) for (name, c), values in columns}


def _summary(
    runner: Runner, metrics: Metrics, ranks: Ranks, stop_reason: str, rounds: Mapping[str, np.ndarray]
) -> records.Summary:
    """Return a run's figures from its columns, its trajectory closed with the last weights."""
    built, star = runner.built, runner.star
    job = built.job
    weights = weights_sha256(built.trainable)
    closed = Trajectory(runner.trajectory.digest)  # the run's own stays open: it may have to be saved and resumed
    closed.join(b"end", bytes.fromhex(weights))
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
        downlink_bytes=int(rounds["downlink_bytes"].sum()) + runner.traffic.closing(),
        uplink_bytes_per_device_round=up / int(played.sum()),
        wire_bytes=int(rounds["wire_bytes"].sum()),
        peak_device_bytes=device_peak(ranks.memory, star.peers),
        round_s_median=float(np.median(rounds["round_s"][played & (rounds["trained"] == 1)])),
        sim_s=None if runner.virtual is None else float(np.nansum(rounds["sim_s"])),
        hidden_fraction=hidden_fraction(
            ranks.spans, dict(zip(rounds["round"].tolist(), rounds["plan_s"].tolist(), strict=True)), star.peers
        ),
        unaccounted_fraction=ranks.unaccounted,
        repeatable=(job.config.comm.codec, job.config.comm.adapt) != ("adaptive", "measured"),
        weights_sha256=weights,
        trajectory_sha256=closed.digest.hex(),
    )


def _missing(column: records.Column) -> float:
    return float("nan") if column.dtype.startswith("f") else 0
