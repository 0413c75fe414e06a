"""`bench update`: K directions subtracted from every trainable tensor in one pass, beside one plain copy."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedbench.bench import harness
from fedbench.bench.harness import Options
from fedbench.bench.models import subject
from fedbench.models.trainable import Trainable
from fedbench.zo.direction import Terms, as_keys, direction_key
from fedbench.zo.update import subtract

#: Numbers of directions.
COUNTS = (1, 4, 16, 64)

_COEFFICIENT = 1e-9


def run(options: Options) -> dict[str, Any]:
    """Return seconds per direction by K, the whole update over one memcpy, and all samples."""
    trainable = subject(options).trainable
    return harness.by_threads(options, lambda asked: _with_threads(trainable, asked))


def _with_threads(trainable: Trainable, options: Options) -> dict[str, Any]:
    target = np.zeros(max(tensor.size for tensor in trainable), np.float32)

    def update(count: int) -> None:
        keys = as_keys([direction_key(0, 0, 0, 0, p) for p in range(count)])
        subtract(trainable, Terms(keys, np.full(count, _COEFFICIENT, np.float32)), gaussian=False)

    def copy() -> None:
        for t in trainable:
            np.copyto(target[: t.size], t.flat)

    arms: dict[str, harness.Arm] = {f"K={count}": _update_arm(update, count) for count in COUNTS}
    samples = harness.measure({**arms, "memcpy": copy}, options.repeats)
    seconds = harness.medians(samples)
    moved = 8.0 * trainable.size
    bandwidth = harness.limits()["bytes_per_s"]
    return {
        "seconds_per_direction": {str(count): seconds[f"K={count}"] / count for count in COUNTS},
        "over_memcpy": {str(k): harness.ratio(samples[f"K={k}"], samples["memcpy"])["value"] for k in COUNTS},
        "bytes": {str(count): moved for count in COUNTS},
        "of_bandwidth": {str(count): moved / seconds[f"K={count}"] / bandwidth for count in COUNTS},
        "entries": trainable.size,
        "medians_s": seconds,
        "samples_s": samples,
    }


def _update_arm(update: Any, count: int) -> harness.Arm:
    return lambda: update(count)
