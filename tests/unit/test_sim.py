"""The simulated clock against closed forms: pipelines, shared links, deadlines, draws by key, and profiles by name."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from tinyruns import make_job

from fedbench.base.errors import EXIT_USER, ConfigError
from fedbench.base.job import ProfileSection
from fedbench.base.link import Link
from fedbench.sim import draws, exact, pipeline
from fedbench.sim.clock import Load, RoundClock
from fedbench.sim.profiles import DEVICES, JOULES_PER_BYTE, LINKS, device_of, link_of
from fedbench.sim.scene import Scene, scene_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "simulation.md"
VIRTUAL = {"link.clock": "virtual"}


def longest_path(ready: list[float], transfer: list[float], compute: list[float]) -> float:
    """Return the pipeline's makespan as the longest path: wait for unit j, cross j .. k, compute k .. L."""
    count = len(ready)
    return max(ready[j] + sum(transfer[j : k + 1]) + sum(compute[k:]) for j in range(count) for k in range(j, count))


@pytest.mark.parametrize("seed", range(8))
def test_the_recurrence_is_the_longest_path(seed: int) -> None:
    stream = np.random.default_rng(seed)
    count = int(stream.integers(1, 12))
    ready = np.cumsum(stream.exponential(1.0, count)).tolist()
    transfer, compute = (stream.exponential(scale, count).tolist() for scale in stream.uniform(0.2, 3.0, 2))
    found = pipeline.makespan(pipeline.crossed(0.0, ready, transfer), compute)
    assert found == pytest.approx(longest_path(ready, transfer, compute), rel=1e-12)
    sampling = np.diff([0.0, *ready]).tolist()
    stages = [sum(stage) for stage in (sampling, transfer, compute)]
    assert max(stages) <= found <= sum(stages), "between what no schedule beats and no overlap at all"


#: units, time of a unit's transfer and of its compute
EVEN = [(1, 2.0, 3.0), (5, 2.0, 3.0), (5, 3.0, 2.0), (7, 1.0, 1.0), (4, 0.0, 2.0), (4, 2.0, 0.0)]


@pytest.mark.parametrize(("count", "a", "b"), EVEN)
def test_even_units_fill_once_and_then_hide_the_shorter_stage(count: int, a: float, b: float) -> None:
    found = pipeline.makespan(pipeline.crossed(0.0, [0.0] * count, [a] * count), [b] * count)
    assert found == a + (count - 1) * max(a, b) + b


def scene(**changes: Any) -> Scene:
    """Return a scene of round numbers: 1 MB/s down, 0.5 MB/s up, 1 MFLOP/s, the cloud 10 MFLOP/s."""
    told: dict[str, Any] = {"link": Link(8e6, 4e6, 0.25, 0.0), "cloud_flops_per_s": 1e7}
    device = DEVICES["jetson-nano"]._replace(flops_per_s=1e6)
    return Scene(seed=3, device=device, **(told | changes))


def load(devices: int, units: int = 1, **changes: Any) -> Load:
    """Return a load of round numbers for some devices: 4 MB down, 2 MFLOP, 1 MB up, 20 MFLOP of the cloud."""
    told: dict[str, Any] = {
        "plan_flops": 2e7,
        "unit_bytes": np.full(units, 4e6 / units),
        "shares": np.full(units, 1 / units),
        "missed_bytes": np.zeros(devices),
        "reply_bytes": 0.0,
        "flops": np.full(devices, 2e6),
        "up_bytes": np.full(devices, 1e6),
    }
    return Load(**(told | changes))


def play(clock: RoundClock, devices: np.ndarray, asked: Load) -> np.ndarray:
    """Let an exchange take place with what the key says."""
    return clock.play(devices, asked, clock.draw(devices))


#: scene, devices, load -> seconds of the exchange, by hand. Cloud 2, down 4 a device, compute 2, up 2, latency 0.25 a way.
BY_HAND: list[tuple[str, dict[str, Any], int, dict[str, Any], float]] = [
    ("one unit: nothing overlaps", {}, 1, {}, 2 + 4 + 2 + 2 + 0.5),
    ("four units: compute hides but for the last", {}, 1, {"units": 4}, 2 + 4 + 0.5 + 2 + 0.5),
    ("no plan: compute and send", {}, 1, {"unit_bytes": np.zeros(1), "plan_flops": 0.0}, 2 + 2 + 0.5),
    ("missed rounds come while the cloud computes", {}, 1, {"missed_bytes": np.full(1, 1e6)}, 2 + 4 + 2 + 2 + 0.5),
    ("and delay the plan where they take longer", {}, 1, {"missed_bytes": np.full(1, 5e6)}, 5 + 4 + 2 + 2 + 0.5),
    ("the last reply comes first", {}, 1, {"reply_bytes": 3e6, "plan_flops": 0.0}, 3 + 4 + 2 + 2 + 0.5),
    ("a wide trunk bounds nobody", {"trunk_bit_s": 4 * 8e6}, 4, {}, 2 + 4 + 2 + 2 + 0.5),
    ("a narrow one is shared", {"trunk_bit_s": 8e6}, 4, {}, 2 + 16 + 2 + 4 + 0.5),
    (
        "edges share the cloud's and have their own",
        {"trunk_bit_s": 8e6, "tree": True, "edges": 2, "trunk_latency_s": 1.0},
        4,
        {},
        2 + (8 + 1) + (8 + 0.25) + 2 + (2 + 0.25) + (4 + 1),
    ),
    (
        "what an edge relays, it cuts through",
        {"trunk_bit_s": 8e6, "tree": True, "edges": 2},
        4,
        {"units": 4},
        2 + 8 + 2 + 0.25 + 0.5 + (2 + 0.25) + 4,
    ),
    (
        "an edge keeps the history",
        {"trunk_bit_s": 8e6, "tree": True, "edges": 4},
        4,
        {"missed_bytes": np.full(4, 2e6), "unit_bytes": np.zeros(1), "plan_flops": 0.0},
        2 + 0.25 + 2 + 2 + 0.25 + 4,
    ),
    ("a deadline that nobody misses is none", {"deadline_s": 10.5}, 1, {}, 10.5),
    ("one that somebody misses ends the exchange", {"deadline_s": 10.0}, 1, {}, 10.0),
]


@pytest.mark.parametrize(
    ("changes", "devices", "more", "expected"), [row[1:] for row in BY_HAND], ids=[r[0] for r in BY_HAND]
)
def test_an_exchange_takes_what_it_takes_by_hand(
    changes: dict[str, Any], devices: int, more: dict[str, Any], expected: float
) -> None:
    clock = RoundClock(scene(**changes), 0)
    answers = play(clock, np.arange(devices), load(devices, **more))
    times = clock.end()
    assert times.total == pytest.approx(expected, rel=1e-12)
    assert (answers <= clock.scene.deadline_s).all() == (changes.get("deadline_s") != 10.0)


def test_one_unit_takes_its_bound_and_many_come_near_it() -> None:
    found = {}
    for units in (1, 4, 64):
        clock = RoundClock(scene(), 0)
        play(clock, np.arange(3), load(3, units))
        times = clock.end()
        assert times.bound == 2 + 4 + 2 + 0.5
        found[units] = times.total
    assert found[1] == 2 + 4 + 2 + 2 + 0.5
    assert found[64] == pytest.approx(2 + 4 + 2 + 0.5 + 2 / 64)
    compute_bound = RoundClock(scene(), 0)
    play(compute_bound, np.arange(3), load(3, 64, flops=np.full(3, 9e6)))
    assert compute_bound.end().total == pytest.approx(2 + 4 / 64 + 9 + 2 + 0.5)


@pytest.mark.parametrize("seed", range(12))
def test_no_round_beats_its_bound(seed: int) -> None:
    stream = np.random.default_rng(seed)
    changes = {
        "spread": 0.5,
        "trunk_bit_s": float(stream.choice([8e6, 8e7, math.inf])),
        "trunk_latency_s": 0.1,
        "tree": bool(seed % 2),
        "edges": 3,
    }
    clock, count = RoundClock(scene(**changes), seed), int(stream.integers(1, 20))
    devices, units = np.sort(stream.choice(100, count, replace=False)), int(stream.integers(1, 6))
    for exchange in range(3):
        more = {
            "unit_bytes": stream.exponential(1e6, units),
            "shares": stream.dirichlet(np.ones(units)),
            "missed_bytes": stream.exponential(1e6, count) * (exchange == 0),
            "reply_bytes": 1e5 * exchange,
            "flops": stream.exponential(3e6, count),
            "up_bytes": stream.exponential(1e5, count),
        }
        play(clock, devices, load(count, **more))
        clock.cloud(1e6)
    times = clock.end()
    assert 0 < times.bound <= times.total * (1 + 1e-12)
    assert times.wait == 0
    assert times.cloud == pytest.approx(3 * 2.1)


def test_late_devices_are_those_behind_the_deadline_and_the_wait_is_told() -> None:
    clock = RoundClock(scene(spread=0.6, deadline_s=11.0), 0)
    answers = play(clock, np.arange(50), load(50))
    late = answers > 11.0
    assert 5 < late.sum() < 45
    times = clock.end()
    assert times.total == 11.0
    assert times.wait == pytest.approx(11.0 - answers[~late].max())
    hopeless = RoundClock(scene(deadline_s=3.0), 0)
    assert (play(hopeless, np.arange(4), load(4)) > 3.0).all()
    assert (hopeless.end().total, hopeless.end().wait) == (3.0, 3.0)


def test_what_the_cloud_computes_meanwhile_hides_behind_the_devices() -> None:
    for flops, expected in ((8.5e7, 10.5), (9.5e7, 2 + 9.5)):
        clock = RoundClock(scene(), 0)
        play(clock, np.arange(2), load(2, ahead_flops=flops))
        assert clock.end().total == expected


def test_nobody_there_takes_a_call() -> None:
    clock = RoundClock(scene(), 0)
    assert clock.end(nobody=True).total == 0.5


def test_draws_come_from_the_key_alone_and_are_even() -> None:
    devices = np.arange(200_000)
    drawn = draws.uniform(5, "dropout", (3,), devices)
    np.testing.assert_array_equal(draws.uniform(5, "dropout", (3,), devices[::-7]), drawn[::-7])
    assert 0 <= drawn.min() < 1e-4 < 1 - 1e-4 < drawn.max() < 1
    assert np.abs(np.histogram(drawn, 20, (0, 1))[0] - 10_000).max() < 500
    others = [draws.uniform(6, "dropout", (3,), devices), draws.uniform(5, "dropout", (4,), devices)]
    others += [draws.uniform(5, "jitter", (3,), devices), np.roll(drawn, 1)]
    for other in others:
        assert abs(np.corrcoef(drawn, other)[0, 1]) < 0.01
    factors = np.log(draws.lognormal(5, "device speed", 0.5, devices))
    assert abs(factors.mean()) < 0.01
    assert factors.std() == pytest.approx(0.5, rel=0.01)


def test_factors_have_the_same_bits_everywhere() -> None:
    devices = np.arange(100_000)
    factors = draws.lognormal(5, "device speed", 0.5, devices)
    np.testing.assert_array_equal(draws.lognormal(5, "device speed", 0.5, devices[::-7]), factors[::-7])
    assert (
        hashlib.sha256(factors.tobytes()).hexdigest()
        == "7b9e31f815fe3559a6fe31d36a9a7fd87b437920f29af47f8f5a385b1a6ea68d"
    )
    u = draws.uniform(1, "dropout", (0,), devices)
    np.testing.assert_allclose(exact.log(1.0 - u), np.log1p(-u), rtol=1e-13)
    np.testing.assert_allclose(exact.cos_turns(u), np.cos(2 * np.pi * u), atol=1e-15)
    np.testing.assert_allclose(exact.exp(40 * u - 20), np.exp(40 * u - 20), rtol=1e-14)


def test_dropouts_are_drawn_for_every_round_and_keep_the_order() -> None:
    drawn = scene(dropout=0.3)
    rounds = [drawn.present(number, range(2000)) for number in range(3)]
    assert rounds[0] == drawn.present(0, range(2000))
    assert len({len(set(present)) for present in rounds}) == len(set(rounds)) == 3
    for present in rounds:
        assert list(present) == sorted(present)
        assert 1300 < len(present) < 1500
    assert scene(dropout=1.0).present(0, range(50)) == ()
    assert scene().present(0, [3, 5]) == (3, 5)


def test_profiles_have_the_names_that_a_job_may_say_and_stand_on_the_page() -> None:
    page = PAGE.read_text()
    for key, table in (("name", LINKS), ("device", DEVICES)):
        allowed = get_args(get_args(ProfileSection.model_fields[key].annotation)[0])
        assert set(allowed) == set(table)
    for name, link in LINKS.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        for value in (link.down_bit_s / 1e6, link.up_bit_s / 1e6, link.latency_s * 1e3, link.jitter_s * 1e3):
            assert f"| {value:g} |" in row, (name, value)
        assert ("not known" in row) == (name not in JOULES_PER_BYTE)
        assert "http" in row or "IEEE" in row
    for name, device in DEVICES.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        for text in (f"| {device.flops_per_s / 1e9:g} |", f"| {device.joules_per_flop * 1e12:.3g} |", "http"):
            assert text in row, (name, text)


def test_what_a_job_says_goes_before_its_profile() -> None:
    changes = {"profile.name": "lte", "link.up": "1Mbit/s", "link.latency": "1ms", "profile.device": "jetson-nano"}
    config = make_job("fedmezo", changes | {"profile.flops_per_s": 5.0, "profile.memory": "1kB"}).config
    assert link_of(config) == LINKS["lte"]._replace(up_bit_s=1e6, latency_s=1e-3)
    assert device_of(config) == DEVICES["jetson-nano"]._replace(flops_per_s=5.0, memory_bytes=1000.0)
    assert link_of(make_job("fedmezo", {}).config) == Link()


#: what needs the simulated clock
NEEDY = {
    "profile.dropout": 0.1, "profile.deadline_s": 2.0, "run.train_every": 2, "profile.memory": "1GiB",
    "profile.trunk": "1Gbit/s", "profile.trunk_latency": "1ms", "profile.spread": 0.1, "profile.cloud_flops_per_s": 1e12,
}  # fmt: skip
#: what paced links and adaptive codecs rest on as well
FREE = {"profile.name": "lte", "profile.device": "jetson-nano", "profile.flops_per_s": 1e9}


@pytest.mark.parametrize("key", NEEDY)
@pytest.mark.parametrize("clock", ["none", "paced"])
def test_what_the_simulated_clock_decides_is_refused_on_others(key: str, clock: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: found .* with link.clock = '{clock}'; allowed with it: ") as caught:
        scene_of(make_job("fedmezo", {key: NEEDY[key], "link.clock": clock}).config)
    assert caught.value.exit_code == EXIT_USER
    assert scene_of(make_job("fedmezo", {key: NEEDY[key]} | VIRTUAL).config) is not None
    assert scene_of(make_job("fedmezo", FREE | {"link.clock": clock}).config) is None
    every = {f"profile.{name}" for name in ProfileSection.model_fields} | {"run.train_every"}
    assert every == set(NEEDY) | set(FREE)


def test_a_device_that_can_not_hold_its_weights_is_refused() -> None:
    small = scene()._replace(device=DEVICES["jetson-nano"]._replace(memory_bytes=1000.0))
    small.check_memory(1000)
    with pytest.raises(ConfigError, match=r"profile.memory: a device has 1,000 B, its weights take 1,001 B; allowed: "):
        small.check_memory(1001)
