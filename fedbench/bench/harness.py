"""How the micro-benchmarks measure: arms side by side in one process, in alternating order, medians with intervals.

An arm is a function without arguments. Every repetition runs every arm once, forwards and
backwards in turn, so that a slow stretch of the machine hits all of them; ratios are formed
within a repetition. Nothing here knows what is measured, and nothing prints.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from fedbench.base import account, stats
from fedbench.zo.kernels import cpu

Arm = Callable[[], object]

#: Threads that every benchmark reports, whatever `--threads` says.
THREADS = (1, 2)


@dataclass(frozen=True)
class Options:
    """What the command line says of a benchmark; `link` is a rate such as 100Mbit/s."""

    model: str = "opt-125m"
    batch: int = 16
    length: int = 64
    trainable: str = "full"
    threads: int = 2
    ranks: int = 2
    repeats: int = 6
    link: str | None = None

    def tree(self) -> dict[str, Any]:
        """Return the options as JSON holds them."""
        return asdict(self)


def measure(arms: Mapping[str, Arm], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of every arm in every repetition, after one unmeasured run of each."""
    for arm in arms.values():
        arm()
    samples: dict[str, list[float]] = {name: [] for name in arms}
    order = list(arms)
    gc.disable()
    try:
        for repetition in range(repeats):
            for name in order if repetition % 2 == 0 else reversed(order):
                start = time.perf_counter()
                arms[name]()
                samples[name].append(time.perf_counter() - start)
            gc.collect()
    finally:
        gc.enable()
    return samples


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float | None]:
    """Return the median of the ratios within repetitions, with its 95 % rank interval (None for fewer than 6)."""
    middle = stats.median(np.asarray(above) / np.asarray(below))
    return {"value": middle.value, "low": middle.low, "high": middle.high}


def medians(samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median seconds of every arm."""
    return {name: float(np.median(values)) for name, values in samples.items()}


def by_threads(options: Options, one: Callable[[Options], dict[str, Any]]) -> dict[str, Any]:
    """Return `one` measured with 1, 2 and `--threads` threads: that of `--threads` on top, each as `threads_T` below."""
    account.keep_heap()
    results = {}
    for threads in sorted({*THREADS, options.threads}):
        account.use_threads(threads)
        cpu.set_threads(threads)
        results[threads] = one(options)
    return {**results[options.threads], **{f"threads_{threads}": found for threads, found in results.items()}}


def limits(repeats: int = 6) -> dict[str, float]:
    """Return what this machine reaches with the current threads.

    `bytes_per_s`: n read and n written by a pass in place over 256 MiB (a copy would first read what it overwrites);
    `flops_per_s`: a large product.
    """
    memory = np.ones(64 * 2**20, np.float32)
    a, b, out = torch.ones(1024, 1536), torch.ones(1536, 1536), torch.empty(1024, 1536)
    seconds = medians(
        measure({"pass": lambda: np.negative(memory, out=memory), "product": lambda: torch.mm(a, b, out=out)}, repeats)
    )
    return {
        "bytes_per_s": 2 * memory.nbytes / seconds["pass"],
        "flops_per_s": 2 * 1024 * 1536 * 1536 / seconds["product"],
    }
