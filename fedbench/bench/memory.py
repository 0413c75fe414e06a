"""What a step holds in memory: inference, zeroth order resident and mapped, and backpropagation, side by side.

Every arm runs in a fresh process and is measured from its start (VmHWM), so that neither the runtime nor the loading
of a model is left out. Repetitions run the arms in alternating order.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedbench.base import account
from fedbench.base.errors import ConfigError, FedbenchError
from fedbench.bench.harness import Options

REPEATS = 2

#: Rows of each stream that a zeroth-order arm runs at a time. Two rows of each hold no more between a block's layers
#: than the reference's whole batch from 4 rows on.
MICRO_BATCH = 2

#: Arm -> what its process computes, and what it does with freed memory: `left` to the allocator; `kept` as in a run of
#: a resident model; `bounded`, where blocks and unused code are given back, as in a run with `model.mapped`.
ARMS: dict[str, tuple[str, str]] = {
    "inference": ("inference", "left"),
    "zo_resident": ("zo_resident", "kept"),
    "zo_mapped": ("zo_mapped", "bounded"),
    "inference_bounded": ("inference", "bounded"),
    "zo_resident_bounded": ("zo_resident", "bounded"),
    "sgd": ("sgd", "left"),
    "adamw": ("adamw", "left"),
    "adamw_bounded": ("adamw", "bounded"),
    "adamw_checkpointing": ("adamw_checkpointing", "left"),
    "adamw_checkpointing_bounded": ("adamw_checkpointing", "bounded"),
}

#: Ratio -> the arms above and below.
RATIOS = {
    "zo_over_inference": ("zo_resident", "inference"),
    "zo_over_adamw": ("zo_resident", "adamw"),
    "mapped_over_resident": ("zo_mapped", "zo_resident"),
    "mapped_over_adamw": ("zo_mapped", "adamw"),
    "zo_over_inference_bounded": ("zo_resident_bounded", "inference_bounded"),
    "mapped_over_resident_bounded": ("zo_mapped", "zo_resident_bounded"),
    "mapped_over_adamw_bounded": ("zo_mapped", "adamw_bounded"),
    "mapped_over_adamw_checkpointing": ("zo_mapped", "adamw_checkpointing"),
    "mapped_over_adamw_checkpointing_bounded": ("zo_mapped", "adamw_checkpointing_bounded"),
}

#: What the published claim says of resident zeroth order against backpropagation with Adam: 86.4 % saved.
CLAIMED = 1 - 0.864

_CURVE_ARMS = ("zo_resident", "zo_mapped", "adamw")
_DEADLINE_S = 1800.0


def run(options: Options) -> dict[str, Any]:
    """Return the ratios of peaks and their parts in bytes, with every sample; a curve over batch and length."""
    samples: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for repetition in range(REPEATS):
        for arm in ARMS if repetition % 2 == 0 else reversed(ARMS):
            samples[arm].append(measure(arm, options))
    arms = {arm: _medians(found) for arm, found in samples.items()}
    return {
        **{name: arms[above]["peak_bytes"] / arms[below]["peak_bytes"] for name, (above, below) in RATIOS.items()},
        "above_runtime": {name: _above(arms[above]) / _above(arms[below]) for name, (above, below) in RATIOS.items()},
        "claimed_over_adamw": CLAIMED,
        "micro_batch": _micro(options.batch),
        "repeats": REPEATS,
        "arms": arms,
        "curve": curve(options, arms),
        "samples": samples,
    }


def curve(options: Options, known: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return peaks over batches and lengths, and whether each keeps the claim; `known` are the arms at `options`."""
    points: dict[str, dict[str, Any]] = {}
    here = (options.batch, options.length)
    shapes = {(4, 64), (4, options.length), (options.batch, 64), here, *((n * here[0], here[1]) for n in (2, 4))}
    largest = int(known["adamw"]["peak_bytes"])
    for batch, length in sorted(shapes):
        wanted, there = largest * batch * length // (here[0] * here[1]), account.available_bytes()
        if there and wanted > there:
            points[f"{batch}x{length}"] = {"left_out": f"AdamW may want {wanted:,} bytes; {there:,} are available"}
            continue
        at = Options(options.model, batch, length, options.trainable, options.threads)
        found = known if (batch, length) == here else {arm: measure(arm, at) for arm in _CURVE_ARMS}
        peaks = {arm: int(found[arm]["peak_bytes"]) for arm in _CURVE_ARMS}
        resident, mapped = (peaks[arm] / peaks["adamw"] for arm in _CURVE_ARMS[:2])
        points[f"{batch}x{length}"] = {
            **{f"{arm}_bytes": peak for arm, peak in peaks.items()},
            "zo_over_adamw": resident,
            "mapped_over_adamw": mapped,
            "claim_holds_resident": resident <= CLAIMED,
            "claim_holds_mapped": mapped <= CLAIMED,
        }
    return points


def measure(arm: str, options: Options) -> dict[str, Any]:
    """Return what one arm held, measured in a process of its own."""
    kind, heap = ARMS[arm]
    model = options.model.removeprefix("shape:")
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-memory-") as folder:
        job = {
            **{"arm": kind, "heap": heap, "model": model, "folder": folder, "micro_batch": _micro(options.batch)},
            **{name: getattr(options, name) for name in ("batch", "length", "trainable", "threads")},
        }
        threads = {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        words = [sys.executable, "-m", "fedbench.bench.memory_child", json.dumps(job)]
        ended = subprocess.run(
            words, env=os.environ | threads, capture_output=True, text=True, timeout=_DEADLINE_S, check=False
        )
    if ended.returncode != 0:
        last = ended.stderr.strip().splitlines()[-1:] or ["no message"]
        raise FedbenchError(f"bench memory: the arm {arm} ended with status {ended.returncode}: {last[0]}")
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def _micro(batch: int) -> int:
    if batch < 2:
        raise ConfigError(f"--batch: found {batch}; allowed for bench memory: 2 or more.")
    return MICRO_BATCH if batch > MICRO_BATCH else 0


def _medians(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    table = {}
    for name in found[0]:
        values = [one[name] for one in found if one[name] is not None]
        middle = float(np.median(values)) if values else None
        table[name] = int(middle) if middle is not None and name.endswith("_bytes") else middle
    return table


def _above(arm: Mapping[str, Any]) -> float:
    return float(arm["peak_bytes"] - arm["runtime_bytes"])
