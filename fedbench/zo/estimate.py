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
