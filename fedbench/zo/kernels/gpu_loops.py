"""The Triton kernels of `gpu.py`: one pass over a range, `reference.py` repeated operation by operation.

A program works on a block [words, coordinates of a word], so that the 64 signs of a word share its hash. Sizes are the
caller's business: nothing is checked here. Contraction to fused multiply-adds must be off at launch. Without triton
this file can still be imported, and nothing in it can be called.
"""

from __future__ import annotations

import importlib.util
from typing import Any

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    _jit: Any = triton.jit
else:

    def _jit(function: Any) -> Any:
        return function


# ---- Words and numbers: as in reference.py, integers unsigned ----


@_jit
def _mix64(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@_jit
def _log(x):
    bits = x.to(tl.int64, bitcast=True)
    k = (bits - 0x3FE6A09E667F3BCD) >> 52
    z = (bits - (k << 52)).to(tl.float64, bitcast=True)
    s = (z - 1.0) / (z + 1.0)
    q = s * s
    p = 1.0 / 15.0 + q * (1.0 / 17.0 + q * (1.0 / 19.0))
    p = 1.0 / 9.0 + q * (1.0 / 11.0 + q * (1.0 / 13.0 + q * p))
    p = 1.0 + q * (1.0 / 3.0 + q * (1.0 / 5.0 + q * (1.0 / 7.0 + q * p)))
    return k.to(tl.float64) * 0.6931471805599453 + (s + s) * p


@_jit
def _normal_pair(word):
    radius = tl.sqrt(-2.0 * _log(((word >> 32) + 1).to(tl.float64) * 2.3283064365386963e-10))  # 2 ** -32
    turn = word & 0xFFFFFFFF
    quadrant = (turn + 0x20000000) >> 30
    x = (turn.to(tl.int64) - (quadrant << 30).to(tl.int64)).to(tl.float64) * 1.4629180792671596e-09
    q = x * x
    p = -1.0 / 39916800.0 + q * (1.0 / 6227020800.0 + q * (-1.0 / 1307674368000.0))
    p = -1.0 / 5040.0 + q * (1.0 / 362880.0 + q * p)
    s = x * (1.0 + q * (-1.0 / 6.0 + q * (1.0 / 120.0 + q * p)))
    p = 1.0 / 479001600.0 + q * (-1.0 / 87178291200.0 + q * (1.0 / 20922789888000.0))
    p = -1.0 / 720.0 + q * (1.0 / 40320.0 + q * (-1.0 / 3628800.0 + q * p))
    c = 1.0 + q * (-0.5 + q * (1.0 / 24.0 + q * p))
    odd = (quadrant & 1).to(tl.float64)  # exact selections: one factor is 0, the other 1
    flip_cos = 1.0 - ((quadrant + 1) & 2).to(tl.float64)
    flip_sin = 1.0 - (quadrant & 2).to(tl.float64)
    cos = flip_cos * (c * (1.0 - odd) + s * odd)
    sin = flip_sin * (s * (1.0 - odd) + c * odd)
    return (radius * cos).to(tl.float32), (radius * sin).to(tl.float32)


@_jit
def _z(a, b, word, lane, GAUSSIAN: tl.constexpr):
    """Coordinates of the stream (a, b): words uint64 [W, 1] by places uint64 [1, coordinates of a word]."""
    a = tl.cast(a, tl.int64).to(tl.uint64, bitcast=True)
    b = tl.cast(b, tl.int64).to(tl.uint64, bitcast=True)
    bits = _mix64(_mix64(a + word * 0x9E3779B97F4A7C15) ^ b)
    if GAUSSIAN:
        cos, sin = _normal_pair(bits)
        return tl.where(lane == 0, cos, sin)
    return tl.where(((bits >> lane) & 1) == 0, 1.0, -1.0)


# ---- Parts of the kernels ----


@_jit
def _places(first, n, chunk, ALIGNED: tl.constexpr, GAUSSIAN: tl.constexpr, WORDS: tl.constexpr):
    """Words, places in them, offsets from coordinate `first`, and which of those lie in a range of n.

    ALIGNED: `first` begins a word. The compiler then sees that offsets do too, moves four floats at a time and makes
    one hash for them.
    """
    EACH: tl.constexpr = 2 if GAUSSIAN else 64
    first = tl.cast(first, tl.int64)
    word = chunk.to(tl.int64) * WORDS + tl.arange(0, WORDS)[:, None]
    lane = tl.arange(0, EACH)[None, :]
    offset = word * EACH + lane
    if ALIGNED:
        inside = offset < n
    else:
        offset -= first % EACH
        inside = (offset >= 0) & (offset < n)
    return (first // EACH + word).to(tl.uint64), lane.to(tl.uint64), offset, inside


@_jit
def _walk(x, keys, coef, count, word, lane, GAUSSIAN: tl.constexpr):
    """((x - c_0 z_0) - c_1 z_1) - ..."""
    for k in range(count):
        x = x - tl.load(coef + k) * _z(tl.load(keys + 2 * k), tl.load(keys + 2 * k + 1), word, lane, GAUSSIAN)
    return x


# ---- Kernels ----


@_jit
def draw(keys, first, n, out, ALIGNED: tl.constexpr, GAUSSIAN: tl.constexpr, WORDS: tl.constexpr):
    """Write a range of a direction's entries, float32 [n]."""
    word, lane, offset, inside = _places(first, n, tl.program_id(0), ALIGNED, GAUSSIAN, WORDS)
    tl.store(out + offset, _z(tl.load(keys), tl.load(keys + 1), word, lane, GAUSSIAN), inside)


@_jit
def base(
    first, n, keys, coef, count, guide_coef, w, guide, out,
    GUIDED: tl.constexpr, ALIGNED: tl.constexpr, GAUSSIAN: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Write a range of w less the walk: the sum of coef[k] z(keys[k]), and guide_coef times the guide."""
    word, lane, offset, inside = _places(first, n, tl.program_id(0), ALIGNED, GAUSSIAN, WORDS)
    x = _walk(tl.load(w + offset, inside, 0.0), keys, coef, count, word, lane, GAUSSIAN)
    if GUIDED:
        x = x - guide_coef * tl.load(guide + offset, inside, 0.0)
    tl.store(out + offset, x, inside)


@_jit
def pair(
    first, n, chunks, rows, keys, coef, count, a, b, scale, guide_scale, w, guide, plus, minus,
    PICKED: tl.constexpr, GUIDED: tl.constexpr, ALIGNED: tl.constexpr, GAUSSIAN: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """PICKED: a row of n columns for each of some rows of w, else one range of n that starts at `first`."""
    program = tl.program_id(0)
    if PICKED:
        row = (program // chunks).to(tl.int64)
        first = tl.load(rows + row) * n
        w += first
        guide += row * n
        plus += row * n
        minus += row * n
    word, lane, offset, inside = _places(first, n, program % chunks, ALIGNED, GAUSSIAN, WORDS)
    origin = _walk(tl.load(w + offset, inside, 0.0), keys, coef, count, word, lane, GAUSSIAN)
    step = scale * _z(a, b, word, lane, GAUSSIAN)
    if GUIDED:
        step = step + guide_scale * tl.load(guide + offset, inside, 0.0)
    tl.store(plus + offset, origin + step, inside)
    tl.store(minus + offset, origin - step, inside)
