"""Rates and times with their units, and what a link makes of them."""

from __future__ import annotations

import math

import pytest

from fedbench.base.job import LinkSection
from fedbench.base.link import Link
from fedbench.base.quantity import bit_s, seconds, size_bytes

#: text -> bit/s
RATES = {
    "100Mbit/s": 1e8, "100 Mbit/s": 1e8, " 2.5Gbit/s ": 2.5e9, "1bit/s": 1.0, "12MB/s": 9.6e7, "3kB/s": 24e3,
    "1e3bit/s": 1e3, "1Tbit/s": 1e12,
}  # fmt: skip
#: text -> seconds
TIMES = {"20ms": 0.02, "1.5s": 1.5, "50us": 5e-5, "2min": 120.0, "0s": 0.0, "1e-3 s": 1e-3}
#: text -> bytes
SIZES = {
    "512MB": 5.12e8,
    "4GiB": 2.0**32,
    "1 KiB": 1024.0,
    "1.5kB": 1500.0,
    "7B": 7.0,
    "1e3 MiB": 1e3 * 2**20,
    "2GB": 2e9,
}
BAD_RATES = (
    "",
    "100",
    "Mbit/s",
    "100Mbit",
    "100mbit/s",
    "100Mbps",
    "-1Mbit/s",
    "0Mbit/s",
    "1,5Mbit/s",
    "infbit/s",
    "1e999bit/s",
)
BAD_SIZES = ("", "4", "GiB", "4Gi", "4gb", "0B", "-1B", "4 G B", "1TB", "nanB", "1e999B")
BAD_TIMES = ("", "20", "ms", "-1ms", "20 m s", "1h", "nan s", "1e s", "1e999s")


@pytest.mark.parametrize("text", RATES)
def test_a_rate_is_bits_in_a_second(text: str) -> None:
    assert bit_s(text) == pytest.approx(RATES[text], rel=1e-15)


@pytest.mark.parametrize("text", TIMES)
def test_a_time_is_seconds(text: str) -> None:
    assert seconds(text) == pytest.approx(TIMES[text], rel=1e-15)


@pytest.mark.parametrize("text", SIZES)
def test_a_size_is_bytes(text: str) -> None:
    assert size_bytes(text) == pytest.approx(SIZES[text], rel=1e-15)


@pytest.mark.parametrize(
    ("reader", "text"),
    [
        *((bit_s, text) for text in BAD_RATES),
        *((seconds, text) for text in BAD_TIMES),
        *((size_bytes, text) for text in BAD_SIZES),
    ],
)
def test_what_is_not_read_whole_is_refused(reader: type, text: str) -> None:
    with pytest.raises(ValueError, match="found "):
        reader(text)


def test_a_link_takes_the_time_of_its_bytes_and_a_delay_from_the_key() -> None:
    link = LinkSection(down="8Mbit/s", up="800kbit/s", latency="20ms", jitter="10ms").link
    assert link == Link(8e6, 8e5, 0.02, 0.01)
    assert (link.transfer_s(1e6, up=False), link.transfer_s(1e6, up=True)) == (1.0, 10.0)
    delays = [link.delay_s(3, device, message, up=False) for device in range(4) for message in range(50)]
    assert delays[7] == link.delay_s(3, 0, 7, up=False)
    assert len(set(delays)) == len(delays)
    assert 0.02 <= min(delays) < 0.022
    assert 0.028 < max(delays) <= 0.03
    assert delays[0] != link.delay_s(3, 0, 0, up=True)
    assert delays[0] != link.delay_s(4, 0, 0, up=False)


def test_a_link_without_bounds_takes_no_time() -> None:
    link = LinkSection().link
    assert link == Link(math.inf, math.inf, 0.0, 0.0)
    assert link.transfer_s(1e9, up=True) == link.delay_s(0, 0, 0, up=True) == 0.0
