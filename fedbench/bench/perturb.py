"""`bench perturb`: both perturbed copies of every trainable tensor, beside two plain copies of the same size."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedbench.bench import harness
from fedbench.bench.harness import Options
from fedbench.bench.models import subject
from fedbench.models.trainable import Trainable
from fedbench.zo.direction import as_keys, direction_key
from fedbench.zo.kernels import cpu

_H = 1e-3
_NONE = np.empty(0, np.float32)
_NO_KEYS = np.empty((0, 2), np.uint64)


def run(options: Options) -> dict[str, Any]:
    """Return the ratio of writing both copies to two copies, Rademacher (top) and Gaussian, and all samples."""
    trainable = subject(options).trainable
    return harness.by_threads(options, lambda asked: _with_threads(trainable, asked))


def _with_threads(trainable: Trainable, options: Options) -> dict[str, Any]:
    largest = max(tensor.size for tensor in trainable)
    plus, minus = np.zeros(largest, np.float32), np.zeros(largest, np.float32)
    key = as_keys([direction_key(0, 0, 0, 0, 0)])

    def pair(gaussian: bool) -> None:
        for t in trainable:
            stream = cpu.stream_keys(key, t.key)[0]
            cpu.pair(t.flat, 0, _NO_KEYS, _NONE, stream, _H, _NONE, 0.0, plus[: t.size], minus[: t.size], gaussian)

    def two_copies() -> None:
        for t in trainable:
            np.copyto(plus[: t.size], t.flat)
            np.copyto(minus[: t.size], t.flat)

    samples = harness.measure(
        {"pair": lambda: pair(False), "two_memcpy": two_copies, "pair_gaussian": lambda: pair(True)}, options.repeats
    )
    plain, gaussian = (harness.ratio(samples[name], samples["two_memcpy"]) for name in ("pair", "pair_gaussian"))
    return {
        "ratio_two_memcpy": plain["value"],
        "ratio_two_memcpy_gaussian": gaussian["value"],
        "intervals": {"ratio_two_memcpy": plain, "ratio_two_memcpy_gaussian": gaussian},
        "entries": trainable.size,
        "medians_s": harness.medians(samples),
        "samples_s": samples,
    }
