"""Codecs: sizes, lengths and cosines as they promise, hard bounds on errors, and units of every awkward kind."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tinyruns import make

from fedbench.base.arrays import Unit
from fedbench.base.errors import NumericsError, WireError
from fedbench.codec.codecs import CODECS, RAW, by_id
from fedbench.codec.coding import TILE_ENTRIES, Codec
from fedbench.codec.feedback import PlanCoder
from fedbench.codec.frame import coded_bytes
from fedbench.zo.guide import mean_gradient

LOSSY = {name: codec for name, codec in CODECS.items() if codec is not RAW}
TURNED = ("int4", "int2", "sign")
MOST = float(np.finfo(np.float32).max)
EVERY = pytest.mark.parametrize("name", LOSSY)


def normal(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


def encoded(codec: Codec, values: np.ndarray) -> np.ndarray:
    """Return the payload, written between guards that must stay."""
    memory = np.full(codec.coded_bytes(values.size) + 32, 0xA5, np.uint8)
    codec.encode(values, memory[16:-16])
    assert (memory[:16] == 0xA5).all()
    assert (memory[-16:] == 0xA5).all()
    return memory[16:-16]


def through(codec: Codec, values: np.ndarray) -> np.ndarray:
    memory = np.full(values.size + 8, np.float32(-77))
    codec.decode(encoded(codec, values), memory[4:-4])
    assert (memory[:4] == -77).all()
    assert (memory[-4:] == -77).all()
    return memory[4:-4].copy()


def length(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values, dtype=np.float64).sum()))


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.multiply(left, right, dtype=np.float64).sum()) / (length(left) * length(right))


#: Name -> payload bytes of n entries, as docs/codecs.md states them.
SIZES: dict[str, Callable[[int], int]] = {
    "raw": lambda n: 4 * n,
    "fp16": lambda n: 4 + 2 * n,
    "int8": lambda n: 4 + (n + 63) // 64 * 65,
    "int4": lambda n: 4 + (n + 63) // 64 * 33,
    "int2": lambda n: 4 + (n + 63) // 64 * 17,
    "sign": lambda n: 4 + (n + 63) // 64 * 9,
    "topk": lambda n: 4 + (n + 255) // 256 * 2 + (n + 15) // 16 * 2,
}
COUNTS = (0, 1, 2, 63, 64, 65, 100, 255, 256, 257, 960, 961, 1023, 1024, 1025, 2047, 5000)


@pytest.mark.parametrize("name", CODECS)
def test_sizes_are_what_the_formula_says_and_numbers_find_their_codec(name: str) -> None:
    codec = CODECS[name]
    for count in COUNTS:
        assert codec.coded_bytes(count) == SIZES[name](count)
        assert encoded(codec, normal(count)).size == SIZES[name](count)
    assert codec.coded_bytes(TILE_ENTRIES) <= 4 * TILE_ENTRIES
    assert codec.bits == pytest.approx(8 * codec.coded_bytes(TILE_ENTRIES) / TILE_ENTRIES, rel=2e-3)
    assert by_id(codec.id) is codec
    assert by_id(99) is None
    with pytest.raises(WireError, match=f"{name}: a payload of"):
        codec.decode(np.zeros(codec.coded_bytes(100) + 1, np.uint8), np.empty(100, np.float32))


@EVERY
def test_lengths_are_kept_for_every_number_of_entries(name: str) -> None:
    for count in COUNTS:
        values = normal(count, count)
        assert length(through(LOSSY[name], values)) == pytest.approx(length(values), rel=1e-6), count


@EVERY
def test_the_cosine_of_normal_entries_is_the_stated_one(name: str) -> None:
    values = normal(TILE_ENTRIES)
    assert cosine(values, through(LOSSY[name], values)) == pytest.approx(LOSSY[name].cosine, abs=1e-3)
    assert cosine(values, through(LOSSY[name], values)) >= {"int4": 0.995, "int2": 0.939, "sign": 0.798}.get(name, 0)


#: Units that are far from normal.
UNLIKE_NORMAL: dict[str, Callable[[], np.ndarray]] = {
    "heavy tails": lambda: np.random.default_rng(1).standard_t(2, 20_000).astype(np.float32),
    "Laplace": lambda: np.random.default_rng(2).laplace(size=20_000).astype(np.float32),
    "all equal": lambda: np.full(20_000, 0.3, np.float32),
    "rows of many sizes": lambda: (
        (normal(20_000).reshape(200, 100) * 10 ** np.random.default_rng(3).uniform(-4, 4, (200, 1)))
        .astype(np.float32)
        .reshape(-1)
    ),
    "outliers": lambda: np.where(np.arange(20_000) % 997 == 0, np.float32(300), normal(20_000)),
}


@pytest.mark.parametrize("kind", UNLIKE_NORMAL)
@pytest.mark.parametrize("name", ["fp16", "int8", *TURNED])
def test_the_cosine_holds_for_units_that_are_not_normal(name: str, kind: str) -> None:
    values = UNLIKE_NORMAL[kind]()
    assert cosine(values, through(LOSSY[name], values)) >= LOSSY[name].cosine - 0.012


def test_topk_keeps_the_largest_sixteenth_and_the_first_of_equals() -> None:
    values = normal(4096)
    found = through(LOSSY["topk"], values)
    kept = np.argsort(-np.abs(values), kind="stable")[:256]
    assert set(np.flatnonzero(found)) == set(kept)
    ratio = found[kept] / values[kept]
    assert ratio.max() / ratio.min() < (1 + 1 / 16) / (1 - 1 / 16)
    assert np.flatnonzero(through(LOSSY["topk"], np.ones(4096, np.float32))).tolist() == list(range(256))


def test_errors_of_single_entries_stay_within_the_stated_bounds() -> None:
    values = np.random.default_rng(5).standard_t(2, 64 * 16 * 10).astype(np.float32)
    for name, places in (("fp16", 2.0**-11), ("int8", None)):
        found = through(LOSSY[name], values).astype(np.float64)
        gain = length(found) / length(found) * cosine(values, found)  # what the best fit would be times
        if places is not None:
            bound = np.maximum(np.abs(values) * places, 2.0**-24 * np.abs(values).max())
        else:  # half a step of 17/16 of the block's largest entry over 127
            blocks = np.abs(values).reshape(-1, 64, 16).max(axis=1, keepdims=True)
            bound = np.broadcast_to(blocks * 17 / 16 / 127 / 2, (10, 64, 16)).reshape(-1)
        slack = np.abs(values) * abs(1 - gain) * 2 + np.abs(values) * 1e-4
        assert (np.abs(found - values) <= bound + slack).all(), name


@EVERY
def test_a_unit_of_zeros_stays_zero_and_zero_blocks_stay_empty(name: str) -> None:
    assert not through(LOSSY[name], np.zeros(3000, np.float32)).any()
    values = np.zeros(4096, np.float32)
    values[1024:2048] = normal(1024)
    found = through(LOSSY[name], values)
    assert not found[:1024].any()
    assert not found[2048:].any()
    assert length(found) == pytest.approx(length(values), rel=1e-6)


@EVERY
def test_a_lone_entry_comes_back_wherever_it_stands(name: str) -> None:
    for place in (0, 63, 1000, 1023, 1024, 1500):
        values = np.zeros(1501, np.float32)
        values[place] = -2.75
        assert np.abs(through(LOSSY[name], values) - values).max() < 1e-5


@EVERY
@pytest.mark.parametrize("power", [-146, -140, -126, -60, 0, 60, 118])
def test_cosine_and_length_hold_at_every_magnitude(name: str, power: int) -> None:
    values = (normal(3000).astype(np.float64) * 2.0**power).astype(np.float32)
    found = through(LOSSY[name], values)
    grid = 2.0**-149 * np.sqrt(3000)  # float32 has no smaller steps
    assert abs(length(found) - length(values)) <= 1e-6 * length(values) + 2 * grid
    if power > -140:
        assert cosine(values, found) == pytest.approx(
            cosine(normal(3000), through(LOSSY[name], normal(3000))), abs=1e-3
        )


@EVERY
def test_the_greatest_numbers_are_decoded_to_finite_ones_in_their_direction(name: str) -> None:
    values = (np.sign(normal(3000)) * MOST * np.linspace(0.5, 1, 3000)).astype(np.float32)
    found = through(LOSSY[name], values)
    assert np.isfinite(found).all()
    assert cosine(values, found) > (0.2 if name == "topk" else LOSSY[name].cosine - 0.03)


@EVERY
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_infinity_and_nan_are_refused_wherever_they_stand(name: str, wrong: float) -> None:
    for place in (0, 500, 1400):
        values = normal(1401)
        values[place] = wrong
        with pytest.raises(NumericsError, match="Found infinity or NaN among 1,401 values"):
            through(LOSSY[name], values)


@EVERY
def test_payloads_are_a_function_of_the_values_and_their_sign_is_free(name: str) -> None:
    values = normal(5000, 7)
    assert encoded(LOSSY[name], values).tobytes() == encoded(LOSSY[name], values.copy()).tobytes()
    assert cosine(through(LOSSY[name], -values), -through(LOSSY[name], values)) > 0.99


def test_what_can_be_no_payload_is_refused() -> None:
    out = np.empty(3000, np.float32)
    for name, codec in LOSSY.items():
        payload = encoded(codec, normal(3000))
        for gain in (np.nan, np.inf, -1.0):
            payload[:4] = np.array([gain], "<f4").view(np.uint8)
            with pytest.raises(WireError, match=f"{name}: a gain of"):
                codec.decode(payload, out)
    topk = LOSSY["topk"]
    counts = encoded(topk, normal(3000))
    counts[4] ^= 1
    with pytest.raises(WireError, match="topk: counts of"):
        topk.decode(counts, out)
    places = encoded(topk, normal(3000))
    places[4 + 24 : 4 + 24 + 188] = 200
    with pytest.raises(WireError, match="topk: places that don't ascend"):
        topk.decode(places, out)


def test_a_real_gradient_keeps_its_direction() -> None:
    """The embedded model's public gradient, tile by tile: sizes differ, tails are heavier than normal ones."""
    built = make("cooperllm")
    _, grads = mean_gradient(built.cut, built.trainable, built.lab.public_rows(), built.lab.meter)
    units = [np.ascontiguousarray(grad.numpy()).reshape(-1) for grad in grads]
    reach = {"fp16": 0.9999, "int8": 0.9999, "int4": 0.995, "int2": 0.94, "sign": 0.79, "topk": 0.8}
    for name, codec in LOSSY.items():
        product = sum(float(np.multiply(unit, through(codec, unit), dtype=np.float64).sum()) for unit in units)
        assert product / sum(length(unit) ** 2 for unit in units) >= reach[name], name


# ---- Error feedback ----

UNITS = (
    Unit("a", (40, 100), lossy=True),
    Unit("b", (3000,), lossy=True),
    Unit("small", (3,), lossy=True),
    Unit("ids", (9,)),
)


def a_plan(seed: int = 0) -> dict[str, np.ndarray]:
    return {unit.name: normal(unit.entries, seed).reshape(unit.shape) for unit in UNITS}


def sent(coder: PlanCoder, plan: dict[str, np.ndarray], sign: float = 1.0) -> dict[str, np.ndarray]:
    """Return a plan as all ranks decode it."""
    ready = coder.prepare(UNITS, plan, sign)
    decoded = {
        unit.name: through(codec, np.ascontiguousarray(ready[unit.name]).reshape(-1)).reshape(unit.shape)
        for unit, codec in zip(UNITS, coder.codecs(UNITS), strict=True)
    }
    coder.settle(decoded)
    return decoded


def joint(plan: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([plan[unit.name].reshape(-1) for unit in UNITS if unit.lossy])


def test_only_guides_are_coded_and_small_ones_are_not() -> None:
    coder = PlanCoder(CODECS["sign"])
    assert [codec.name for codec in coder.codecs(UNITS)] == ["sign", "sign", "raw", "raw"]
    assert [coded_bytes(unit, CODECS["sign"]) for unit in UNITS] == [4 + 63 * 9, 4 + 47 * 9, 12, 36]
    plan = a_plan()
    assert coder.prepare(UNITS, plan, -1.0) is plan
    assert coder.state() == {}


@pytest.mark.parametrize("name", ["int2", "sign", "topk"])
def test_what_coding_lost_is_made_up_for_by_the_next_plans(name: str) -> None:
    """A guide that stays: the mean of what was sent turns to it, whatever random signs it was sent with."""
    plan, rounds = a_plan(), 40
    means = []
    for feedback in (False, True):
        coder = PlanCoder(CODECS[name], feedback=feedback)
        total = np.zeros(joint(plan).size)
        for number in range(rounds):
            sign = 1.0 if number % 3 else -1.0
            decoded = sent(coder, {key: np.float32(sign) * array for key, array in plan.items()}, sign)
            assert length(joint(decoded)) == pytest.approx(length(joint(plan)), rel=1e-5)
            np.testing.assert_array_equal(decoded["ids"], np.float32(sign) * plan["ids"])
            total += sign * joint(decoded)
        means.append(cosine(total, joint(plan)))
    assert means[0] == pytest.approx(LOSSY[name].cosine, abs=0.02)
    assert means[1] > 0.98


@pytest.mark.parametrize("name", LOSSY)
def test_what_is_lost_stays_bounded_on_the_worst_units(name: str) -> None:
    """Entries of one size: topk sends a sixteenth of them, at a cosine of 1/4."""
    coder = PlanCoder(CODECS[name], feedback=True)
    plan = {unit.name: np.sign(normal(unit.entries)).reshape(unit.shape) for unit in UNITS}
    lost = []
    for _ in range(250):
        sent(coder, plan)
        lost.append(length(np.concatenate([array.reshape(-1) for array in coder.state().values()])))
    assert max(lost) < 10 * length(joint(plan))
    assert max(lost[200:]) <= 1.1 * max(lost[:200])


def test_what_was_lost_of_other_rows_is_forgotten() -> None:
    """Two outlines of one length: the residuals of a table's rows 1, 4 are not added to its rows 2, 4."""
    first, second = ({"a": np.array(rows, np.int32)} for rows in ((1, 4), (2, 4)))
    for rows, kept in ((first, True), (second, False)):
        coder = PlanCoder(CODECS["sign"], feedback=True)
        coder.settle({name: 0.5 * np.sign(array) for name, array in coder.prepare(UNITS, a_plan(), 1.0, first).items()})
        resumed = PlanCoder(CODECS["sign"], feedback=True)
        resumed.restore(coder.state())
        for one in (coder, resumed):
            ready = one.prepare(UNITS, a_plan(1), 1.0, rows)
            assert (cosine(ready["a"], a_plan(1)["a"]) < 0.999) == kept
            assert cosine(ready["b"], a_plan(1)["b"]) < 0.999, "units that hold whole tensors are not touched"


def test_state_and_restore_go_on_with_the_same_bits() -> None:
    straight, stopped = (PlanCoder(CODECS["int2"], feedback=True) for _ in range(2))
    for number in range(3):
        first, second = sent(straight, a_plan(number), -1.0), sent(stopped, a_plan(number), -1.0)
        assert joint(first).tobytes() == joint(second).tobytes()
        resumed = PlanCoder(CODECS["int2"], feedback=True)
        resumed.restore({name: array.copy() for name, array in stopped.state().items()})
        stopped = resumed
    assert set(stopped.state()) == {unit.name for unit in UNITS if unit.lossy}
