"""Spans on their way from every rank's clock to the columns of the run file: numbers and one list of names, no pickle.

A rank's start times stay its own: what different ranks have in common is the agreed start of each round.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedbench.base import records
from fedbench.base.arrays import Arrays, Unit
from fedbench.base.clock import Clock

#: Spans that one rank keeps at most, and all ranks together.
_OF_A_RANK, _OF_A_RUN = 1 << 14, 1 << 18


def most_kept(ranks: int) -> int:
    """Return how many spans a rank keeps in a run on some ranks."""
    return max(1, min(_OF_A_RANK, _OF_A_RUN // ranks))


def packed(clock: Clock) -> dict[str, np.ndarray]:
    """Return what a rank reports: its spans [n, 5] float64, the names in them as bytes, and its totals float64 [3].

    Columns of a span: round, number of its kind and of its unit among the names, start_s, length_s. Totals: seconds of
    all rounds, seconds of them that no span covers, spans lost past the bound.
    """
    numbers: dict[str, int] = {}
    rows = [
        (round_, *(numbers.setdefault(name, len(numbers)) for name in span[:2]), *span[2:])
        for round_, span in clock.spans
    ]
    return {
        "spans": np.array(rows, np.float64).reshape(-1, 5),
        "names": np.frombuffer(json.dumps(list(numbers)).encode(), np.uint8),
        "totals": np.array([clock.rounds_s, clock.rounds_s - clock.covered_s, clock.lost], np.float64),
    }


def units(spans: int, name_bytes: int) -> list[Unit]:
    """Return the units of a report from the largest numbers of spans and of bytes of names on any rank."""
    return [
        Unit("spans", (spans, 5), "<f8", at_most=True),
        Unit("names", (name_bytes,), "|u1", at_most=True),
        Unit("totals", (3,), "<f8"),
    ]


def columns(reports: Mapping[int, Arrays]) -> dict[str, np.ndarray]:
    """Return the columns of all ranks' spans, by rank, round and start, outer before inner; nothing without a span."""
    rows: list[tuple[Any, ...]] = []
    for rank, report in reports.items():
        names = json.loads(bytes(report["names"]))
        for round_, kind, unit, start_s, length_s in report["spans"].tolist():
            rows.append((rank, int(round_), names[int(kind)], names[int(unit)], start_s, length_s))
    rows.sort(key=lambda row: (row[0], row[1], row[4], -row[5]))
    if not rows:
        return {}
    return {
        name: np.array(
            column, np.str_ if records.SPAN_COLUMNS[name].dtype == "str" else records.SPAN_COLUMNS[name].dtype
        )
        for name, column in zip(records.SPAN_COLUMNS, zip(*rows, strict=True), strict=True)
    }


def unaccounted(reports: Mapping[int, Arrays]) -> float:
    """Return the part of the rounds' time that no span covers, on the rank with the most of it."""
    totals = [report["totals"] for report in reports.values()]
    return max((float(none / whole) for whole, none, _ in totals if whole > 0), default=0.0)
