"""Numbers as people read them: SI prefixes, spreads, no more digits than matter. It computes no statistics."""

from __future__ import annotations

import math

_PREFIXES = tuple(zip((1e18, 1e15, 1e12, 1e9, 1e6, 1e3, 1.0, 1e-3, 1e-6), "EPTGMk mµ", strict=True))
NOTHING = "-"


def quantity(value: float | None, unit: str) -> str:
    """Return a value with three significant digits and an SI prefix, such as `1.28 MB`; `-` for none or NaN."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0:
        return f"0 {unit}".rstrip()
    size = float(f"{abs(value):.3g}")
    factor, prefix = next((p for p in _PREFIXES if size >= p[0]), _PREFIXES[-1])
    scaled = value / factor
    digits = max(0, 2 - math.floor(math.log10(abs(float(f"{scaled:.3g}")))))
    text = f"{scaled:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {prefix.strip()}{unit}".rstrip()


def fraction(value: float | None) -> str:
    """Return an accuracy with three digits, such as `0.912`; `-` for none or NaN."""
    return NOTHING if value is None or not math.isfinite(value) else f"{value:.3f}"


def count(value: float | None) -> str:
    """Return a number of rounds or seeds without needless digits; `-` for none or NaN."""
    return NOTHING if value is None or not math.isfinite(value) else f"{value:.1f}".removesuffix(".0")
