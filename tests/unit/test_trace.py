"""Spans: what lies within what, the trace that Perfetto opens, the hidden part of a transfer, the timeline."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from synthetic_runs import CLOUD_SPANS, DEVICE_SPANS, make_codec, make_run, make_spans

from fedbench.__main__ import main
from fedbench.base import records
from fedbench.base.clock import Clock
from fedbench.base.errors import EXIT_OK, EXIT_USER
from fedbench.base.lanes import lanes
from fedbench.report import arms, bars, canvas, looks, over_rounds, summary, timeline, trace
from fedbench.report.flights import flights
from fedbench.results import writer
from fedbench.run import hidden, memory, spans

#: What each kind of event must have (Trace Event Format), and of which type; "X" complete, "M" metadata, "C" counter.
FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "X": {"name": str, "cat": str, "pid": int, "tid": int, "ts": (int, float), "dur": (int, float), "args": dict},
    "M": {"name": str, "pid": int, "tid": int, "args": dict},
    "C": {"name": str, "pid": int, "ts": (int, float), "args": dict},
}
METADATA = {"process_name": ("name", str), "process_sort_index": ("sort_index", int), "thread_name": ("name", str)}


def check_format(text: str) -> dict[str, list[dict[str, Any]]]:
    """Return a trace's events by phase; AssertionError where it is not a valid trace, or bars on a lane overlap."""
    tree = json.loads(text)
    assert tree["displayTimeUnit"] in ("ms", "ns")
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in tree["traceEvents"]:
        wanted = FIELDS[event["ph"]]
        assert set(event) == {"ph", *wanted}, event
        assert all(isinstance(event[name], kind) for name, kind in wanted.items()), event
        assert event.get("ts", 0) >= 0
        assert event.get("dur", 0) >= 0
        found[event["ph"]].append(event)
    for event in found["M"]:
        key, kind = METADATA[event["name"]]
        assert isinstance(event["args"][key], kind)
    for event in found["C"]:
        assert event["args"]
        assert all(isinstance(value, int | float) for value in event["args"].values())
    check_nesting(found["X"])
    return found


def check_nesting(complete: list[dict[str, Any]]) -> None:
    """Assert that bars of one lane follow each other or lie within each other, to the nanosecond."""
    by_lane = defaultdict(list)
    for event in complete:
        by_lane[event["pid"], event["tid"]].append((round(event["ts"] * 1e3), round(event["dur"] * 1e3)))
    for spans_ in by_lane.values():
        ends: list[int] = []
        for start, length in sorted(spans_, key=lambda bar: (bar[0], -bar[1])):
            while ends and start >= ends[-1]:
                ends.pop()
            assert not ends or start + length <= ends[-1], (start, length, ends)
            ends.append(start + length)


def test_lanes_know_what_lies_within_what() -> None:
    found = list(lanes(make_spans(2, ranks=2)))
    assert [(lane.rank, lane.round, lane.round_s) for lane in found] == [(r, n, 0.2) for r in (0, 1) for n in (0, 1)]
    device = found[2]
    assert list(device.kind[:4]) == ["compute", "compute", "wait", "decode"]
    assert list(device.depth[:4]) == [0, 1, 2, 2]
    sums = {kind: device.own_s[device.kind == kind].sum() for kind in ("compute", "wait", "decode", "send")}
    assert sums == pytest.approx({"compute": 0.121 - 0.074, "wait": 0.132, "decode": 0.005, "send": 0.001})
    assert device.own_s.sum() == pytest.approx((device.end_s - device.start_s)[device.depth == 0].sum())
    ended = {name: values[make_spans(1)["kind"] != "round"] for name, values in make_spans(1).items()}
    assert list(lanes(ended)) == list(lanes({})) == []


def test_the_trace_has_the_format_of_its_viewers_and_all_that_was_kept() -> None:
    run = make_run(rounds=5, ranks=3, codec=make_codec(5))
    found = check_format(trace.to_json(run))
    names = {(e["pid"], e["args"]["name"]) for e in found["M"] if e["name"] == "process_name"}
    assert names == {(0, "rank 0: cloud"), (1, "rank 1: devices"), (2, "rank 2: devices")}
    assert len(found["X"]) == 3 * (len(CLOUD_SPANS) + 2 * len(DEVICE_SPANS))
    starts = {(e["pid"], e["name"]): e["ts"] for e in found["X"] if e["cat"] == "round"}
    assert starts == {(rank, f"round {n}"): pytest.approx(2e5 * (n - 2)) for rank in range(3) for n in (2, 3, 4)}
    layer = next(e for e in found["X"] if e["name"] == "compute layer 1")
    assert (layer["ts"], layer["dur"]) == (pytest.approx(72e3), pytest.approx(50e3))
    assert layer["args"] == {"round": 2, "unit": "layer 1"}
    counters = [(e["pid"], e["name"]) for e in found["C"]]
    assert [counters.count((rank, "memory in bytes")) for rank in range(3)] == [3, 3, 3]
    bits = [e["args"] for e in found["C"] if e["name"] == "bits of an entry"]
    assert bits == [{"least": 2.0, "mean": pytest.approx(14 / 3), "most": 8.0}] * 3


def test_rounds_of_a_trace_follow_the_longest_lane() -> None:
    table = make_spans(3, ranks=2)
    late = (table["rank"] == 1) & (table["round"] == 1) & (table["kind"] == "round")
    table["length_s"] = np.where(late, 0.3, table["length_s"])
    assert trace.round_begins(list(lanes(table))) == pytest.approx({0: 0.0, 1: 0.2, 2: 0.5})


@pytest.mark.parametrize("seed", range(3))
def test_any_times_are_nested_to_the_nanosecond(seed: int) -> None:
    stream = np.random.default_rng(seed)
    clock = Clock()
    clock.keep(4, 10_000)
    for number in range(3):
        clock.begin(number)
        for _ in range(20):
            with clock.span("compute", "device 0"):
                for _ in range(int(stream.integers(0, 4))):
                    with clock.span("decode"):
                        np.sqrt(np.arange(int(stream.integers(1, 2000))))
    clock.begin(-1)
    report = spans.packed(clock)
    columns = spans.columns({0: report, 1: report})
    run = make_run(rounds=3)
    found = check_format(trace.to_json(replace(run, spans=columns)))
    assert len(found["X"]) == 2 * len(report["spans"])
    assert 0 <= spans.unaccounted({0: report}) < 1


def test_the_verb_writes_the_trace_and_refuses_what_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer.write(tmp_path / "a.h5", make_run(rounds=4, ranks=2))
    writer.write(tmp_path / "none.h5", make_run("fedmezo", rounds=4, spans=False))
    (tmp_path / "no.h5").write_text("no run")
    out = tmp_path / "new" / "t.json"
    assert main(["trace", str(tmp_path / "a.h5"), "--out", str(out)]) == EXIT_OK
    assert capsys.readouterr().out == f"{out}\n"
    assert check_format(out.read_text())["X"]
    refused = [
        ("none.h5", "t.json", "kept no spans"),
        ("no.h5", "t.json", "not an HDF5 file"),
        ("missing.h5", "t.json", "no such run file"),
        ("a.h5", "new", "can't be written"),
        ("a.h5", "no.h5/t.json", "can't be written"),
    ]
    for file, target, message in refused:
        assert main(["trace", str(tmp_path / file), "--out", str(tmp_path / target)]) == EXIT_USER, file
        told = capsys.readouterr()
        assert message in told.err
        assert not told.out
    assert not (tmp_path / "t.json").exists()


def overlapped(*, ready_s: float, waits: list[tuple[float, float]], compute_s: float) -> dict[str, np.ndarray]:
    """Return two rounds' spans: the cloud's plan is ready at `ready_s`; waits (start, end) lie in a device's compute."""
    end = compute_s + sum(high - low for low, high in waits)
    rows: list[tuple[Any, ...]] = []
    for number in (0, 1):
        rows += [(0, number, "round", "", 0, end + 1), (0, number, "encode", "plan/a", ready_s - 0.01, 0.01)]
        rows += [(0, number, "encode", "plan/b", ready_s, 0.01), (1, number, "round", "", 0, end + 1)]
        rows += [(1, number, "compute", "device 0", 0, end)]
        rows += [(1, number, "wait", f"plan/{i}", low, high - low) for i, (low, high) in enumerate(waits)]
        rows += [(1, number, "wait", "reply/scalars", end, 0.9)]
    names = records.SPAN_COLUMNS
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    return {name: np.array(columns[name], None if c.dtype == "str" else c.dtype) for name, c in names.items()}


#: (ready_s, waits, compute_s, transfer_s, hidden): all hidden; the cloud's own time is not the link's; half and nothing
#: hidden; the shorter one counts; never below 0; null where either is short or the rate is not known.
HIDDEN = [
    (0.01, [], 1.0, 0.5, 1.0),
    (0.3, [(0.0, 0.3)], 1.0, 0.5, 1.0),
    (0.3, [(0.0, 0.55)], 1.0, 0.5, 0.5),
    (0.3, [(0.0, 0.4), (0.5, 0.9)], 1.0, 0.5, 0.0),
    (0.01, [(0.1, 0.2)], 0.2, 5.0, 0.5),
    (0.01, [(0.1, 3.0)], 0.2, 0.2, 0.0),
    (0.01, [(0.01, 0.11)], 0.04, 5.0, None),
    (0.01, [(0.1, 0.2)], 1.0, 0.04, None),
    (0.01, [(0.1, 0.2)], 1.0, float("nan"), None),
]


@pytest.mark.parametrize(("ready_s", "waits", "compute_s", "transfer_s", "expected"), HIDDEN)
def test_the_hidden_part_of_a_transfer(
    ready_s: float, waits: list[tuple[float, float]], compute_s: float, transfer_s: float, expected: float | None
) -> None:
    table = overlapped(ready_s=ready_s, waits=waits, compute_s=compute_s)
    found = hidden.hidden_fraction(table, {0: transfer_s, 1: transfer_s}, [1])
    assert found == (None if expected is None else pytest.approx(expected))
    assert hidden.hidden_fraction({}, {0: 1.0}, [1]) is None
    assert hidden.hidden_fraction(table, {0: transfer_s, 1: transfer_s}, [1, 2]) is None  # rank 2 kept no round


def test_an_edge_that_waits_longest_is_no_device() -> None:
    table = overlapped(ready_s=0.01, waits=[(0.1, 0.2)], compute_s=1.0)
    edge = {
        name: column[np.isin(table["kind"], ("round", "wait")) & (table["rank"] == 1)] for name, column in table.items()
    }
    edge |= {"rank": np.full(len(edge["rank"]), 2), "length_s": np.full(len(edge["rank"]), 9.0)}
    both = {name: np.concatenate([table[name], edge[name]]) for name in table}
    assert hidden.hidden_fraction(both, {0: 0.5, 1: 0.5}, [1]) == pytest.approx(0.8)


def test_figures_of_devices_leave_edges_out() -> None:
    run = make_run(rounds=6, ranks=8)
    run.config["comm"] |= {"topology": "tree", "edges": 2}
    drawing = timeline.timeline(arms.group([run]), looks.LIGHT)
    assert drawing is not None
    names = [label.get_text().replace("\n", " ") for label in drawing.figure.axes[0].get_yticklabels()]
    assert names == ["cloud", "link", *(f"devices of rank {rank}" for rank in (3, 4, 5, 6))]
    assert "The 4 busiest of 5 ranks" in drawing.caption
    dropped = {
        name: column[(run.spans["rank"] != 3) | (run.spans["round"] == run.spans["round"].max())]
        for name, column in run.spans.items()
    }
    drawing = timeline.timeline(arms.group([replace(run, spans=dropped)]), looks.LIGHT)
    assert drawing is not None
    assert drawing.caption.startswith(f"Round {run.spans['round'].max()} of")


def test_memory_of_every_round_is_thinned_by_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Played:
        number = 0

    monkeypatch.setattr(memory, "LOG_ROWS", 4)
    watch, outcome = memory.Memory(), Played()
    for outcome.number in range(11):
        resident = 100 + outcome.number
        held = memory.account.Held(resident, 500 if outcome.number == 2 else 300)
        monkeypatch.setattr(memory.account, "held", lambda held=held: held)
        assert not watch.played(outcome)  # type: ignore[arg-type]
    assert watch.log().tolist() == [[3, 103, 500], [7, 107, 300], [10, 110, 300]]
    columns = memory.memory_rounds({0: watch.log(), 1: watch.log()[:1], 2: watch.log()[:0]})
    assert columns["rank"].tolist() == [0, 0, 0, 1]
    assert columns["peak_bytes"].tolist() == [500, 300, 300, 500]
    assert memory.memory_rounds({0: watch.log()[:0]}) == {}


def test_messages_are_under_way_from_coding_to_decoding() -> None:
    cloud, device = lanes(make_spans(1, ranks=2))
    found = {(f.channel, round(f.left_s, 3), round(f.taken_s, 3)) for f in flights(cloud, [device])}
    assert found == {("plan", 0.054, 0.062), ("plan", 0.061, 0.082), ("upload", 0.123, 0.132), ("reply", 0.135, 0.137)}


def test_the_timeline_shows_cloud_link_and_devices_of_a_round() -> None:
    many = make_run(rounds=6, ranks=8)
    drawing = timeline.timeline(arms.group([make_run("fedmezo", rounds=6), many]), looks.LIGHT)
    assert drawing is not None
    (axes,) = drawing.figure.axes
    names = [label.get_text().replace("\n", " ") for label in axes.get_yticklabels()]
    assert names == ["cloud", "link", *(f"devices of rank {rank}" for rank in (1, 2, 3, 4))]
    assert "The 4 busiest of 7 ranks" in drawing.caption
    assert many.summary.run_id in drawing.caption
    assert "devices of rank 1: compute 47 ms" in drawing.alt
    assert axes.get_xlim()[1] < 0.16  # evaluation is not drawn
    assert canvas.png(drawing.figure).startswith(b"\x89PNG")
    alone = timeline.timeline(arms.group([make_run(rounds=2)]), looks.DARK)
    assert alone is not None
    assert [label.get_text() for label in alone.figure.axes[0].get_yticklabels()] == ["cloud and\ndevices"]
    assert timeline.timeline(arms.group([make_run(spans=False)]), looks.LIGHT) is None


def test_memory_and_bits_are_drawn_where_they_were_recorded() -> None:
    runs = [make_run(rounds=6, ranks=3, seed=seed, codec=make_codec(6)) for seed in (0, 1)]
    drawing = over_rounds.memory(arms.group(runs), looks.LIGHT)
    assert drawing is not None
    assert "cooperllm 25.1 MB" in drawing.alt  # of the devices, not of the cloud
    bits, again = (over_rounds.bits(arms.group(runs), looks.LIGHT) for _ in range(2))
    assert bits is not None
    assert again is not None
    assert "3 rows, 6 rounds, 4.67 bits" in bits.alt
    rows = [label.get_text() for label in bits.figure.axes[0].get_yticklabels()]
    assert rows == ["0.weight", "1.weight", "2.weight"]
    assert canvas.svg(bits.figure) == canvas.svg(again.figure)
    bare = arms.group([make_run(spans=False)])
    assert over_rounds.memory(bare, looks.LIGHT) is None
    assert over_rounds.bits(bare, looks.LIGHT) is None


#: (part of the time outside spans, what `show` says of it)
OUTSIDE = [(0.0, "0.0 %"), (0.02, "2.0 %"), (0.031, "3.1 %: MORE THAN 2 %")]


@pytest.mark.parametrize(("fraction", "told"), OUTSIDE)
def test_a_run_whose_spans_do_not_add_up_is_marked(fraction: float, told: str) -> None:
    run = make_run(rounds=4)
    run = replace(run, summary=run.summary.model_copy(update={"unaccounted_fraction": fraction}))
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(summary.summary_table(run))
    line = next(line for line in console.export_text().splitlines() if "time outside spans" in line)
    assert told in line
    caption = bars.time_split(arms.group([run]), looks.LIGHT).caption
    assert ("outside all spans: cooperllm" in caption) == (fraction > 0.02) == ("MORE" in line)
