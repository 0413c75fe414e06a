"""What a round, a span and a run are, once they are facts: the only thing that results and reports see.

Units and meaning of every column stand here and nowhere else. Missing values are
NaN. Bytes and FLOPs are logical, for one sampled device, and do not depend on the
number of ranks; times and `wire_bytes` do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 2

#: Unit of seconds that are computed and not measured: they are the same on every machine.
SIMULATED = "s (simulated)"
STOP_REASONS = ("rounds", "target")


class Column(NamedTuple):
    """One column of a table: NumPy dtype, unit and meaning."""

    dtype: str
    unit: str
    meaning: str


ROUND_COLUMNS: dict[str, Column] = {
    "round": Column("i4", "1", "round number from 0; -1 is the state before training"),
    "exchanges": Column("i4", "1", "exchanges with the devices in this round"),
    "lr": Column("f8", "1", "step size in force"),
    "device_loss": Column("f8", "nat", "mean over the devices that answered of their loss on private batches"),
    "cloud_loss": Column("f8", "nat", "loss on the public batch, where the cloud uses one"),
    "dev_accuracy": Column("f8", "1", "accuracy on the dev split, 0..1; NaN where not evaluated"),
    "dev_loss": Column("f8", "nat", "mean loss on the dev split"),
    "test_accuracy": Column("f8", "1", "accuracy on the test split, 0..1"),
    "zero_fraction": Column("f8", "1", "fraction of loss differences that are exactly zero"),
    "query_radius": Column("f8", "1", "root mean square over coordinates of the probing step"),
    "uplink_bytes": Column("i8", "B", "payload from one sampled device to the cloud (mean)"),
    "downlink_bytes": Column("i8", "B", "payload from the cloud to one sampled device (mean), replay included"),
    "edge_bytes": Column("i8", "B", "payload from the cloud to all edges of a tree, once for each; 0 in a star"),
    "kept_bytes": Column("i8", "B", "coded guide that a device keeps for the update, after it has probed with it"),
    "wire_bytes": Column("i8", "B", "bytes that the transport really moved, headers included, all ranks"),
    "device_flops": Column("f8", "FLOP", "floating-point operations of one sampled device (mean)"),
    "cloud_flops": Column("f8", "FLOP", "floating-point operations of the cloud"),
    "replay_ops": Column("f8", "1", "direction entries rebuilt by one replica: K times d"),
    "round_s": Column("f8", "s", "wall time of the round on rank 0, evaluation excluded"),
    "compute_s": Column("f8", "s", "devices' compute, slowest rank"),
    "cloud_s": Column("f8", "s", "the cloud's own compute"),
    "encode_s": Column("f8", "s", "encoding and framing on rank 0"),
    "wait_s": Column("f8", "s", "exposed waiting for messages on rank 0"),
    "plan_s": Column("f8", "s", "time of the plan on a device's link by its nominal rate; NaN where it has none"),
    "apply_s": Column("f8", "s", "rebuilding the weights on rank 0"),
    "eval_s": Column("f8", "s", "evaluation on rank 0"),
    "trained": Column("i4", "1", "1: the round was computed; 0: it was timed alone, its counts those of the last one"),
    "answered": Column("i4", "1", "sampled devices that neither dropped out nor came too late"),
    "sim_s": Column("f8", SIMULATED, "the round on the virtual clock"),
    "sim_cloud_s": Column("f8", SIMULATED, "the cloud's compute"),
    "sim_trunk_s": Column("f8", SIMULATED, "the cloud's or an edge's link, busy for the last device to answer"),
    "sim_link_s": Column("f8", SIMULATED, "that device's own link"),
    "sim_compute_s": Column("f8", SIMULATED, "that device's compute"),
    "sim_wait_s": Column("f8", SIMULATED, "waiting for a deadline after the last answer"),
    "sim_bound_s": Column("f8", SIMULATED, "what no schedule of the same stages beats"),
    "sim_other_s": Column("f8", SIMULATED, "the same round on the other topology: tree for a star, star for a tree"),
    "sim_energy_j": Column("f8", "J", "energy of one device that took part (mean)"),
}

DEVICE_COLUMNS: dict[str, Column] = {
    "device": Column("i4", "1", "device number"),
    "loss": Column("f8", "nat", "the device's mean loss on its private batches in this round"),
    "uplink_bytes": Column("i8", "B", "payload sent by this device"),
    "downlink_bytes": Column("i8", "B", "payload sent to this device, replay of missed rounds included"),
    "flops": Column("f8", "FLOP", "floating-point operations of this device"),
    "compute_s": Column("f8", "s", "wall time of this device's compute"),
    "answered": Column("i4", "1", "1: what it sent counted; 0: it dropped out or came too late"),
    "sim_s": Column(
        "f8", SIMULATED, "answer after the start of its last exchange on the virtual clock; NaN: dropped out"
    ),
    "sim_energy_j": Column("f8", "J", "energy of this device in this round"),
}

MEMORY_COLUMNS: dict[str, Column] = {
    "rank": Column("i4", "1", "process"),
    "phase": Column("str", "", "import, load, train or evaluate"),
    "peak_bytes": Column("i8", "B", "highest resident memory (VmHWM) in the phase"),
    "above_import_bytes": Column("i8", "B", "the same above the resident memory right after the imports"),
    "weights_bytes": Column(
        "i8", "B", "weights that are in memory at a time: all, or of a mapped model the largest visit"
    ),
}

MEMORY_ROUND_COLUMNS: dict[str, Column] = {
    "rank": Column("i4", "1", "process"),
    "round": Column("i4", "1", "last of the rounds that this row stands for"),
    "resident_bytes": Column("i8", "B", "resident memory (VmRSS) at the end of the round, evaluation not yet begun"),
    "peak_bytes": Column("i8", "B", "highest resident memory (VmHWM) during the rounds"),
}

SPAN_COLUMNS: dict[str, Column] = {
    "rank": Column("i4", "1", "process"),
    "round": Column("i4", "1", "round number"),
    "kind": Column("str", "", "round, or compute, cloud, encode, send, wait, decode, apply, evaluate, account"),
    "unit": Column("str", "", "device, layer or CHANNEL/ARRAY that the span is about; empty where it is none of them"),
    "start_s": Column("f8", "s", "start on this rank's own clock, from the agreed start of the round"),
    "length_s": Column("f8", "s", "duration, spans within it included"),
}

CODEC_COLUMNS: dict[str, Column] = {
    "round": Column("i4", "1", "round number"),
    "unit": Column("str", "", "array of the plan"),
    "bits": Column("f8", "1", "bits of an entry as it travelled"),
}


class Summary(BaseModel):
    """The figures of one run: the keys of `fedbench show --json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    method: str
    complete: bool
    stop_reason: str
    rounds: int
    seed: int
    ranks: int
    devices: int
    final_accuracy: float
    best_accuracy: float
    initial_accuracy: float
    probe_accuracy: float | None
    target_accuracy: float | None
    rounds_to_target: int | None
    device_flops: float
    cloud_flops: float
    replay_ops: float
    uplink_bytes: int
    downlink_bytes: int
    uplink_bytes_per_device_round: float
    wire_bytes: int
    peak_device_bytes: int | None
    round_s_median: float
    sim_s: float | None
    hidden_fraction: float | None
    unaccounted_fraction: float
    repeatable: bool
    weights_sha256: str
    trajectory_sha256: str


@dataclass(frozen=True)
class Run:
    """One run as the run file holds it.

    `config` and `provenance` are JSON-able trees; `rounds` maps a column of
    ROUND_COLUMNS to an array [rows] (row 0 is round -1); `devices` maps a column of
    DEVICE_COLUMNS to an array [rounds, sampled]; the others map columns to arrays
    [rows], and are empty where nothing was recorded.
    """

    config: dict[str, Any]
    provenance: dict[str, Any]
    summary: Summary
    rounds: dict[str, np.ndarray]
    devices: dict[str, np.ndarray]
    memory: dict[str, np.ndarray]
    memory_rounds: dict[str, np.ndarray] = field(default_factory=dict)
    spans: dict[str, np.ndarray] = field(default_factory=dict)
    codec: dict[str, np.ndarray] = field(default_factory=dict)
