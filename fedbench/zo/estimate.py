"""From losses to scalars: the estimators' arithmetic, on arrays alone."""

from __future__ import annotations

import numpy as np

from fedbench.base.errors import NumericsError


def central(plus: float, minus: float, h: float) -> np.float32:
    """Return (f(w + h u) - f(w - h u)) / (2 h) as float32 (methods.md 1.2); NumericsError where it isn't finite."""
    value = np.float32((plus - minus) / (2.0 * h))
    if not np.isfinite(value):
        raise NumericsError(
            f"Losses {plus} and {minus} at a probing step of {h}: the difference is not a finite number."
        )
    return value


def forward(plus: float, clean: float, h: float) -> np.float32:
    """Return (f(w + h u) - f(w)) / h as float32, the one-sided difference; NumericsError where it isn't finite."""
    return central(plus, clean, h / 2.0)
