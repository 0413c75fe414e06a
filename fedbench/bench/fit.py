"""One line of `fedbench check`: what was found, what is needed, whether that is enough, and what to do where it is not.

Only the words and verdicts are here; nothing is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

Verdict = Literal["ok", "warn", "fail"]


class Row(NamedTuple):
    """A finding: `needed` is what fedbench asks for, `advice` what to do where the verdict is not ok."""

    check: str
    value: str
    needed: str
    verdict: Verdict = "ok"
    advice: str = ""


def judged(check: str, value: str, needed: str, *, fail: str = "", warn: str = "") -> Row:
    """Return a row whose verdict is that of the advice which is not empty: `fail` before `warn`, else ok."""
    verdict: Verdict = "fail" if fail else "warn" if warn else "ok"
    return Row(check, value, needed, verdict, fail or warn)


def span(values: Sequence[int]) -> str:
    """Return the smallest and the largest of numbers as one reads them."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def is_fit(rows: Sequence[Row]) -> bool:
    """Return whether no row failed."""
    return all(row.verdict != "fail" for row in rows)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as JSON holds them."""
    return [row._asdict() for row in rows]
