"""From losses to scalars: the estimators' arithmetic, on arrays alone."""

from __future__ import annotations

import numpy as np

from fedbench.base.errors import NumericsError


def central(plus: float, minus: float, h: float) -> np.float32:
    """Return (f(w + h u) - f(w - h u)) / (2 h) as float32 (methods.md 1.2); NumericsError where it isn't finite."""
    return _finite((plus - minus) / (2.0 * h), plus, minus, h)


def forward(plus: float, centre: float, h: float) -> np.float32:
    """Return (f(w + h u) - f(w)) / h as float32 (methods.md 1.2); NumericsError where it isn't finite."""
    return _finite((plus - centre) / h, plus, centre, h)


def _finite(slope: float, one: float, other: float, h: float) -> np.float32:
    value = np.float32(slope)
    if not np.isfinite(value):
        raise NumericsError(
            f"Losses {one} and {other} at a probing step of {h}: the difference is not a finite number."
        )
    return value


def regressed(d: np.ndarray, signs: np.ndarray, b: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return guides' coefficients c [m], the same shrunk, and residuals r [Q], from d [Q] along e_i + b sum_j s_ij V_j.

    c_j = mean_i s_ij d_i / b;  r_i = d_i - b sum_j s_ij c_j^(-i) with c^(-i) over the other queries, since with i's own
    term r would shrink by 1 - 1/Q;  shrunk_j = c_j max(0, 1 - var(c_j) / c_j^2) with var from the scatter over queries.
    A lone query tells nothing apart: r = d, and c is taken as it is.
    """
    each = signs * d[:, None] / b
    c, queries = each.mean(0), len(d)
    if queries == 1:
        return c, c, d
    others = (queries * c - each) / (queries - 1)
    variance = each.var(0, ddof=1) / queries
    square = np.maximum(c * c, np.finfo(np.float64).tiny)
    return c, c * np.maximum(0.0, 1.0 - variance / square), d - b * (signs * others).sum(1)
