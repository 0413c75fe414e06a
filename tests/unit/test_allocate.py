"""Bits of a guide's units: as many as hide behind the compute, and where they are worth the most."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedbench.base.arrays import Unit
from fedbench.codec import frame
from fedbench.codec.allocate import LADDER, SLACK, USED, Schedule, allocate, lost
from fedbench.codec.codecs import CODECS
from fedbench.codec.coding import Codec

N = 40
UNITS = [Unit(f"u{k}", (65536,), lossy=True) for k in range(N)]
SECONDS = 1.0
SCHEDULE = Schedule(np.arange(N) / N * SECONDS, SECONDS)
RAW_BITS = 32.0 * sum(unit.entries for unit in UNITS)


def arrivals(codecs: list[Codec], bit_s: float) -> np.ndarray:
    """Return when each unit has arrived at the share of the rate that is reckoned with."""
    return np.cumsum([8.0 * frame.bound(u, c) for c, u in zip(codecs, UNITS, strict=True)]) / (USED * bit_s)


def missed(codecs: list[Codec], squares: np.ndarray) -> float:
    return float(sum(s * lost(c) for s, c in zip(squares, codecs, strict=True)))


@pytest.mark.parametrize("share", [0.04, 0.07, 0.15, 0.3, 0.6, 0.9])
def test_every_unit_is_there_when_it_is_read(share: float) -> None:
    squares = np.random.default_rng(3).exponential(size=N)
    bit_s = share * RAW_BITS / SECONDS
    codecs = allocate(UNITS, squares, SCHEDULE, bit_s)
    late, least = (arrivals(c, bit_s) - SCHEDULE.reads_s for c in (codecs, [LADDER[0]] * N))
    assert late.max() <= max(SLACK * SECONDS, least.max()) * (1 + 1e-9)
    sent = arrivals(codecs, bit_s)[-1]
    assert sent > 0.8 * SECONDS or set(codecs) == {LADDER[-1]}, "and the link is used"


def test_the_ends_of_the_ladder_are_for_links_without_bound_and_without_hope() -> None:
    squares = np.ones(N)
    assert set(allocate(UNITS, squares, SCHEDULE, np.inf)) == {LADDER[-1]}
    assert set(allocate(UNITS, squares, SCHEDULE, 1e-3 * RAW_BITS)) == {LADDER[0]}


@pytest.mark.parametrize("share", [0.08, 0.2, 0.4])
def test_it_misses_less_than_any_single_codec_that_hides_as_well(share: float) -> None:
    squares = 10.0 ** np.random.default_rng(5).uniform(-4, 0, N)
    bit_s = share * RAW_BITS / SECONDS
    chosen = allocate(UNITS, squares, SCHEDULE, bit_s)
    for codec in LADDER:
        same = [codec] * N
        if (arrivals(same, bit_s) - SCHEDULE.reads_s).max() <= SLACK * SECONDS:
            assert missed(chosen, squares) <= missed(same, squares)
    assert len(set(chosen)) > 1


def test_bits_follow_the_water_level() -> None:
    """Where all units are read at the end, bits rise by half a bit each doubling of variance, cut to the ladder."""
    squares = 4.0 ** np.arange(N)
    late = Schedule(np.full(N, SECONDS), SECONDS)
    codecs = allocate(UNITS, squares, late, 0.25 * RAW_BITS)
    bits = [codec.bits for codec in codecs]
    assert bits == sorted(bits)
    assert codecs[0] is LADDER[0]
    assert bits[-1] >= 8


def test_equal_inputs_give_equal_codecs_and_zeros_get_the_least() -> None:
    squares = np.where(np.arange(N) % 2 == 0, 0.0, 1.0)
    first, second = (allocate(UNITS, squares, SCHEDULE, 0.3 * RAW_BITS) for _ in range(2))
    assert first == second
    assert {codec.name for codec in first[::2]} == {LADDER[0].name}


def test_each_step_of_the_ladder_buys_less_for_a_bit() -> None:
    gains = [(lost(a) - lost(b)) / (b.bits - a.bits) for a, b in itertools.pairwise(LADDER)]
    assert gains == sorted(gains, reverse=True)
    assert min(gains) > 0


@pytest.mark.parametrize(("entries", "fits"), [(768, 10), (65536, 39)])
def test_a_small_unit_costs_its_header_too(entries: int, fits: int) -> None:
    """On a link that carries all payloads at 2 bits just in time, headers leave room for a quarter of small ones."""
    units = [Unit(f"u{k}", (entries,), lossy=True) for k in range(N)]
    late = Schedule(np.full(N, SECONDS), SECONDS)
    bit_s = 8.0 * sum(CODECS["int2"].coded_bytes(unit.entries) for unit in units) / SECONDS / (1 + SLACK) / USED
    codecs = allocate(units, np.ones(N), late, bit_s)
    assert codecs.count(CODECS["int2"]) == fits


def test_units_that_no_codec_makes_smaller_are_told_raw() -> None:
    units = [Unit("tiny", (3,), lossy=True), *UNITS]
    codecs = allocate(units, np.ones(N + 1), Schedule(np.zeros(N + 1), SECONDS), 1.0)
    assert [codec.name for codec in codecs] == ["raw"] + N * [LADDER[0].name]
