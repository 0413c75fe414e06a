"""Downlink bytes: what a device fetches, counted message by message in the test and by sums in the product."""

from __future__ import annotations

import numpy as np
import pytest

from fedbench.algorithms.base import CatchUp
from fedbench.data.partition import sampled_devices
from fedbench.run.traffic import ID_BYTES, Traffic

PLENTY = 10**12


def fetched(plans: list[int], replies: list[int], sampled: list[list[int]], device: int, now: int) -> int:
    """Return what a device fetches to compute in round `now`, by going through the rounds that it has missed."""
    rounds = [number for number in range(now) if device in sampled[number]]
    had_plan = rounds[-1] if rounds else None
    missed = 0
    for number in range(had_plan if had_plan is not None else 0, now):
        missed += replies[number] + ID_BYTES * len(sampled[number]) if replies[number] else 0
        missed += 0 if number == had_plan else plans[number]
    return missed


@pytest.mark.parametrize("model", [PLENTY, 3000, 0])
@pytest.mark.parametrize(("devices", "count"), [(4, 4), (9, 3), (30, 2)])
def test_every_device_pays_for_what_it_missed_or_for_the_model(devices: int, count: int, model: int) -> None:
    stream = np.random.default_rng(devices)
    plans = stream.integers(0, 500, 40).tolist()
    replies = [0 if number % 7 == 3 else int(stream.integers(1, 100)) for number in range(40)]
    sampled = [[int(d) for d in sampled_devices(0, number, devices, count)] for number in range(40)]
    traffic = Traffic(model)
    for number in range(40):
        expected = [min(fetched(plans, replies, sampled, d, number), model) + plans[number] for d in sampled[number]]
        assert traffic.round(number, sampled[number], plans[number], replies[number]) == expected
        assert traffic.closing() == min(replies[number] + ID_BYTES * count if replies[number] else 0, model)
        if number % 9 == 0:  # a stop and a resume in between change nothing
            stored = {name: kept.copy() for name, kept in traffic.state().items()}
            traffic = Traffic(model)
            traffic.restore(stored)


def test_the_first_round_needs_no_history_and_a_late_comer_all_of_it() -> None:
    traffic = Traffic(PLENTY)
    assert traffic.round(0, [0, 1], plan_bytes=100, reply_bytes=8) == [100, 100]
    assert traffic.round(1, [0, 1], plan_bytes=100, reply_bytes=8) == [100 + 16, 100 + 16]
    assert traffic.round(2, [1, 2], plan_bytes=100, reply_bytes=8) == [100 + 16, 100 + 2 * (100 + 16)]
    assert traffic.round(3, [0, 2], plan_bytes=0, reply_bytes=8) == [16 + 100 + 16, 16]


@pytest.mark.parametrize(
    ("catch_up", "expected"),
    [
        (CatchUp.REPLAY_OF_DEVICES, [100, 100 + 2 * (8 + 2 * ID_BYTES), 100 + 100 + 3 * (8 + 2 * ID_BYTES)]),
        (CatchUp.REPLAY, [100, 100 + 2 * 8, 100 + 100 + 3 * 8]),
        (CatchUp.NEWEST, [100, 100 + 8, 100 + 8]),
    ],
)
def test_a_device_catches_up_as_its_method_says(catch_up: CatchUp, expected: list[int]) -> None:
    """Device 0 plays rounds 0 and 2 as the others play 1; then it plays round 4 after those of 3."""
    traffic = Traffic(PLENTY, catch_up)
    found = [traffic.round(0, [0, 1], 100, 8)[0]]
    traffic.round(1, [1, 2], 0, 8)
    found.append(traffic.round(2, [0, 1], 100, 8)[0])
    traffic.round(3, [1, 2], 100, 8)
    traffic.round(4, [1, 2], 0, 8)
    found.append(traffic.round(5, [0, 1], 100, 8)[0])
    assert found == expected


def test_nothing_sent_is_nothing_counted() -> None:
    traffic = Traffic(1000)
    assert traffic.closing() == 0
    assert traffic.round(0, [], plan_bytes=0, reply_bytes=0) == []
    assert traffic.closing() == 0
    assert traffic.round(1, [5], plan_bytes=0, reply_bytes=0) == [0]


#: (catch-up, model, what device 0 got of round 0's reply already, rounds between, bytes whose time is still to come):
#: part of the reply; less by what it is owed; the model is fetched whole; the newest reply is another one.
AHEAD = [
    (CatchUp.REPLAY, PLENTY, 30, 0, 70),
    (CatchUp.REPLAY, PLENTY, -20, 0, 120),
    (CatchUp.REPLAY, 50, 30, 0, 50),
    (CatchUp.REPLAY, 150, 30, 1, 150),
    (CatchUp.NEWEST, PLENTY, 30, 0, 70),
    (CatchUp.NEWEST, PLENTY, 30, 1, 100),
]


@pytest.mark.parametrize(("catch_up", "model", "told", "between", "expected"), AHEAD)
def test_what_came_in_time_takes_none_again(
    catch_up: CatchUp, model: int, told: int, between: int, expected: int
) -> None:
    traffic = Traffic(model, catch_up)
    traffic.round(0, [0, 1], 100, 100, told=[told, 0])
    for number in range(1, 1 + between):
        traffic.round(number, [1], 100, 100)
    stored = {name: kept.copy() for name, kept in traffic.state().items()}
    traffic.restore(stored)
    assert traffic.ahead(0, 1 + between) == expected
    assert traffic.ahead(1, 1 + between) == min(100, model)


def test_edges_fetch_what_is_sent_again() -> None:
    traffic = Traffic(PLENTY, CatchUp.REPLAY, edges=3)
    traffic.round(0, [0], plan_bytes=100, reply_bytes=8, resent_bytes=50)
    assert traffic.to_edges() == 3 * (100 + 8 + 50)
