"""The clock: totals without what lies inside, the newest rounds within a bound, and nothing lost silently."""

from __future__ import annotations

import contextlib

import pytest

from fedbench.base import clock as clock_module
from fedbench.base.clock import ROUND, Clock


class Ticks:
    """A clock that moves on by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Ticks:
    made = Ticks()
    monkeypatch.setattr(clock_module, "time", made)
    return made


def play(clock: Clock, ticks: Ticks, round_: int, layers: int = 2) -> None:
    """Let a round of a device pass: a gap of 1 s, layers of 2 s each with 1 s of decoding, 1 s before their end."""
    clock.begin(round_)
    ticks.now += 1
    with clock.span("compute", "device 0"):
        for layer in range(layers):
            with clock.span("compute", f"layer {layer}"):
                ticks.now += 1
                with clock.span("decode", f"plan/{layer}"):
                    ticks.now += 1
        ticks.now += 1


def test_an_inner_span_is_not_counted_again_in_the_outer_one(ticks: Ticks) -> None:
    clock = Clock()
    play(clock, ticks, 0)
    assert (clock.seconds("compute"), clock.seconds("decode"), clock.seconds("wait")) == (3, 2, 0)
    play(clock, ticks, 1, layers=1)
    assert (clock.seconds("compute"), clock.seconds("decode")) == (2, 1)
    clock.begin(-1)
    assert (clock.rounds_s, clock.covered_s) == (10, 8)
    assert clock.spans == []


def test_spans_of_the_newest_rounds_are_kept_since_the_start_of_theirs(ticks: Ticks) -> None:
    clock = Clock()
    clock.keep(2, 100)
    with clock.span("wait", "before the first round"):
        ticks.now += 7
    for number in range(3):
        play(clock, ticks, number, layers=1)
    clock.begin(-1)
    with clock.span("wait", "behind the last round"):
        ticks.now += 7
    one = [("decode", "plan/0", 2, 1), ("compute", "layer 0", 1, 2), ("compute", "device 0", 1, 3), (ROUND, "", 0, 4)]
    assert clock.spans == [(number, span) for number in (1, 2) for span in one]


def test_past_the_bound_old_rounds_go_first_and_then_inner_spans(ticks: Ticks) -> None:
    clock = Clock()
    clock.keep(8, 9)
    for number in range(3):
        play(clock, ticks, number, layers=2)  # six rows with that of the round
    clock.begin(-1)
    assert {number for number, _ in clock.spans} == {1, 2}
    assert clock.lost == 0
    play(clock, ticks, 3, layers=50)
    with clock.span("apply"):
        ticks.now += 1
    clock.begin(-1)
    kept = [span.unit for number, span in clock.spans if number == 3]
    assert len(kept) == 9 + 3  # the outer spans and the round come on top
    assert clock.lost == 2 * 50 - 9
    assert "device 0" in kept


def test_a_span_that_ends_by_an_error_is_closed(ticks: Ticks) -> None:
    clock = Clock()
    clock.begin(0)
    with contextlib.suppress(ValueError), clock.span("compute"):
        ticks.now += 1
        raise ValueError
    with clock.span("apply"):
        ticks.now += 2
    assert (clock.seconds("compute"), clock.seconds("apply"), clock.covered_s) == (1, 2, 3)
