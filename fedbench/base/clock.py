"""Where the time of a round goes: nested spans on one monotonic clock per process.

Readings of two hosts are never subtracted: a round starts where all ranks have agreed to start it, and a span tells
only how long after that it began. The newest rounds are kept, within a bound. One thread alone may measure.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict, deque
from typing import NamedTuple

from fedbench.base import account

#: Kind of the row that holds a round from one agreed start to the next; no span has it.
ROUND = "round"


class Kept(NamedTuple):
    """One span: kind, layer or message unit, start after its round's and length, in seconds."""

    kind: str
    unit: str
    start_s: float
    length_s: float


class Clock:
    """Spans by kind; the time of an inner span is not counted again in the outer one.

    An outer span ends when the GPU has done what was asked of it, where there is one. Without `keep` nothing but the
    totals is kept. `rounds_s` and `covered_s` are the seconds of all rounds and of their outermost spans.
    """

    def __init__(self) -> None:
        self.round = -1
        self.rounds_s = 0.0
        self.covered_s = 0.0
        self.lost = 0
        self._start = time.perf_counter()
        self._open: list[_Span] = []
        self._totals: dict[str, float] = defaultdict(float)
        self._kept: deque[tuple[int, list[Kept]]] = deque()
        self._rounds = self._most = 0

    def keep(self, rounds: int, most: int) -> None:
        """Keep the spans of the newest `rounds` rounds, about `most` spans in all.

        Past the bound the oldest round goes; in a round that is larger by itself only outermost spans are added, and
        `lost` counts the others.
        """
        self._rounds, self._most = rounds, most

    def span(self, kind: str, unit: str = "") -> _Span:
        """Return a context that measures its block as a span of `kind`: a layer's or a message unit's, where one is named."""
        return _Span(self, kind, unit)

    def begin(self, round_: int) -> None:
        """Start a round where all ranks have agreed on it, or -1 behind the last: totals are counted anew."""
        now = time.perf_counter()
        if self.round >= 0:
            self.rounds_s += now - self._start
            if self._kept:
                self._kept[-1][1].append(Kept(ROUND, "", 0.0, now - self._start))
        self.round, self._start = round_, now
        self._totals.clear()
        if round_ >= 0 and self._rounds:
            self._kept.append((round_, []))
            while len(self._kept) > self._rounds or (len(self._kept) > 1 and self._count() > self._most):
                self._kept.popleft()

    def seconds(self, kind: str) -> float:
        """Return the seconds spent in `kind` since the round began, inner spans excluded."""
        return self._totals.get(kind, 0.0)

    @property
    def spans(self) -> list[tuple[int, Kept]]:
        """What is kept with its round, in the order in which spans ended."""
        return [(round_, span) for round_, spans in self._kept for span in spans]

    def _ended(self, span: _Span, length: float) -> None:
        """Count a span that has just ended, and keep it."""
        self._totals[span.kind] += length - span.inner_s
        if self._open:
            self._open[-1].inner_s += length
        elif self.round >= 0:
            self.covered_s += length
        if not self._kept or self.round < 0:
            return
        spans = self._kept[-1][1]
        if self._open and len(spans) >= self._most:
            self.lost += 1
        else:
            spans.append(Kept(span.kind, sys.intern(span.unit), span.start - self._start, length))

    def _count(self) -> int:
        return sum(len(spans) for _, spans in self._kept)


class _Span:
    """One measurement under way; `inner_s` are the seconds of the spans within it."""

    __slots__ = ("_clock", "inner_s", "kind", "start", "unit")

    def __init__(self, clock: Clock, kind: str, unit: str) -> None:
        self._clock = clock
        self.kind = kind
        self.unit = unit

    def __enter__(self) -> None:
        self.inner_s = 0.0
        self._clock._open.append(self)
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        opened = self._clock._open
        opened.pop()
        if not opened:
            account.wait_for_gpu()
        self._clock._ended(self, time.perf_counter() - self.start)
