"""The kernels on the CPU: what `reference.py` defines, bit for bit, in one pass over memory and without the GIL.

Large ranges are shared between threads at multiples of 64 coordinates. Kernels are compiled at first use (`lazy.py`).
Nothing here chooses keys or coefficients, and arrays of another dtype or layout are refused, never converted.
"""

from __future__ import annotations

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from fedbench.base.errors import FedbenchError
from fedbench.zo.kernels import lazy, loops
from fedbench.zo.kernels.reference import F32, I64, U64

#: Coordinates read per thread, some 0.3 ms. A tile of the stream stays on one thread: torch's own threads spin on their
#: cores between two products, and a thread of another pool would have to wait for them.
_SPLIT = 1 << 20
_NO_GUIDE = np.empty(0, np.float32)


class _Threads:
    """How many threads share a large range, and the pool of the extra ones."""

    count = 1
    pool: ThreadPoolExecutor | None = None


def set_threads(n: int) -> None:
    """Share every large range between n threads from now on; results are the same bits for any n."""
    if n < 1:
        raise FedbenchError(f"kernels.set_threads: found {n} threads; allowed: 1 or more.")
    if _Threads.pool is not None:
        _Threads.pool.shutdown()
    _Threads.count, _Threads.pool = n, None


def prepare(gaussian: bool) -> None:
    """Have every kernel of one distribution ready: read from the cache, or compiled and put there."""
    for compiled in lazy.KERNELS:
        compiled(gaussian)


def _work(n: int, directions: int, gaussian: bool) -> int:
    """Return the work of a call in coordinates read: four sign directions or an eighth of a normal one cost one read."""
    return n + (8 * n * directions if gaussian else n * directions // 4)


def _run(kernel: Any, first: int, grain: int, work: int, fixed: tuple[Any, ...], ranges: tuple[Any, ...]) -> None:
    """Call kernel(first, *fixed, *ranges), the ranges cut at multiples of `grain` where `work` pays for it."""
    threads = min(_Threads.count, work // _SPLIT)
    if threads < 2:
        kernel(first, *fixed, *ranges)
        return
    if _Threads.pool is None:
        _Threads.pool = ThreadPoolExecutor(_Threads.count - 1, thread_name_prefix="fedbench-kernel")
    n = len(ranges[0])
    inner = {(first + n * t // threads) // grain * grain - first for t in range(1, threads)}
    cuts = [0, *sorted(cut for cut in inner if 0 < cut < n), n]
    jobs = [
        functools.partial(kernel, first + low, *fixed, *(part[low:high] for part in ranges))
        for low, high in itertools.pairwise(cuts)
    ]
    others = [_Threads.pool.submit(job) for job in jobs[1:]]
    try:
        jobs[0]()
    finally:
        for other in others:
            other.result()


def _check(n: int, keys: U64, coef: F32, guide: F32, *outputs: F32) -> None:
    """Refuse arguments whose sizes disagree: compiled code would read or write beyond their ends."""
    right = keys.shape == (coef.size, 2) and len(guide) in {0, n}
    if right and all(len(out) == n for out in outputs):
        return
    raise FedbenchError(
        f"kernels: found keys {keys.shape} for {coef.size} coefficients, guide {guide.shape}, outputs "
        f"{[out.shape for out in outputs]}; allowed for a range of {n}: keys [K, 2] for K coefficients, a guide and "
        "outputs of the range's length, or an empty guide."
    )


def stream_keys(direction_keys: U64, tensor_key: int) -> U64:
    """Return the stream keys uint64 [K, 2] of K directions uint64 [K, 2] in one tensor."""
    if not len(direction_keys):
        return direction_keys
    out = np.empty((len(direction_keys), 2), np.uint64)
    loops.stream_keys(False)(np.uint64(tensor_key), direction_keys, out)
    return out


def draw(key: U64, first: int, out: F32, gaussian: bool) -> None:
    """Write coordinates first, first + 1, ... of the direction with stream key uint64 [2] to out float32 [n]."""
    _run(loops.draw(gaussian), first, 64, _work(out.size, 1, gaussian), (key,), (out,))


def base(w: F32, first: int, walk_keys: U64, walk_coef: F32, out: F32, gaussian: bool) -> None:
    """Write ((w - c_0 z_0) - c_1 z_1) - ... to out, all float32 [n]; keys uint64 [K, 2], coefficients float32 [K]."""
    _check(w.size, walk_keys, walk_coef, _NO_GUIDE, out)
    _run(
        loops.base(gaussian),
        first,
        64,
        _work(w.size, len(walk_coef), gaussian),
        (walk_keys, walk_coef, 0.0),
        (w, _NO_GUIDE, out),
    )


def pair(
    w: F32,
    first: int,
    walk_keys: U64,
    walk_coef: F32,
    key: U64,
    scale: float,
    guide: F32,
    guide_scale: float,
    plus: F32,
    minus: F32,
    gaussian: bool,
) -> None:
    """Write base + step and base - step, step = scale z + guide_scale guide; an empty guide adds nothing."""
    _check(w.size, walk_keys, walk_coef, guide, plus, minus)
    _run(
        loops.pair(gaussian),
        first,
        64,
        _work(w.size, len(walk_coef) + 1, gaussian),
        (walk_keys, walk_coef, key, scale, guide_scale),
        (w, guide, plus, minus),
    )


def pair_rows(
    w: F32,
    rows: I64,
    walk_keys: U64,
    walk_coef: F32,
    key: U64,
    scale: float,
    guide: F32,
    guide_scale: float,
    plus: F32,
    minus: F32,
    gaussian: bool,
) -> None:
    """Write what `pair` gives for rows int64 [R] of w [V, cols] to plus, minus [R, cols]; guide [R, cols] or [0, 0]."""
    _check(rows.size, walk_keys, walk_coef, guide, plus, minus)
    if rows.size == 0:
        return
    shapes = {array.shape[1] for array in (w, plus, minus, *((guide,) if guide.size else ()))}
    if len(shapes) > 1 or rows.min() < 0 or rows.max() >= len(w):
        raise FedbenchError(f"kernels: found rows {rows.min()} to {rows.max()} of {w.shape}, columns {sorted(shapes)}.")
    fixed = (walk_keys, walk_coef, key, scale, guide_scale, w)
    work = _work(rows.size * w.shape[1], len(walk_coef) + 1, gaussian)
    _run(loops.pair_rows(gaussian), 0, 1, work, fixed, (rows, guide, plus, minus))


def update(w: F32, first: int, keys: U64, coef: F32, guide: F32, guide_coef: float, gaussian: bool) -> None:
    """Make w, in place, (((w - c_0 z_0) - c_1 z_1) - ...) - guide_coef guide; an empty guide subtracts nothing."""
    _check(w.size, keys, coef, guide)
    _run(loops.base(gaussian), first, 64, _work(w.size, len(coef), gaussian), (keys, coef, guide_coef), (w, guide, w))
