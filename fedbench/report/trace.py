"""A run's spans as a trace in the Trace Event Format, which Perfetto and Chrome's about:tracing open.

One process per rank with one lane; rounds lie one after the other, each begun on all lanes where the ranks agreed to
begin it. It reads records only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from fedbench.base.clock import ROUND
from fedbench.base.errors import ResultError
from fedbench.base.lanes import Lane, lanes
from fedbench.base.records import Run
from fedbench.report.parts import part_of

#: Thread number of a rank's spans; the format wants one.
_LANE = 1

Event = dict[str, Any]


def to_json(run: Run) -> str:
    """Return the whole trace as JSON; ResultError where the run kept no spans."""
    facts = {"run_id": run.summary.run_id, "ranks": run.summary.ranks, "aligned": "at the agreed start of each round"}
    return json.dumps({"traceEvents": events(run), "displayTimeUnit": "ms", "otherData": facts})


def events(run: Run) -> list[Event]:
    """Return all events: names of the lanes, rounds and their spans in microseconds, memory and bits as counters."""
    found = list(lanes(run.spans))
    if not found:
        raise ResultError(
            f"{run.summary.run_id} kept no spans. Run it again (--force) with results.trace_rounds above 0."
        )
    begins = round_begins(found)
    out = [event for rank in sorted({lane.rank for lane in found}) for event in _names(run, rank)]
    for lane in found:
        out.extend(_spans(lane, begins[lane.round]))
    out.extend(_memory(run, begins, {(lane.rank, lane.round): lane.round_s for lane in found}))
    out.extend(_bits(run, begins))
    return out


def round_begins(found: list[Lane]) -> dict[int, float]:
    """Return where each round begins on the common axis, in seconds: behind the longest lane of the round before."""
    begins, now = {}, 0.0
    for round_ in sorted({lane.round for lane in found}):
        begins[round_] = now
        now += max(lane.round_s for lane in found if lane.round == round_)
    return begins


def _names(run: Run, rank: int) -> list[Event]:
    process = {"ph": "M", "pid": rank, "tid": _LANE}
    return [
        process | {"name": "process_name", "args": {"name": f"rank {rank}: {part_of(run, rank)}"}},
        process | {"name": "process_sort_index", "args": {"sort_index": rank}},
        process | {"name": "thread_name", "args": {"name": "spans"}},
    ]


def _spans(lane: Lane, begin_s: float) -> Iterator[Event]:
    """Yield a lane's complete events; times are whole nanoseconds, so that what is nested stays so."""
    base = {"ph": "X", "pid": lane.rank, "tid": _LANE}
    start, end = np.rint((begin_s + np.stack([lane.start_s, lane.end_s])) * 1e9)
    first, last = round(begin_s * 1e9), round((begin_s + lane.round_s) * 1e9)
    name = f"{ROUND} {lane.round}"
    yield base | {"name": name, "cat": ROUND, "ts": first / 1e3, "dur": (last - first) / 1e3, "args": {}}
    for i in range(len(start)):
        kind, unit = str(lane.kind[i]), str(lane.unit[i])
        low, high = max(first, int(start[i])), min(last, int(end[i]))
        arguments = {"round": lane.round} | ({"unit": unit} if unit else {})
        named = base | {"name": f"{kind} {unit}".rstrip(), "cat": kind, "args": arguments}
        yield named | {"ts": low / 1e3, "dur": max(0, high - low) / 1e3}


def _memory(run: Run, begins: dict[int, float], lengths: dict[tuple[int, int], float]) -> Iterator[Event]:
    """Yield each rank's memory at the end of the rounds that have a place on the axis."""
    table = run.memory_rounds
    for i in range(len(table.get("rank", ()))):
        rank, round_ = int(table["rank"][i]), int(table["round"][i])
        if (rank, round_) in lengths:
            at = {"ts": (begins[round_] + lengths[rank, round_]) * 1e6}
            values = {"resident": int(table["resident_bytes"][i]), "peak": int(table["peak_bytes"][i])}
            yield {"ph": "C", "pid": rank, "name": "memory in bytes", "args": values} | at


def _bits(run: Run, begins: dict[int, float]) -> Iterator[Event]:
    """Yield the bits of an entry over a plan's units, from the start of each round."""
    table = run.codec
    for round_, begin_s in begins.items() if table else ():
        bits = table["bits"][table["round"] == round_]
        if len(bits):
            values = {"least": float(bits.min()), "mean": float(bits.mean()), "most": float(bits.max())}
            yield {"ph": "C", "pid": 0, "name": "bits of an entry", "ts": begin_s * 1e6, "args": values}
