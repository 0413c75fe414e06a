"""Logarithm, cosine and exponential of arrays by sums, products and quotients alone.

Those are rounded in one way on every machine; what a library takes for the functions depends on processor and version
in the last bit, which may decide who comes too late. Nothing here is faster than the library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

#: Coefficients from the highest power down: of atanh(s) / s in s^2, of sin(y) / y in y^2, of exp(r) in r.
_ATANH = [1 / (2 * k + 1) for k in range(11, -1, -1)]
_SINE = [(-1) ** k / math.factorial(2 * k + 1) for k in range(12, -1, -1)]
_EXP = [1 / math.factorial(k) for k in range(16, -1, -1)]


def log(x: np.ndarray) -> np.ndarray:
    """Return the natural logarithm of positive numbers (float64 [n])."""
    m, e = np.frexp(x)
    low = m < math.sqrt(0.5)
    m, e = np.where(low, 2 * m, m), e - low
    s = (m - 1) / (m + 1)
    return np.asarray(e * math.log(2) + 2 * s * _horner(_ATANH, s * s))


def cos_turns(u: np.ndarray) -> np.ndarray:
    """Return the cosine of numbers of turns in [0, 1] (float64 [n])."""
    y = 2 * math.pi * (np.abs(u - 0.5) - 0.25)
    return np.asarray(y * _horner(_SINE, y * y))


def exp(x: np.ndarray) -> np.ndarray:
    """Return e to the power of numbers whose result is a normal float64 (float64 [n])."""
    n = np.rint(x * (1 / math.log(2)))
    return np.asarray(np.ldexp(_horner(_EXP, x - n * math.log(2)), n.astype(np.int32)))


def _horner(coefficients: Sequence[float], x: np.ndarray) -> np.ndarray:
    found = np.full(x.shape, coefficients[0])
    for coefficient in coefficients[1:]:
        found = found * x + coefficient
    return found
