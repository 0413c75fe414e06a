"""The kernels on the CPU: what `reference.py` defines, bit for bit, in one pass over memory and without the GIL.

A stream word is 64 coordinates, and 64 float32 are one LLVM vector here: the word itself is the mask that picks +c or
-c, so a Rademacher direction never exists in memory. Kernels are compiled at first use, from one signature each, and
kept in a cache folder per user, CPU, Numba version and source; without a writable folder they are compiled anew.
Nothing here chooses keys or coefficients, and arrays of another dtype or layout are refused, never converted.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import operator
import os
import pickle
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_jitable, register_model, type_callable

from fedbench.base.errors import FedbenchError
from fedbench.zo.kernels import reference
from fedbench.zo.kernels.reference import F32, I64, U64, feistel, hash64, normal_pair

_log = logging.getLogger(__name__)

_Decorator = Callable[[Any], Any]
_intrinsic: _Decorator = intrinsic
_plain: _Decorator = register_jitable(error_model="numpy")
_inline: _Decorator = register_jitable(error_model="numpy", forceinline=True)
for _function in (reference.mix64, hash64, feistel, reference.log, reference.cos_sin, normal_pair):
    _inline(_function)

# ---- Blocks: 64 float32 in registers ----

_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, 64)
_MASK = ir.VectorType(ir.IntType(1), 64)


class _Block(types.Type):  # type: ignore[misc]
    """The Numba type of 64 float32 in registers; +, - and * work place by place."""


class _BlockModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


register_model(_Block)(_BlockModel)
_block = _Block("float32x64")
_pointer = types.CPointer(types.float32)


def _operation(symbol: Any, instruction: str) -> None:
    type_callable(symbol)(lambda context: lambda x, y: _block if x == y == _block else None)
    lower_builtin(symbol, _block, _block)(lambda context, b, sig, args: getattr(b, instruction)(*args))


_operation(operator.add, "fadd")
_operation(operator.sub, "fsub")
_operation(operator.mul, "fmul")


def _spread(b: Any, scalar: Any) -> Any:
    one = b.insert_element(ir.Constant(_VECTOR, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    return b.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), 64), [0] * 64))


def _place(b: Any, args: Any) -> Any:
    return b.bitcast(b.gep(args[0], [args[1]]), _VECTOR.as_pointer())


def _copy(b: Any, source: Any, target: Any, low: Any, high: Any) -> None:
    source, target = (b.bitcast(pointer, _FLOAT.as_pointer()) for pointer in (source, target))
    with cgutils.for_range_slice(b, low, high, ir.IntType(64)(1)) as (i, _):
        b.store(b.load(b.gep(source, [i])), b.gep(target, [i]))


@_intrinsic
def _at(typing: Any, array: Any, offset: Any) -> Any:
    """A bare pointer to element `offset` of a contiguous array: unlike an array it costs no reference count."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.gep(context.make_array(sig.args[0])(context, b, args[0]).data, [args[1]])

    return types.CPointer(array.dtype)(array, types.intp), build


@_intrinsic
def _all(typing: Any, c: Any) -> Any:
    """c in all 64 places."""
    return _block(types.float32), lambda context, b, sig, args: _spread(b, args[0])


@_intrinsic
def _signed(typing: Any, word: Any, c: Any) -> Any:
    """+c where the word's bit is 0, -c where it is 1."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.select(b.bitcast(args[0], _MASK), _spread(b, b.fneg(args[1])), _spread(b, args[1]))

    return _block(types.uint64, types.float32), build


@_intrinsic
def _woven(typing: Any, halves: Any) -> Any:
    """Places 0, 32, 1, 33, ... of a block."""
    order = ir.Constant(ir.VectorType(ir.IntType(32), 64), [i // 2 + i % 2 * 32 for i in range(64)])
    return _block(_block), lambda context, b, sig, args: b.shuffle_vector(args[0], args[0], order)


@_intrinsic
def _load(typing: Any, pointer: Any, start: Any) -> Any:
    """64 neighbours from `start` on."""
    return _block(_pointer, types.intp), lambda context, b, sig, args: b.load(_place(b, args), align=4)


@_intrinsic
def _store(typing: Any, pointer: Any, start: Any, value: Any) -> Any:
    """Write a block from `start` on."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        b.store(args[2], _place(b, args), align=4)
        return context.get_dummy_value()

    return types.void(_pointer, types.intp, _block), build


@_intrinsic
def _load_part(typing: Any, pointer: Any, start: Any, low: Any, high: Any) -> Any:
    """The block at `start`, of which places low to high - 1 are read and the others are zero."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        buffer = cgutils.alloca_once(b, _VECTOR)
        b.store(ir.Constant(_VECTOR, None), buffer)
        _copy(b, _place(b, args), buffer, args[2], args[3])
        return b.load(buffer)

    return _block(_pointer, types.intp, types.intp, types.intp), build


@_intrinsic
def _store_part(typing: Any, pointer: Any, start: Any, low: Any, high: Any, value: Any) -> Any:
    """Write places low to high - 1 of the block at `start`."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        buffer = cgutils.alloca_once(b, _VECTOR)
        b.store(args[4], buffer)
        _copy(b, buffer, _place(b, args), args[2], args[3])
        return context.get_dummy_value()

    return types.void(_pointer, types.intp, types.intp, types.intp, _block), build


# ---- Parts of the kernels ----
# Conditions on None are settled at compile time. `gaussian` is None or True: a kernel has one distribution. `part` is
# None for a whole block, else (low, high): the places of a block that lie in the range. Arrays are pointers here.
# `walk` is (K, keys, coefficients), `guide` (is there one, pointer, float32 factor), `z` room for 64 normal values.


@_inline
def _get(pointer: Any, start: int, part: Any) -> Any:
    if part is None:
        return _load(pointer, start)
    return _load_part(pointer, start, part[0], part[1])


@_inline
def _put(pointer: Any, start: int, part: Any, value: Any) -> None:
    if part is None:
        _store(pointer, start, value)
    else:
        _store_part(pointer, start, part[0], part[1], value)


@_plain
def _normals(a: Any, b: Any, j: Any, z: Any) -> None:
    for m in range(32):
        z[m], z[32 + m] = normal_pair(hash64(a, b, j * np.uint64(32) + np.uint64(m)))


@_inline
def _term(a: Any, b: Any, j: int, c: Any, gaussian: Any, z: Any) -> Any:
    """c z for the 64 coordinates of block j."""
    if gaussian is None:
        return _signed(hash64(a, b, np.uint64(j)), c)
    _normals(a, b, np.uint64(j), z)
    return _all(c) * _woven(_load(z, 0))


@_inline
def _walk(w: Any, start: int, part: Any, j: int, walk: Any, gaussian: Any, z: Any) -> Any:
    count, keys, coef = walk
    x = _get(w, start, part)
    for k in range(count):
        x = x - _term(keys[2 * k], keys[2 * k + 1], j, coef[k], gaussian, z)
    return x


@_inline
def _base_block(start: int, part: Any, j: int, walk: Any, guide: Any, gaussian: Any, w: Any, out: Any, z: Any) -> None:
    x = _walk(w, start, part, j, walk, gaussian, z)
    if guide[0]:
        x = x - _all(guide[2]) * _get(guide[1], start, part)
    _put(out, start, part, x)


@_inline
def _pair_block(
    start: int, part: Any, j: int, walk: Any, step: Any, guide: Any, gaussian: Any, w: Any, out: Any, z: Any
) -> None:
    origin = _walk(w, start, part, j, walk, gaussian, z)
    shift = _term(step[0], step[1], j, step[2], gaussian, z)
    if guide[0]:
        shift = shift + _all(guide[2]) * _get(guide[1], start, part)
    _put(out[0], start, part, origin + shift)
    _put(out[1], start, part, origin - shift)


@_inline
def _pair_range(first: int, n: int, walk: Any, step: Any, guide: Any, gaussian: Any, w: Any, out: Any, z: Any) -> None:
    for j in range(first >> 6, (first + n + 63) >> 6):
        start = (j << 6) - first
        if start >= 0 and start + 64 <= n:
            _pair_block(start, None, j, walk, step, guide, gaussian, w, out, z)
        else:
            part = max(0, -start), min(64, n - start)
            _pair_block(start, part, j, walk, step, guide, gaussian, w, out, z)


# ---- Compilation and its cache ----


def _cache_folder(kernel: Any, name: str) -> Path | None:
    """A folder of this user for one build of each kernel, or None where it can't be written.

    One build means that processes that fill it at the same time write the same entries, each file by a rename.
    """
    sources = b"".join(Path(file).read_bytes() for file in (__file__, str(reference.__file__)))
    target = kernel.targetctx.codegen().magic_tuple()
    build = hashlib.sha256(repr((numba.__version__, np.__version__, target)).encode() + sources).hexdigest()[:16]
    home = numba.config.CACHE_DIR or os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(home) / "fedbench" / f"kernels-{build}" / name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return None
    return folder


def _compile(function: Any, arguments: Any, gaussian: bool, cached: bool) -> Any:
    kernel = numba.njit(nogil=True, error_model="numpy")(function)
    folder = _cache_folder(kernel, "gaussian" if gaussian else "rademacher") if cached else None
    if folder is not None:
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
        try:
            kernel.enable_caching()
        finally:
            numba.config.CACHE_DIR = before
    kernel.compile((types.boolean if gaussian else types.none, *arguments))
    kernel.disable_compile()
    return functools.partial(kernel, True if gaussian else None)


_Compiled = Callable[[bool], Any]
_KERNELS: list[_Compiled] = []


def _kernel(*arguments: Any) -> Callable[[Any], _Compiled]:
    """Make a function into one from `gaussian` to its kernel, compiled or read from the cache on the first call."""

    def wrap(function: Any) -> _Compiled:
        @functools.cache
        def compiled(gaussian: bool) -> Any:
            try:
                return _compile(function, arguments, gaussian, cached=True)
            except (OSError, EOFError, RuntimeError, ValueError, pickle.PickleError) as error:
                _log.warning("The kernel cache can't be used (%s: %s): compiling anew.", type(error).__name__, error)
                return _compile(function, arguments, gaussian, cached=False)

        _KERNELS.append(compiled)
        return compiled

    return wrap


# ---- Kernels ----


def _array(kind: Any, dimensions: int, *, writes: bool = False) -> Any:
    return types.Array(kind, dimensions, "C", readonly=not writes)


_IN, _OUT, _IN_2D, _OUT_2D = (_array(types.float32, n, writes=w) for n in (1, 2) for w in (False, True))
_KEY, _KEYS, _ROWS = _array(types.uint64, 1), _array(types.uint64, 2), _array(types.int64, 1)
_WALK = (_KEYS, _IN)
_STEP = (_KEY, types.float64, types.float64)


@_kernel(types.uint64, _KEYS, _array(types.uint64, 2, writes=True))
def _stream_keys(gaussian: Any, tensor_key: Any, direction_keys: Any, out: Any) -> None:
    for k in range(direction_keys.shape[0]):
        out[k, 0], out[k, 1] = feistel(direction_keys[k, 0], direction_keys[k, 1], tensor_key)


@_kernel(types.int64, _KEY, _OUT)
def _draw(gaussian: Any, first: int, key: Any, out: Any) -> None:
    normals = np.empty(64, np.float32)
    z, target, n, a, b = _at(normals, 0), _at(out, 0), out.size, key[0], key[1]
    for j in range(first >> 6, (first + n + 63) >> 6):
        start = (j << 6) - first
        _store_part(target, start, max(0, -start), min(64, n - start), _term(a, b, j, np.float32(1), gaussian, z))


@_kernel(types.int64, *_WALK, types.float64, _IN, _IN, _OUT)
def _base(gaussian: Any, first: int, keys: Any, coef: Any, guide_coef: Any, w: Any, guide: Any, out: Any) -> None:
    normals = np.empty(64, np.float32)
    z, source, target, n = _at(normals, 0), _at(w, 0), _at(out, 0), w.size
    walk = coef.size, _at(keys, 0), _at(coef, 0)
    pull = guide.size > 0, _at(guide, 0), np.float32(guide_coef)
    for j in range(first >> 6, (first + n + 63) >> 6):
        start = (j << 6) - first
        if start >= 0 and start + 64 <= n:
            _base_block(start, None, j, walk, pull, gaussian, source, target, z)
        else:
            _base_block(start, (max(0, -start), min(64, n - start)), j, walk, pull, gaussian, source, target, z)


@_kernel(types.int64, *_WALK, *_STEP, _IN, _IN, _OUT, _OUT)
def _pair(
    gaussian: Any,
    first: int,
    keys: Any,
    coef: Any,
    key: Any,
    scale: Any,
    guide_scale: Any,
    w: Any,
    guide: Any,
    plus: Any,
    minus: Any,
) -> None:
    normals = np.empty(64, np.float32)
    walk = coef.size, _at(keys, 0), _at(coef, 0)
    step = key[0], key[1], np.float32(scale)
    pull = guide.size > 0, _at(guide, 0), np.float32(guide_scale)
    out = _at(plus, 0), _at(minus, 0)
    _pair_range(first, w.size, walk, step, pull, gaussian, _at(w, 0), out, _at(normals, 0))


@_kernel(types.int64, *_WALK, *_STEP, _IN_2D, _ROWS, _IN_2D, _OUT_2D, _OUT_2D)
def _pair_rows(
    gaussian: Any,
    first: int,
    keys: Any,
    coef: Any,
    key: Any,
    scale: Any,
    guide_scale: Any,
    w: Any,
    rows: Any,
    guide: Any,
    plus: Any,
    minus: Any,
) -> None:
    normals = np.empty(64, np.float32)
    walk = coef.size, _at(keys, 0), _at(coef, 0)
    step = key[0], key[1], np.float32(scale)
    cols = w.shape[1]
    for r in range(rows.size):
        where, here = rows[r] * cols, r * cols
        pull = guide.size > 0, _at(guide, here), np.float32(guide_scale)
        out = _at(plus, here), _at(minus, here)
        _pair_range(where, cols, walk, step, pull, gaussian, _at(w, where), out, _at(normals, 0))


# ---- What the engine calls ----

_SPLIT = 1 << 16  # below this many coordinates per thread a second thread costs more than it saves
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
    for compiled in _KERNELS:
        compiled(gaussian)


def _run(kernel: Any, first: int, grain: int, work: int, fixed: tuple[Any, ...], ranges: tuple[Any, ...]) -> None:
    """Call kernel(first, *fixed, *ranges), the ranges cut at multiples of `grain` where the work pays for it."""
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
    out = np.empty((len(direction_keys), 2), np.uint64)
    _stream_keys(False)(np.uint64(tensor_key), direction_keys, out)
    return out


def draw(key: U64, first: int, out: F32, gaussian: bool) -> None:
    """Write coordinates first, first + 1, ... of the direction with stream key uint64 [2] to out float32 [n]."""
    _run(_draw(gaussian), first, 64, out.size, (key,), (out,))


def base(w: F32, first: int, walk_keys: U64, walk_coef: F32, out: F32, gaussian: bool) -> None:
    """Write ((w - c_0 z_0) - c_1 z_1) - ... to out, all float32 [n]; keys uint64 [K, 2], coefficients float32 [K]."""
    _check(w.size, walk_keys, walk_coef, _NO_GUIDE, out)
    _run(_base(gaussian), first, 64, w.size, (walk_keys, walk_coef, 0.0), (w, _NO_GUIDE, out))


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
        _pair(gaussian),
        first,
        64,
        w.size,
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
    _run(_pair_rows(gaussian), 0, 1, rows.size * w.shape[1], fixed, (rows, guide, plus, minus))


def update(w: F32, first: int, keys: U64, coef: F32, guide: F32, guide_coef: float, gaussian: bool) -> None:
    """Make w, in place, (((w - c_0 z_0) - c_1 z_1) - ...) - guide_coef guide; an empty guide subtracts nothing."""
    _check(w.size, keys, coef, guide)
    _run(_base(gaussian), first, 64, w.size, (keys, coef, guide_coef), (w, guide, w))
