"""Where the time of a round goes: nested spans on one monotonic clock per process.

Readings of two hosts are never subtracted; only durations leave a process.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from fedbench.base import account


class Clock:
    """Spans by kind; the time of an inner span is not counted again in the outer one.

    An outer span ends when the GPU has done what was asked of it, where there is one.
    """

    def __init__(self) -> None:
        self._origin = time.perf_counter()
        self._inner = [0.0]
        self._totals: dict[str, float] = defaultdict(float)
        self.spans: list[tuple[int, str, float, float]] = []
        self.round = -1

    @contextmanager
    def span(self, kind: str) -> Iterator[None]:
        """Measure the block as one span of `kind` in the current round."""
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            if len(self._inner) == 2:
                account.wait_for_gpu()
            length = time.perf_counter() - start
            self._totals[kind] += length - self._inner.pop()
            self._inner[-1] += length
            self.spans.append((self.round, kind, start - self._origin, length))

    def begin(self, round_: int) -> None:
        """Start a round: totals are counted anew."""
        self.round = round_
        self._totals.clear()

    def seconds(self, kind: str) -> float:
        """Return the seconds spent in `kind` since the round began, inner spans excluded."""
        return self._totals.get(kind, 0.0)
