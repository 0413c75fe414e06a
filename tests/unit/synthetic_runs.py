"""Fabricated but plausible runs for the tests of results and reports."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedbench.base import identity, records, rng
from fedbench.base.config import as_tree
from fedbench.base.job import Config

# method -> (accuracy reached, rounds to get there, uplink bytes a round, device FLOPs a round, cloud seconds)
KINDS = {
    "cooperllm": (0.93, 6.0, 4, 4.1e8, 0.02),
    "cooperllm_plus": (0.94, 7.0, 4, 4.1e8, 0.02),
    "fedmezo": (0.90, 45.0, 4, 4.1e8, 0.0),
    "fedspzo": (0.91, 40.0, 8, 1.9e8, 0.0),
    "public_only": (0.91, 15.0, 0, 0.0, 0.03),
    "fedavg": (0.94, 4.0, 1276000, 6.2e8, 0.0),
}


def make_run(
    method: str = "cooperllm",
    *,
    rounds: int = 60,
    seed: int = 0,
    eval_every: int = 2,
    target: float | None = 0.8,
    ranks: int = 1,
    sampled: int = 4,
    settings: dict[str, Any] | None = None,
    public_labels: str = "given",
    spans: bool = True,
    peak: int | None = 31_000_000,
    codec: dict[str, np.ndarray] | None = None,
    runs_before: int = 0,
) -> records.Run:
    """Return a run with a saturating accuracy curve; shuffled public labels make it stay low."""
    tree = {
        "run": {"rounds": rounds, "seed": seed, "eval_every": eval_every, "target_accuracy": target, "ranks": ranks},
        "federation": {"devices": 8, "sampled": sampled},
        "data": {"public_labels": public_labels},
        "method": {"name": method},
    }
    config = as_tree(Config.model_validate(tree))
    config["method"] = {"name": method, "settings": settings or {"lr": 0.01}}
    top, speed, uplink, flops, cloud_s = KINDS[method]
    if public_labels == "shuffled":
        top = 0.66
    table = _rounds(rng.generator(seed, f"test-{method}-{public_labels}"), rounds, eval_every, top, speed)
    done = table["round"] >= 0
    table["uplink_bytes"][done] = uplink
    table["wire_bytes"][done] = (uplink + 64) * sampled
    table["device_flops"][done] = flops
    table["cloud_s"][done] = cloud_s
    table["round_s"] += table["cloud_s"]
    if ranks > 1:  # the cloud waits while its devices compute
        table["wait_s"] += table["compute_s"]
    return records.Run(
        config=config,
        provenance=_provenance(runs_before),
        summary=_summary(config, table, peak),
        rounds=table,
        devices=_devices(rounds, sampled, uplink, flops),
        memory=_memory(ranks),
        memory_rounds=_memory_rounds(rounds, ranks) if spans else {},
        spans=make_spans(rounds, ranks) if spans else {},
        codec=codec or {},
    )


def _rounds(noise: np.random.Generator, rounds: int, every: int, top: float, speed: float) -> dict[str, np.ndarray]:
    number = np.arange(-1, rounds)
    done = number >= 0
    table = {name: np.zeros(rounds + 1, column.dtype) for name, column in records.ROUND_COLUMNS.items()}
    accuracy = top - (top - 0.6) * np.exp(-(number + 1) / speed)
    table["round"] = number.astype("i4")
    table["exchanges"][done] = table["trained"][done] = 1
    table["dev_accuracy"] = accuracy + noise.normal(0, 0.004, rounds + 1)
    table["test_accuracy"] = accuracy + noise.normal(0, 0.006, rounds + 1)
    table["dev_loss"] = 1.2 - accuracy
    skipped = done & ((number + 1) % every != 0)
    for name in ("dev_accuracy", "test_accuracy", "dev_loss"):
        table[name][skipped] = np.nan
    for name in ("lr", "device_loss", "cloud_loss", "zero_fraction", "query_radius"):
        table[name] = np.where(done, 0.01, np.nan)
    table["downlink_bytes"][done] = 40_000
    table["replay_ops"][done] = 1e6
    for name, seconds in {"compute_s": 0.08, "encode_s": 0.004, "wait_s": 0.012, "apply_s": 0.009}.items():
        table[name] = np.where(done, seconds * noise.uniform(0.9, 1.1, rounds + 1), 0.0)
    table["round_s"] = table["compute_s"] + table["encode_s"] + table["wait_s"] + table["apply_s"]
    return table


def _summary(config: dict[str, Any], table: dict[str, np.ndarray], peak: int | None) -> records.Summary:
    known = np.flatnonzero(np.isfinite(table["dev_accuracy"]))
    target = config["run"]["target_accuracy"]
    reached = [i for i in known if target is not None and table["dev_accuracy"][i] >= target]
    rounds = len(table["round"]) - 1
    return records.Summary(
        run_id=identity.run_id(config),
        method=config["method"]["name"],
        complete=True,
        stop_reason="rounds",
        rounds=rounds,
        seed=config["run"]["seed"],
        ranks=config["run"]["ranks"],
        devices=8,
        final_accuracy=float(table["test_accuracy"][known[-1]]),
        best_accuracy=float(table["test_accuracy"][known[np.argmax(table["dev_accuracy"][known])]]),
        initial_accuracy=float(table["test_accuracy"][0]),
        probe_accuracy=None,
        target_accuracy=target,
        rounds_to_target=int(table["round"][reached[0]]) + 1 if reached else None,
        device_flops=float(table["device_flops"].sum()),
        cloud_flops=0.0,
        replay_ops=float(table["replay_ops"].sum()),
        uplink_bytes=int(table["uplink_bytes"].sum()),
        downlink_bytes=int(table["downlink_bytes"].sum()),
        uplink_bytes_per_device_round=float(table["uplink_bytes"].sum() / rounds),
        wire_bytes=int(table["wire_bytes"].sum()),
        peak_device_bytes=peak,
        round_s_median=float(np.median(table["round_s"][1:])),
        sim_s=None,
        hidden_fraction=None,
        unaccounted_fraction=0.004,
        repeatable=True,
        weights_sha256="a" * 64,
        trajectory_sha256="b" * 64,
    )


def _devices(rounds: int, sampled: int, uplink: int, flops: float) -> dict[str, np.ndarray]:
    shape = (rounds, sampled)
    return {
        "device": np.tile(np.arange(sampled, dtype="i4"), (rounds, 1)),
        "loss": np.full(shape, 0.7),
        "uplink_bytes": np.full(shape, uplink, "i8"),
        "downlink_bytes": np.full(shape, 40_000, "i8"),
        "flops": np.full(shape, flops),
        "compute_s": np.full(shape, 0.02),
        "answered": np.ones(shape, "i4"),
        "sim_s": np.full(shape, np.nan),
        "sim_energy_j": np.full(shape, np.nan),
    }


def _memory(ranks: int) -> dict[str, np.ndarray]:
    phases = ("import", "load", "train")
    return {
        "rank": np.repeat(np.arange(ranks, dtype="i4"), len(phases)),
        "phase": np.array(phases * ranks),
        "peak_bytes": np.array([210_000_000, 230_000_000, 244_000_000] * ranks),
        "above_import_bytes": np.array([0, 20_000_000, 34_000_000] * ranks),
        "weights_bytes": np.array([0, 1_300_000, 1_300_000] * ranks),
    }


def _memory_rounds(rounds: int, ranks: int) -> dict[str, np.ndarray]:
    rank, number = (grid.ravel() for grid in np.mgrid[:ranks, :rounds])
    resident = 230_000_000 + 40_000_000 * (rank == 0) + 10_000 * number
    columns = (rank, number, resident, resident + 5_000_000)
    names = records.MEMORY_ROUND_COLUMNS
    return {name: values.astype(names[name].dtype) for name, values in zip(names, columns, strict=True)}


#: (kind, unit, start_s, length_s) of the cloud and of a device rank in every round; one rank does both.
CLOUD_SPANS = (
    *(("round", "", 0.0, 0.2), ("cloud", "plan", 0.0, 0.05), ("send", "plan", 0.05, 0.012)),
    *(("encode", "plan/embed", 0.05, 0.004), ("encode", "plan/blocks.0.weight", 0.055, 0.006)),
    *(("wait", "upload", 0.062, 0.07), ("account", "", 0.132, 0.002), ("decode", "upload/scalars", 0.132, 0.001)),
    *(("encode", "reply/scalars", 0.134, 0.001), ("apply", "", 0.135, 0.01)),
    *(("account", "", 0.145, 0.05), ("evaluate", "", 0.146, 0.048), ("wait", "agreement", 0.195, 0.005)),
)
DEVICE_SPANS = (
    *(("round", "", 0.0, 0.2), ("compute", "device 3", 0.001, 0.121), ("compute", "embed", 0.002, 0.07)),
    *(("wait", "plan/embed", 0.002, 0.06), ("decode", "plan/embed", 0.062, 0.002)),
    *(("compute", "layer 1", 0.072, 0.05), ("wait", "plan/blocks.0.weight", 0.072, 0.01)),
    *(("decode", "plan/blocks.0.weight", 0.082, 0.002), ("send", "upload", 0.122, 0.002)),
    *(("encode", "upload/scalars", 0.122, 0.001), ("wait", "reply/scalars", 0.125, 0.012)),
    *(("decode", "reply/scalars", 0.137, 0.001), ("apply", "", 0.138, 0.01), ("wait", "agreement", 0.148, 0.05)),
)


def make_spans(rounds: int, ranks: int = 1) -> dict[str, np.ndarray]:
    """Return the spans of the newest three rounds at most."""
    rows = [
        (rank, number, *span)
        for rank in range(ranks)
        for number in range(max(0, rounds - 3), rounds)
        for span in (DEVICE_SPANS if rank else CLOUD_SPANS)
    ]
    names = records.SPAN_COLUMNS
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    return {name: np.array(columns[name], None if c.dtype == "str" else c.dtype) for name, c in names.items()}


def make_codec(rounds: int, bits: tuple[float, ...] = (2.0, 4.0, 8.0)) -> dict[str, np.ndarray]:
    """Return a choice of bits per round and unit: the same in every round."""
    names = np.array([f"model.blocks.{i}.weight#0" for i in range(len(bits))])
    number = np.repeat(np.arange(rounds, dtype="i4"), len(bits))
    return {"round": number, "unit": np.tile(names, rounds), "bits": np.tile(bits, rounds)}


def _provenance(runs_before: int) -> dict[str, Any]:
    return {
        "commit": {"hash": "0123456789abcdef", "dirty": False},
        "cpu": "Example CPU & Co <v3>",
        "packages": {"torch": "2.13.0", "numpy": "2.4.6"},
        "started": "2026-01-02T03:04:05Z",
        "ended": "2026-01-02T03:05:05Z",
        "runs_before": runs_before,
        "model": {"name": "embedded", "trainable_entries": 334848},
    }
