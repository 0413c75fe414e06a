"""The kernels' specification in plain NumPy: what every other implementation must equal bit for bit.

Nothing here is fast and nothing here is called by a run. `cpu.py` compiles the pure word and number
functions of this file (hash64 to normal_pair) as they stand, and a GPU kernel repeats them.

**Streams.** A direction has a 128-bit key (k0, k1) from `base.rng.key(seed, "direction", round, step, device, p)`, a
tensor has a 64-bit key t from `base.rng.tensor_key(name)`. `stream_keys` mixes them into the stream key (a, b) by four
Feistel rounds, so for one tensor two directions never share a stream, and each bit of k0, k1 and t changes every bit
of (a, b) with probability 1/2. Word j of a stream is hash64(a, b, j), a bijection of j, so any word can be had
without the ones before it. All integers are unsigned 64-bit and wrap.

**Rademacher.** Coordinate i of a tensor reads bit i % 64 (0 = lowest) of word i // 64: +1 where it is 0, -1 where it
is 1.

**Gaussian.** Coordinates 2m and 2m + 1 are the cosine and the sine half of a Box-Muller pair from word m: radius from
its upper 32 bits, angle from its lower 32 bits, float64 by additions, multiplications, one division and one square
root in the order written, then rounded to float32. No library function and no fused multiply-add, so that every
machine gives the same bits. |z| <= 6.67.

**Arithmetic.** Weights, coefficients and results are float32; each product, sum and difference is rounded to float32 by
itself, in the order written in `base`, `pair` and `update`. Arrays are ranges: element 0 is coordinate `first`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]

_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUND_1 = np.uint64(0x243F6A8885A308D3)
_ROUND_2 = np.uint64(0x13198A2E03707344)
_ROUND_3 = np.uint64(0xA4093822299F31D0)
_ROUND_4 = np.uint64(0x082EFA98EC4E6C89)
_1, _2, _27, _30, _31, _32 = (np.uint64(n) for n in (1, 2, 27, 30, 31, 32))
_LOW_32 = np.uint64(0xFFFFFFFF)
_EIGHTH = np.uint64(1 << 29)
_SQRT_HALF_BITS = np.int64(0x3FE6A09E667F3BCD)
_LN_2 = 0.6931471805599453
_ANGLE = 1.4629180792671596e-09  # 2 pi / 2**32


def mix64(x: Any) -> Any:
    """Return the 64-bit finaliser of x (Stafford's variant 13), a bijection with full avalanche."""
    x = (x ^ (x >> _30)) * _MULTIPLY_1
    x = (x ^ (x >> _27)) * _MULTIPLY_2
    return x ^ (x >> _31)


def hash64(a: Any, b: Any, j: Any) -> Any:
    """Return word j of the stream (a, b)."""
    return mix64(mix64(a + j * _GOLDEN) ^ b)


def feistel(k0: Any, k1: Any, t: Any) -> Any:
    """Return the stream key (a, b) of the direction (k0, k1) in the tensor t, for any t a bijection of (k0, k1)."""
    a = k0 ^ mix64(k1 + t * _GOLDEN + _ROUND_1)
    b = k1 ^ mix64(a + t + _ROUND_2)
    a = a ^ mix64(b + (t ^ _ROUND_3))
    return a, b ^ mix64(a + _ROUND_4)


def log(x: Any) -> Any:
    """Return the natural logarithm of positive normal float64 x, to 1e-14 relative: x = 2**k z, log z = 2 atanh(s)."""
    bits = np.float64(x).view(np.int64)
    k = (bits - _SQRT_HALF_BITS) >> 52
    z = np.int64(bits - (k << 52)).view(np.float64)
    s = (z - 1.0) / (z + 1.0)
    q = s * s
    p = 1.0 / 15.0 + q * (1.0 / 17.0 + q * (1.0 / 19.0))
    p = 1.0 / 9.0 + q * (1.0 / 11.0 + q * (1.0 / 13.0 + q * p))
    p = 1.0 + q * (1.0 / 3.0 + q * (1.0 / 5.0 + q * (1.0 / 7.0 + q * p)))
    return np.float64(k) * _LN_2 + (s + s) * p


def cos_sin(turn: Any) -> Any:
    """Return cos and sin of turn / 2**32 of a circle, for uint64 turn < 2**32, to 1e-15 absolute."""
    quadrant = (turn + _EIGHTH) >> _30
    x = np.float64(np.int64(turn) - np.int64(quadrant << _30)) * _ANGLE  # within pi / 4
    q = x * x
    p = -1.0 / 39916800.0 + q * (1.0 / 6227020800.0 + q * (-1.0 / 1307674368000.0))
    p = -1.0 / 5040.0 + q * (1.0 / 362880.0 + q * p)
    s = x * (1.0 + q * (-1.0 / 6.0 + q * (1.0 / 120.0 + q * p)))
    p = 1.0 / 479001600.0 + q * (-1.0 / 87178291200.0 + q * (1.0 / 20922789888000.0))
    p = -1.0 / 720.0 + q * (1.0 / 40320.0 + q * (-1.0 / 3628800.0 + q * p))
    c = 1.0 + q * (-0.5 + q * (1.0 / 24.0 + q * p))
    odd = np.float64(quadrant & _1)  # exact selections: one factor is 0, the other 1
    flip_cos = 1.0 - np.float64((quadrant + _1) & _2)
    flip_sin = 1.0 - np.float64(quadrant & _2)
    return flip_cos * (c * (1.0 - odd) + s * odd), flip_sin * (s * (1.0 - odd) + c * odd)


def normal_pair(word: Any) -> Any:
    """Return two independent standard normal float32 values from one 64-bit word."""
    radius = np.sqrt(-2.0 * log(np.float64((word >> _32) + _1) * 2.0**-32))
    c, s = cos_sin(word & _LOW_32)
    return np.float32(radius * c), np.float32(radius * s)


def stream_keys(direction_keys: U64, tensor_key: int) -> U64:
    """Return the stream keys uint64 [K, 2] of K directions uint64 [K, 2] in one tensor."""
    a, b = feistel(direction_keys[:, 0], direction_keys[:, 1], np.full(len(direction_keys), tensor_key, np.uint64))
    return np.stack([a, b], axis=1)


def draw(key: U64, first: int, out: F32, gaussian: bool) -> None:
    """Write coordinates first, first + 1, ... of the direction with stream key uint64 [2] to out float32 [n]."""
    i = np.arange(first, first + out.size, dtype=np.uint64)
    per_word = np.uint64(2 if gaussian else 64)
    word = hash64(key[0], key[1], i // per_word)
    if gaussian:
        cos_half, sin_half = normal_pair(word)
        out[:] = np.where(i % _2 == 0, cos_half, sin_half)
    else:
        out[:] = np.where((word >> (i % per_word)) & _1 == 0, np.float32(1), np.float32(-1))


def base(w: F32, first: int, walk_keys: U64, walk_coef: F32, out: F32, gaussian: bool) -> None:
    """Write ((w - c_0 z_0) - c_1 z_1) - ... to out, all float32 [n]; keys uint64 [K, 2], coefficients float32 [K]."""
    z = np.empty_like(out)
    out[:] = w
    for key, c in zip(walk_keys, walk_coef, strict=True):
        draw(key, first, z, gaussian)
        out -= c * z


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
    origin, step = np.empty_like(plus), np.empty_like(plus)
    base(w, first, walk_keys, walk_coef, origin, gaussian)
    draw(key, first, step, gaussian)
    step *= np.float32(scale)
    if guide.size:
        step += np.float32(guide_scale) * guide
    plus[:] = origin + step
    minus[:] = origin - step


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
    for r, row in enumerate(rows):
        part = guide[r] if guide.size else guide.reshape(-1)
        where = int(row) * w.shape[1]
        pair(w[row], where, walk_keys, walk_coef, key, scale, part, guide_scale, plus[r], minus[r], gaussian)


def update(w: F32, first: int, keys: U64, coef: F32, guide: F32, guide_coef: float, gaussian: bool) -> None:
    """Make w, in place, (((w - c_0 z_0) - c_1 z_1) - ...) - guide_coef guide; an empty guide subtracts nothing."""
    base(w, first, keys, coef, w, gaussian)
    if guide.size:
        w -= np.float32(guide_coef) * guide
