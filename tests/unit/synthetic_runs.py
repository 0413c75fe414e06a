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
    return records.Run(
        config=config,
        provenance=_provenance(),
        summary=_summary(config, table, peak),
        rounds=table,
        devices=_devices(rounds, sampled, uplink, flops),
        memory=_memory(ranks),
        spans=_spans(rounds) if spans else {},
    )


def _rounds(noise: np.random.Generator, rounds: int, every: int, top: float, speed: float) -> dict[str, np.ndarray]:
    number = np.arange(-1, rounds)
    done = number >= 0
    table = {name: np.zeros(rounds + 1, column.dtype) for name, column in records.ROUND_COLUMNS.items()}
    accuracy = top - (top - 0.6) * np.exp(-(number + 1) / speed)
    table["round"] = number.astype("i4")
    table["exchanges"][done] = 1
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


def _spans(rounds: int) -> dict[str, np.ndarray]:
    return {
        "rank": np.zeros(rounds, "i4"),
        "round": np.arange(rounds, dtype="i4"),
        "kind": np.array(["compute", "evaluate"] * rounds)[:rounds],
        "start_s": np.arange(rounds) * 0.1,
        "length_s": np.full(rounds, 0.08),
    }


def _provenance() -> dict[str, Any]:
    return {
        "commit": "0123456789ab",
        "dirty": False,
        "cpu": "Example CPU & Co <v3>",
        "packages": {"torch": "2.13.0", "numpy": "2.4.6"},
        "start_utc": "2026-01-02T03:04:05Z",
        "end_utc": "2026-01-02T03:05:05Z",
    }
