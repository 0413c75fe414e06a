"""A stage run over a few rows at a time, so that what lies between its layers is small; its ends are whole.

Slices have the same rows of each stream and at least two of it. Where they end is a matter of the row count and
the setting alone.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from fedbench.data.rows import Batch
from fedbench.models.cut import Cut, State


def cuts(rows: int, size: int) -> list[tuple[int, int]]:
    """Return the slices of `rows` rows of one stream, `size` rows each; a single row at the end joins those before."""
    if size == 0 or rows <= size:
        return [(0, rows)]
    ends = [0, *range(size, rows, size), rows]
    if rows - ends[-2] == 1:
        del ends[-2]
    return list(pairwise(ends))


def run_stage(
    cut: Cut, stage: int, state: Batch | State, size: int, sides: int, *, reuse: bool
) -> State | torch.Tensor:
    """Return what `Cut.run_stage` returns, computed slice by slice; `reuse` lets it overwrite the states it is given.

    `sides` is the number of streams in the batch, 1 or 2.
    """
    whole = state if isinstance(state, Batch) else state.batch
    rows = len(whole.ids)
    slices = cuts(rows // sides, size)
    if len(slices) == 1:
        return cut.run_stage(stage, state)
    into = state.h if reuse and isinstance(state, State) else None
    masks: list[torch.Tensor | None] = []
    with cut.residency.visit(stage):
        for low, high in slices:
            wanted = [slice(first + low, first + high) for first in range(0, rows, rows // sides)]
            done = cut.run_stage(stage, _rows(state, wanted, rows))
            values = done if isinstance(done, torch.Tensor) else done.h
            if into is None or into.shape[1:] != values.shape[1:]:
                into = values.new_empty(rows, *values.shape[1:])
            for place, part in zip(wanted, values.chunk(sides), strict=True):
                into[place] = part
            if isinstance(done, State):
                masks.append(done.mask)
    assert into is not None
    if not masks:
        return into
    mask = state.mask if isinstance(state, State) else _joined(masks, slices, sides)
    return State(into, mask, whole)


def _rows(value: Any, wanted: list[slice], rows: int) -> Any:
    """Return some rows of every stream; what has no row for each text is passed on."""
    if isinstance(value, Batch):
        return Batch(*(_rows(t, wanted, rows) for t in (value.ids, value.mask, value.labels, value.lengths)))
    if isinstance(value, State):
        return State(*(_rows(part, wanted, rows) for part in value))
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == rows:
        return torch.cat([value[place] for place in wanted])
    return value


def _joined(masks: list[torch.Tensor | None], slices: list[tuple[int, int]], sides: int) -> torch.Tensor | None:
    """Return the mask of all rows; slices without padding have none and hide nothing."""
    sample = next((mask for mask in masks if mask is not None), None)
    if sample is None:
        return None
    full = []
    for mask, (low, high) in zip(masks, slices, strict=True):
        nothing_hidden = torch.ones if sample.dtype == torch.bool else torch.zeros
        shape = (sides * (high - low), *sample.shape[1:])
        full.append(nothing_hidden(shape, dtype=sample.dtype, device=sample.device) if mask is None else mask)
    parts = [mask.chunk(sides) for mask in full]
    return torch.cat([part[side] for side in range(sides) for part in parts])
