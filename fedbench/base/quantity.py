"""Quantities that people write with their unit: rates such as 100Mbit/s, times such as 20ms, sizes such as 4GiB.

A text is read whole or refused with a ValueError that says what is allowed; nothing is guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

_BITS: Mapping[str, float] = {"bit/s": 1.0, "B/s": 8.0}
_DECIMAL: Mapping[str, float] = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_RATES = {prefix + unit: factor * bits for unit, bits in _BITS.items() for prefix, factor in _DECIMAL.items()}
_TIMES: Mapping[str, float] = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_SIZES: Mapping[str, float] = {
    "B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30,
}  # fmt: skip
_TEXT = re.compile(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*(\S*)")


def bit_s(text: str) -> float:
    """Return a rate in bit/s: `100Mbit/s`, `2.5 Gbit/s`, `12MB/s` (bytes, decimal prefixes); ValueError for 0 or less."""
    value = _read(text, _RATES, "a rate such as 100Mbit/s or 12MB/s")
    if value == 0:
        raise ValueError(f"found {text!r}; a link moves more than 0 bit/s")
    return value


def seconds(text: str) -> float:
    """Return a time in seconds: `20ms`, `1.5s`, `50us`, `2min`; ValueError for anything else."""
    return _read(text, _TIMES, "a time such as 20ms or 1.5s")


def size_bytes(text: str) -> float:
    """Return a size in bytes: `512MB`, `4GiB`; ValueError for anything else, and for 0."""
    value = _read(text, _SIZES, "a size such as 512MB or 4GiB")
    if value == 0:
        raise ValueError(f"found {text!r}; a memory holds more than 0 B")
    return value


def _read(text: str, units: Mapping[str, float], allowed: str) -> float:
    match = _TEXT.fullmatch(text.strip())
    if match is None or match[2] not in units:
        raise ValueError(f"found {text!r}; allowed: {allowed}, the unit one of {', '.join(units)}")
    value = float(match[1]) * units[match[2]]
    if math.isinf(value):
        raise ValueError(f"found {text!r}, which is not finite; allowed: {allowed}")
    return value
