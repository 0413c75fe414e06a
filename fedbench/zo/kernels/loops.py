"""The compiled loops of `cpu.py`: one pass over a range, blocks of 64 coordinates in registers, directions never stored.

Each kernel has one signature and one distribution. Sizes are the caller's business: nothing is checked here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import register_jitable

from fedbench.zo.kernels import reference
from fedbench.zo.kernels.blocks import all_places, at, load, load_part, signed, store, store_part, woven
from fedbench.zo.kernels.lazy import lazy_kernel
from fedbench.zo.kernels.reference import feistel, hash64, normal_pair

_Decorator = Callable[[Any], Any]
_plain: _Decorator = register_jitable(error_model="numpy")
_inline: _Decorator = register_jitable(error_model="numpy", forceinline=True)
for _function in (reference.mix64, hash64, feistel, reference.log, reference.cos_sin, normal_pair):
    _inline(_function)

# ---- Parts of the kernels ----
# Conditions on None are settled at compile time. `gaussian` is None or True: a kernel has one distribution. `part` is
# None for a whole block, else (low, high): the places of a block that lie in the range. Arrays are pointers here.
# `walk` is (K, keys, coefficients), `guide` (is there one, pointer, float32 factor), `z` room for 64 normal values.


@_inline
def _get(pointer: Any, start: int, part: Any) -> Any:
    if part is None:
        return load(pointer, start)
    return load_part(pointer, start, part[0], part[1])


@_inline
def _put(pointer: Any, start: int, part: Any, value: Any) -> None:
    if part is None:
        store(pointer, start, value)
    else:
        store_part(pointer, start, part[0], part[1], value)


@_plain
def _normals(a: Any, b: Any, j: Any, z: Any) -> None:
    for m in range(32):
        z[m], z[32 + m] = normal_pair(hash64(a, b, j * np.uint64(32) + np.uint64(m)))


@_inline
def _term(a: Any, b: Any, j: int, c: Any, gaussian: Any, z: Any) -> Any:
    """c z for the 64 coordinates of block j."""
    if gaussian is None:
        return signed(hash64(a, b, np.uint64(j)), c)
    _normals(a, b, np.uint64(j), z)
    return all_places(c) * woven(load(z, 0))


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
        x = x - all_places(guide[2]) * _get(guide[1], start, part)
    _put(out, start, part, x)


@_inline
def _pair_block(
    start: int, part: Any, j: int, walk: Any, step: Any, guide: Any, gaussian: Any, w: Any, out: Any, z: Any
) -> None:
    origin = _walk(w, start, part, j, walk, gaussian, z)
    shift = _term(step[0], step[1], j, step[2], gaussian, z)
    if guide[0]:
        shift = shift + all_places(guide[2]) * _get(guide[1], start, part)
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


# ---- Kernels ----


def _array(kind: Any, dimensions: int, *, writes: bool = False) -> Any:
    return types.Array(kind, dimensions, "C", readonly=not writes)


_IN, _OUT, _IN_2D, _OUT_2D = (_array(types.float32, n, writes=w) for n in (1, 2) for w in (False, True))
_KEY, _KEYS, _ROWS = _array(types.uint64, 1), _array(types.uint64, 2), _array(types.int64, 1)
_WALK = (_KEYS, _IN)
_STEP = (_KEY, types.float64, types.float64)


@lazy_kernel(types.uint64, _KEYS, _array(types.uint64, 2, writes=True))
def stream_keys(gaussian: Any, tensor_key: Any, direction_keys: Any, out: Any) -> None:
    """Write the key of one tensor's stream for each of some directions, uint64 [K, 2]."""
    for k in range(direction_keys.shape[0]):
        out[k, 0], out[k, 1] = feistel(direction_keys[k, 0], direction_keys[k, 1], tensor_key)


@lazy_kernel(types.int64, _KEY, _OUT)
def draw(gaussian: Any, first: int, key: Any, out: Any) -> None:
    """Write a range of a direction's entries, float32 [n]."""
    normals = np.empty(64, np.float32)
    z, target, n, a, b = at(normals, 0), at(out, 0), out.size, key[0], key[1]
    for j in range(first >> 6, (first + n + 63) >> 6):
        start = (j << 6) - first
        store_part(target, start, max(0, -start), min(64, n - start), _term(a, b, j, np.float32(1), gaussian, z))


@lazy_kernel(types.int64, *_WALK, types.float64, _IN, _IN, _OUT)
def base(gaussian: Any, first: int, keys: Any, coef: Any, guide_coef: Any, w: Any, guide: Any, out: Any) -> None:
    """Write a range of w less the walk: the sum of coef[k] z(keys[k]), and guide_coef times the guide."""
    normals = np.empty(64, np.float32)
    z, source, target, n = at(normals, 0), at(w, 0), at(out, 0), w.size
    walk = coef.size, at(keys, 0), at(coef, 0)
    pull = guide.size > 0, at(guide, 0), np.float32(guide_coef)
    for j in range(first >> 6, (first + n + 63) >> 6):
        start = (j << 6) - first
        if start >= 0 and start + 64 <= n:
            _base_block(start, None, j, walk, pull, gaussian, source, target, z)
        else:
            _base_block(start, (max(0, -start), min(64, n - start)), j, walk, pull, gaussian, source, target, z)


@lazy_kernel(types.int64, *_WALK, *_STEP, _IN, _IN, _OUT, _OUT)
def pair(
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
    """Write both copies of a range: w less the walk, plus and minus the step, which is scale z and guide_scale guide."""
    normals = np.empty(64, np.float32)
    walk = coef.size, at(keys, 0), at(coef, 0)
    step = key[0], key[1], np.float32(scale)
    pull = guide.size > 0, at(guide, 0), np.float32(guide_scale)
    out = at(plus, 0), at(minus, 0)
    _pair_range(first, w.size, walk, step, pull, gaussian, at(w, 0), out, at(normals, 0))


@lazy_kernel(types.int64, *_WALK, *_STEP, _IN_2D, _ROWS, _IN_2D, _OUT_2D, _OUT_2D)
def pair_rows(
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
    """Write both copies of some rows of a matrix, each as `pair` writes a range."""
    normals = np.empty(64, np.float32)
    walk = coef.size, at(keys, 0), at(coef, 0)
    step = key[0], key[1], np.float32(scale)
    cols = w.shape[1]
    for r in range(rows.size):
        where, here = rows[r] * cols, r * cols
        pull = guide.size > 0, at(guide, here), np.float32(guide_scale)
        out = at(plus, here), at(minus, here)
        _pair_range(where, cols, walk, step, pull, gaussian, at(w, where), out, at(normals, 0))
