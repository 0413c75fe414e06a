"""What lies within what on one rank in one round, found from start and length alone. It reads no file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from fedbench.base.clock import ROUND

#: Readings of one clock that differ by less (seconds) are the same: starts and lengths are stored, not ends.
_SAME_S = 1e-9


class Lane(NamedTuple):
    """Spans of one rank in one round, by start, outer before inner; `own_s` is without the spans within, `round_s` theirs all.

    `depth` is 0 for spans that lie in no other.
    """

    rank: int
    round: int
    round_s: float
    kind: np.ndarray
    unit: np.ndarray
    start_s: np.ndarray
    end_s: np.ndarray
    own_s: np.ndarray
    depth: np.ndarray


def lanes(spans: Mapping[str, np.ndarray]) -> Iterator[Lane]:
    """Yield the lanes of a run file's spans, by rank and round; a round that was not ended has none."""
    if not spans:
        return
    keys = np.stack([spans["rank"], spans["round"]], axis=1)
    for rank, round_ in np.unique(keys, axis=0).tolist():
        own = (spans["rank"] == rank) & (spans["round"] == round_)
        whole = own & (spans["kind"] == ROUND)
        if whole.any():
            yield _lane(spans, rank, round_, float(spans["length_s"][whole][0]), np.flatnonzero(own & ~whole))


def _lane(spans: Mapping[str, np.ndarray], rank: int, round_: int, round_s: float, rows: np.ndarray) -> Lane:
    start, length = spans["start_s"][rows], spans["length_s"][rows]
    order = np.lexsort((-length, start))
    rows, start, end = rows[order], start[order], (start + length)[order]
    own, depth = (end - start).copy(), np.zeros(len(rows), np.int64)
    open_: list[int] = []
    for i in range(len(rows)):
        while open_ and start[i] >= end[open_[-1]] - _SAME_S:
            open_.pop()
        if open_:
            end[i] = min(end[i], end[open_[-1]])
            own[open_[-1]] -= end[i] - start[i]
        depth[i] = len(open_)
        open_.append(i)
    return Lane(rank, round_, round_s, spans["kind"][rows], spans["unit"][rows], start, end, own, depth)
