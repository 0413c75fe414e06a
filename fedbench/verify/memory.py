"""Claims on memory, from the bench's own arms, each in a fresh process: a zeroth-order step against AdamW."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedbench.base import fsio, provenance
from fedbench.bench import memory
from fedbench.bench.harness import Options
from fedbench.verify.claims import Claim, Goal, Measured, Peaks
from fedbench.verify.tasks import MEMORY, Shape

ARMS = ("adamw", "zo_resident", "zo_mapped")
_THREADS = 2
_WAYS = {"weights resident": "zo_resident", "weights mapped": "zo_mapped"}


def saved(peaks: Peaks) -> Mapping[str, Measured]:
    """Return per cent of AdamW's peak that a zeroth-order step does without."""
    return {way: _over_repetitions(peaks, arm, lambda zo, adamw: 100 * (1 - zo / adamw)) for way, arm in _WAYS.items()}


def smaller(peaks: Peaks) -> Mapping[str, Measured]:
    """Return AdamW's peak over that of a zeroth-order step."""
    return {way: _over_repetitions(peaks, arm, lambda zo, adamw: adamw / zo) for way, arm in _WAYS.items()}


def peaks_of(shape: Shape, folder: Path) -> tuple[Peaks, dict[str, Any]]:
    """Return peak bytes by arm and repetition, and where they come from; what `folder` holds already is read.

    Arms run in alternating order, as in `fedbench bench memory`; a quick look takes each once.
    """
    path = folder / f"{shape.model}-{shape.batch}x{shape.length}.json"
    if path.exists():
        tree = json.loads(path.read_text(encoding="utf-8"))
        return tree["peaks"], tree["provenance"]
    options = Options(shape.model, shape.batch, shape.length, threads=_THREADS)
    peaks: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for repetition in range(1 if shape.quick else memory.REPEATS):
        for arm in ARMS if repetition % 2 == 0 else reversed(ARMS):
            peaks[arm].append(float(memory.measure(arm, options)["peak_bytes"]))
    origin = provenance.collect({"ended": provenance.now()})
    fsio.write_text(path, json.dumps({"peaks": peaks, "provenance": origin}, indent=2) + "\n")
    return peaks, origin


def _over_repetitions(peaks: Peaks, arm: str, ratio: Callable[[float, float], float]) -> Measured:
    each = [ratio(zo, adamw) for zo, adamw in zip(peaks[arm], peaks["adamw"], strict=True)]
    middle = {name: float(np.median(peaks[name])) for name in (arm, "adamw")}
    told = f"{arm} {middle[arm] / 1e6:.0f} MB, AdamW {middle['adamw'] / 1e6:.0f} MB, process and runtime included."
    return Measured(ratio(middle[arm], middle["adamw"]), min(each), max(each), detail=(told,))


_claim = partial(Claim, shapes=MEMORY)

CLAIMS = (
    _claim(
        "cooperllm.memory",
        "up to 86.4 % less memory on a device; model, batch and reference are not said",
        Goal("at least 86.4 % less than backpropagation with AdamW", 86.4, "%", 0.0),
        weigh=saved,
    ),
    _claim(
        "mezo.memory",
        "up to 12 times less memory than fine-tuning with Adam (OPT-13B)",
        Goal("at least 12 times less than backpropagation with AdamW", 12.0, "times", 1.0),
        weigh=smaller,
    ),
    _claim(
        "fwdllm.memory",
        "14.6 times less memory than backpropagation (4.6 in another print of the same abstract)",
        Goal("at least 14.6 times less than backpropagation with AdamW", 14.6, "times", 1.0),
        weigh=smaller,
    ),
)
