"""The kernels on the GPU: what `reference.py` defines, bit for bit, on torch tensors that stay where they are.

The functions are those of `cpu.py`. Ranges are float32 tensors of one device; keys and coefficients come from the host
and are copied there, some bytes a direction. Triton is imported when the first kernel is asked for, never before.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedbench.base.errors import ConfigError, FedbenchError
from fedbench.zo.kernels import cpu
from fedbench.zo.kernels.reference import F32, U64

#: Words of one program: 2,048 signs or 1,024 normal values. Bits do not depend on it.
SIGN_WORDS, NORMAL_WORDS = 32, 512

#: No contraction to fused multiply-adds: each product and sum is rounded by itself, as everywhere else.
_LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}

#: Stream keys uint64 [K, 2] of K directions uint64 [K, 2] in one tensor, on the host: a few words a direction.
stream_keys = cpu.stream_keys


@functools.cache
def _loops() -> Any:
    try:
        import triton  # noqa: F401  (asked for here, so that its absence is one sentence)
    except ImportError:
        raise ConfigError(
            "model.device = 'cuda' needs triton, which is not installed. Run: pip install 'fedbench[gpu]'"
        ) from None
    from fedbench.zo.kernels import gpu_loops

    return gpu_loops


def prepare(gaussian: bool, device: torch.device | str = "cuda") -> None:
    """Have every kernel of one distribution compiled for a device; ConfigError where triton is missing."""
    w, none = torch.zeros(1, 64, device=device), torch.empty(0, 0, device=device)
    keys, coef, rows = np.ones((1, 2), np.uint64), np.zeros(1, np.float32), torch.zeros(1, dtype=torch.int64)
    flat = w[0]
    draw(keys[0], 0, flat, gaussian)
    for guide in (flat, none.view(-1)):
        update(flat, 0, keys, coef, guide, 0.0, gaussian)
        pair(flat, 0, keys, coef, keys[0], 0.0, guide, 0.0, flat.clone(), flat.clone(), gaussian)
    for picked in (w, none):
        copies = w.clone(), w.clone()
        pair_rows(w, rows.to(device), keys, coef, keys[0], 0.0, picked, 0.0, *copies, gaussian)


def draw(key: U64, first: int, out: Tensor, gaussian: bool) -> None:
    """Write coordinates first, first + 1, ... of the direction with stream key uint64 [2] to out float32 [n]."""
    _check(out.numel(), key[None], _NO_COEF[:1], out[:0], out)
    chunks, how = _plan(first, out.numel(), gaussian)
    if out.numel():
        _launch("draw", chunks, out, _signed(key, out.device), first, out.numel(), out, **how)


def base(w: Tensor, first: int, walk_keys: U64, walk_coef: F32, out: Tensor, gaussian: bool) -> None:
    """Write ((w - c_0 z_0) - c_1 z_1) - ... to out, all float32 [n]; keys uint64 [K, 2], coefficients float32 [K]."""
    _base(w, first, walk_keys, walk_coef, w[:0], 0.0, out, gaussian)


def pair(
    w: Tensor,
    first: int,
    walk_keys: U64,
    walk_coef: F32,
    key: U64,
    scale: float,
    guide: Tensor,
    guide_scale: float,
    plus: Tensor,
    minus: Tensor,
    gaussian: bool,
) -> None:
    """Write base + step and base - step, step = scale z + guide_scale guide; an empty guide adds nothing."""
    _check(w.numel(), walk_keys, walk_coef, guide, w, plus, minus)
    chunks, how = _plan(first, w.numel(), gaussian)
    if w.numel():
        terms = _terms(walk_keys, walk_coef, key, scale, guide_scale, w.device)
        ranges, guided = (w, guide if len(guide) else w, plus, minus), len(guide) > 0
        where = (first, w.numel(), chunks, w)
        _launch("pair", chunks, w, *where, *terms, *ranges, PICKED=False, GUIDED=guided, **how)


def pair_rows(
    w: Tensor,
    rows: Tensor,
    walk_keys: U64,
    walk_coef: F32,
    key: U64,
    scale: float,
    guide: Tensor,
    guide_scale: float,
    plus: Tensor,
    minus: Tensor,
    gaussian: bool,
) -> None:
    """Write what `pair` gives for rows int64 [R] of w [V, cols] to plus, minus [R, cols]; guide [R, cols] or [0, 0]."""
    count, columns = len(rows), w.shape[1]
    _check(count * columns, walk_keys, walk_coef, guide, plus, minus)
    _check(w.numel(), walk_keys, walk_coef, w[:0], w)
    if count == 0 or columns == 0:
        return
    low, high = (int(n) for n in torch.aminmax(rows))
    if rows.dtype != torch.int64 or plus.shape[1] != columns or low < 0 or high >= len(w):
        raise FedbenchError(
            f"kernels: found rows {low} to {high} ({rows.dtype}) of {tuple(w.shape)}, outputs {tuple(plus.shape)}."
        )
    chunks, how = _plan(columns, columns, gaussian)
    terms = _terms(walk_keys, walk_coef, key, scale, guide_scale, w.device)
    ranges, guided = (w, guide if len(guide) else w, plus, minus), len(guide) > 0
    where = (0, columns, chunks, rows.contiguous())
    _launch("pair", count * chunks, w, *where, *terms, *ranges, PICKED=True, GUIDED=guided, **how)


def update(w: Tensor, first: int, keys: U64, coef: F32, guide: Tensor, guide_coef: float, gaussian: bool) -> None:
    """Make w, in place, (((w - c_0 z_0) - c_1 z_1) - ...) - guide_coef guide; an empty guide subtracts nothing."""
    _base(w, first, keys, coef, guide, guide_coef, w, gaussian)


_NO_COEF = np.zeros(1, np.float32)


def _base(
    w: Tensor, first: int, keys: U64, coef: F32, guide: Tensor, guide_coef: float, out: Tensor, gaussian: bool
) -> None:
    _check(w.numel(), keys, coef, guide, w, out)
    chunks, how = _plan(first, w.numel(), gaussian)
    if w.numel():
        walk = _signed(keys, w.device), torch.tensor(coef, device=w.device), len(coef)
        ranges, guided = (w, guide if len(guide) else w, out), len(guide) > 0
        factor = float(np.float32(guide_coef))
        _launch("base", chunks, w, first, w.numel(), *walk, factor, *ranges, GUIDED=guided, **how)


def _launch(name: str, programs: int, there: Tensor, *arguments: Any, **how: Any) -> None:
    """Start a kernel on the device of a tensor, behind what was asked of it before."""
    with torch.cuda.device_of(there):  # type: ignore[no-untyped-call]
        getattr(_loops(), name)[(programs,)](*arguments, **how)


def _terms(walk_keys: U64, walk_coef: F32, key: U64, scale: float, guide_scale: float, device: Any) -> tuple[Any, ...]:
    """Return the walk, the step's key and the factors as `pair` takes them."""
    a, b = key.view(np.int64).tolist()
    coef = torch.tensor(walk_coef, device=device)
    factors = float(np.float32(scale)), float(np.float32(guide_scale))
    return _signed(walk_keys, device), coef, len(walk_coef), a, b, *factors


def _signed(keys: U64, device: Any) -> Tensor:
    """Return keys on a device, their bits in int64."""
    return torch.tensor(np.ascontiguousarray(keys).view(np.int64), device=device)


def _plan(first: int, n: int, gaussian: bool) -> tuple[int, dict[str, Any]]:
    """Return the programs for a range of n that begins at `first`, and how to launch them."""
    words, each = (NORMAL_WORDS, 2) if gaussian else (SIGN_WORDS, 64)
    aligned = first % each == 0
    touched = -(-n // each) if aligned else n // each + 2
    return -(-touched // words), {"ALIGNED": aligned, "GAUSSIAN": gaussian, "WORDS": words, **_LAUNCH}


def _check(n: int, keys: U64, coef: F32, guide: Tensor, *ranges: Tensor) -> None:
    """Refuse arguments that disagree: kernels would read or write beyond their ends, or other memory."""
    tensors = [*ranges, *([guide] if len(guide) else [])]
    sizes = keys.shape == (coef.size, 2) and all(t.numel() == n for t in tensors)
    if sizes and all(t.dtype == torch.float32 and t.is_contiguous() and t.device == ranges[0].device for t in tensors):
        return
    raise FedbenchError(
        f"kernels: found keys {keys.shape} for {coef.size} coefficients and "
        f"{[(tuple(t.shape), t.dtype, str(t.device), t.stride()) for t in tensors]}; allowed for a range of {n}: keys "
        "[K, 2] for K coefficients, contiguous float32 tensors of the range's length on one device, an empty guide."
    )
