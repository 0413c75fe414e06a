"""Frames: what is packed comes back, and nothing else is ever taken for it."""

from __future__ import annotations

import tracemalloc
from typing import Any

import lz4.frame
import numpy as np
import pytest
import xxhash

from fedbench.base.arrays import Unit
from fedbench.base.errors import NumericsError, WireError
from fedbench.codec import frame
from fedbench.codec.codecs import CODECS, RAW
from fedbench.codec.coding import Codec
from fedbench.codec.frame import AGAIN, LZ4, Note, Place

PLACE = Place(round=3, exchange=1, device=7, unit=2)
NOTE = Note(loss=0.5, compute_s=0.25, flops=1e9, again=True)
PLAIN_OR_LZ4 = pytest.mark.parametrize("lz4", [False, True], ids=["plain", "lz4"])
EVERY_CODEC = pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))
SENTINEL = 0xA5


def noise(count: int) -> np.ndarray:
    """Return float32 that LZ4 can't shrink much."""
    return np.random.default_rng(count).standard_normal(count).astype(np.float32)


def signs(count: int) -> np.ndarray:
    """Return float32 that LZ4 shrinks well."""
    return np.where(np.arange(count) % 5 < 2, np.float32(1), np.float32(-1))


def packed(array: np.ndarray, *, lz4: bool = False, dtype: str = "<f4", codec: Codec = RAW) -> tuple[np.ndarray, Unit]:
    unit = Unit("weights", array.shape, dtype, lossy=dtype == "<f4")
    return frame.pack(array, unit, PLACE, codec, NOTE, lz4=lz4).frame.copy(), unit


def unpacked(bytes_: np.ndarray, unit: Unit, codec: Codec = RAW, place: Place = PLACE) -> tuple[np.ndarray, Note]:
    return frame.unpack(bytes_, unit, place, (codec,), "device 7")


def forged(bytes_: np.ndarray, **fields: Any) -> np.ndarray:
    """Return a frame with other header fields and a checksum that fits them."""
    copy = bytes_.copy()
    for name, value in fields.items():
        copy[: frame.HEADER_BYTES].view(frame._HEADER)[name] = value
    digest = xxhash.xxh3_64(copy[: frame._CHECKSUM_AT].tobytes() + copy[frame.HEADER_BYTES :].tobytes())
    copy[frame._CHECKSUM_AT : frame.HEADER_BYTES].view("<u8")[0] = digest.intdigest()
    return copy


ARRAYS = [
    (noise(1), "<f4"),
    (noise(1000), "<f4"),
    (signs(4096).reshape(64, 64), "<f4"),
    (np.zeros((3, 0), np.float32), "<f4"),
    (np.array(2.5, np.float32), "<f4"),
    (np.arange(-300, 300, dtype=np.int64), "<i8"),
    (np.array([np.nan, np.inf, -0.0, 1e-45], np.float64), "<f8"),
    (np.frombuffer(bytes(range(256)), np.uint8), "|u1"),
]


@PLAIN_OR_LZ4
@pytest.mark.parametrize(("array", "dtype"), ARRAYS)
def test_what_is_packed_comes_back_bit_for_bit(array: np.ndarray, dtype: str, lz4: bool) -> None:
    bytes_, unit = packed(array, lz4=lz4, dtype=dtype)
    back, note = unpacked(bytes_, unit)
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert note == NOTE
    assert bytes_.size <= frame.bound(unit)


def test_no_note_and_strided_arrays_survive() -> None:
    array = noise(64).reshape(8, 8).T
    unit = Unit("weights", array.shape)
    back, note = unpacked(frame.pack(array, unit, PLACE).frame, unit)
    assert np.array_equal(back, array)
    assert np.isnan(note.loss)
    assert note[1:] == (0.0, 0.0, False, 0.0)


def test_lz4_shrinks_what_it_can_and_sends_the_rest_raw() -> None:
    small, unit = packed(signs(4096), lz4=True)
    assert small.size < frame.HEADER_BYTES + unit.raw_bytes // 10
    large, unit = packed(noise(4096), lz4=True)
    assert large.size == frame.HEADER_BYTES + unit.raw_bytes
    assert large[: frame.HEADER_BYTES].view(frame._HEADER)["flags"][0] == AGAIN


@PLAIN_OR_LZ4
def test_a_frame_stays_within_its_bound_in_a_given_buffer(lz4: bool) -> None:
    for array in (noise(777), signs(777)):
        unit = Unit("weights", array.shape)
        memory = np.full(frame.bound(unit) + 64, SENTINEL, np.uint8)
        result = frame.pack(array, unit, PLACE, RAW, NOTE, memory[: frame.bound(unit)], lz4=lz4)
        assert (memory[frame.bound(unit) :] == SENTINEL).all()
        assert result.frame.size == frame.HEADER_BYTES + result.coded_bytes
        assert np.shares_memory(result.frame, memory)
    with pytest.raises(WireError, match="doesn't fit a buffer of 100"):
        frame.pack(noise(777), Unit("weights", (777,)), PLACE, RAW, NOTE, np.empty(100, np.uint8))


@pytest.mark.parametrize(
    ("array", "unit"),
    [
        (noise(4), Unit("weights", (5,))),
        (noise(4), Unit("weights", (2, 2))),
        (noise(4), Unit("weights", (4,), "<f8")),
        (noise(4).astype(np.float64), Unit("weights", (4,))),
        (noise(4).astype(">f4"), Unit("weights", (4,))),
    ],
)
def test_packing_another_shape_or_dtype_is_refused(array: np.ndarray, unit: Unit) -> None:
    with pytest.raises(WireError, match="weights: packing"):
        frame.pack(array, unit, PLACE)


#: header field -> (forged value, what the message calls it)
WRONG_FIELDS = {
    "magic": (0x12345678, "magic"),
    "version": (1, "version is 1, expected 2"),
    "codec": (9, "codec is 9, expected raw"),
    "flags": (4, "flags is 4, expected 0"),
    "round": (4, "round is 4, expected 3"),
    "exchange": (0, "exchange is 0, expected 1"),
    "device": (-1, "device is -1, expected 7"),
    "unit": (0, "unit is 0, expected 2"),
    "dtype": (b"f8", "dtype is b'f8', expected b'f4'"),
    "raw_bytes": (4001, "raw size is 4001, expected 4000"),
    "coded_bytes": (10**12, "coded size is 1000000000000"),
}


@PLAIN_OR_LZ4
@pytest.mark.parametrize("field", WRONG_FIELDS)
def test_a_wrong_header_field_is_refused_by_its_own_check(field: str, lz4: bool) -> None:
    value, message = WRONG_FIELDS[field]
    bytes_, unit = packed(signs(1000), lz4=lz4)
    assert np.array_equal(unpacked(forged(bytes_), unit)[0], signs(1000))
    with pytest.raises(WireError, match="Frame of weights from device 7") as caught:
        unpacked(forged(bytes_, **{field: value}), unit)
    assert message in str(caught.value)


@pytest.mark.parametrize("field", ["loss", "compute_s", "flops", "link_bit_s", "checksum"])
def test_fields_without_a_rule_are_under_the_checksum(field: str) -> None:
    bytes_, unit = packed(noise(50))
    header = bytes_[: frame.HEADER_BYTES].view(frame._HEADER)
    header[field] = 77
    with pytest.raises(WireError, match="checksum is"):
        unpacked(bytes_, unit)


def test_every_header_field_has_a_test() -> None:
    tested = {*WRONG_FIELDS, "loss", "compute_s", "flops", "link_bit_s", "checksum"}
    assert tested == set(frame._HEADER.names or ())


@EVERY_CODEC
@PLAIN_OR_LZ4
def test_a_coded_unit_comes_back_as_its_codec_decodes_it(codec: Codec, lz4: bool) -> None:
    array = noise(3000).reshape(30, 100)
    bytes_, unit = packed(array, codec=codec, lz4=lz4)
    assert bytes_.size <= frame.bound(unit, codec) == frame.HEADER_BYTES + codec.coded_bytes(3000)
    found, note = unpacked(bytes_, unit, codec)
    payload, expected = np.empty(codec.coded_bytes(3000), np.uint8), np.empty(3000, np.float32)
    codec.encode(array.reshape(-1), payload)
    codec.decode(payload, expected)
    assert (found.shape, found.tobytes()) == (array.shape, expected.tobytes())
    assert note == NOTE


@EVERY_CODEC
def test_what_must_arrive_to_the_bit_or_would_not_shrink_travels_raw(codec: Codec) -> None:
    for array, dtype, lossy in (
        (noise(3000), "<f4", False),
        (np.arange(3000.0), "<f8", False),
        (noise(2), "<f4", True),
    ):
        unit = Unit("weights", array.shape, dtype, lossy=lossy)
        bytes_ = frame.pack(array, unit, PLACE, codec, NOTE).frame
        assert bytes_.size == frame.bound(unit, codec) == frame.HEADER_BYTES + array.nbytes
        assert unpacked(bytes_, unit, codec)[0].tobytes() == array.tobytes()


@pytest.mark.parametrize("sent", CODECS)
def test_a_codec_that_nobody_asked_for_is_refused(sent: str) -> None:
    bytes_, unit = packed(noise(3000), codec=CODECS[sent])
    for name, codec in CODECS.items():
        if name == sent:
            assert unpacked(bytes_, unit, codec)[0].size == 3000
        else:
            with pytest.raises(WireError, match=f"codec is {sent}, expected {name}"):
                unpacked(bytes_, unit, codec)
    with pytest.raises(WireError, match="codec is int8, expected raw"):
        unpacked(packed(noise(3000), codec=CODECS["int8"])[0], unit._replace(lossy=False), CODECS["int8"])


@EVERY_CODEC
@PLAIN_OR_LZ4
def test_three_hundred_flipped_bits_are_all_noticed(codec: Codec, lz4: bool) -> None:
    array = np.where(np.arange(2048) < 64, signs(2048), np.float32(0))  # LZ4 shrinks it in every codec
    bytes_, unit = packed(array, codec=codec, lz4=lz4)
    draw = np.random.default_rng(codec.id)
    header = draw.integers(0, frame.HEADER_BYTES * 8, 150)
    payload = draw.integers(frame.HEADER_BYTES * 8, bytes_.size * 8, 150)
    for bit in map(int, np.concatenate([header, payload])):
        damaged = bytes_.copy()
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            unpacked(damaged, unit, codec)
    assert unpacked(bytes_, unit, codec)[0].shape == array.shape


@EVERY_CODEC
@PLAIN_OR_LZ4
def test_payloads_with_a_checksum_that_fits_decode_or_are_refused(codec: Codec, lz4: bool) -> None:
    """A sender that lies: bytes at random behind a sound header never crash, and never write beyond the unit."""
    bytes_, unit = packed(signs(2048), codec=codec, lz4=lz4)
    draw = np.random.default_rng(codec.id)
    for _ in range(100):
        damaged = bytes_.copy()
        where = draw.integers(frame.HEADER_BYTES, bytes_.size, 5)
        damaged[where] = draw.integers(0, 256, 5)
        try:
            found = unpacked(forged(damaged), unit, codec)[0]
        except WireError as error:
            assert "Frame of weights from device 7" in str(error)  # noqa: PT017
        else:
            assert found.shape == (2048,)


@EVERY_CODEC
@PLAIN_OR_LZ4
def test_cut_longer_and_replayed_frames_are_refused(codec: Codec, lz4: bool) -> None:
    bytes_, unit = packed(signs(1300), codec=codec, lz4=lz4)
    for size in (0, 1, frame.HEADER_BYTES - 1, frame.HEADER_BYTES, bytes_.size - 1):
        with pytest.raises(WireError, match=r"its size is|coded size is"):
            unpacked(bytes_[:size], unit, codec)
    with pytest.raises(WireError, match="coded size is"):
        unpacked(np.concatenate([bytes_, np.zeros(1, np.uint8)]), unit, codec)
    for other in (codec.coded_bytes(1300) - 64, codec.coded_bytes(1300) + 64):  # sizes that agree with each other alone
        if not lz4:
            resized = forged(np.resize(bytes_, frame.HEADER_BYTES + other), coded_bytes=other)
            with pytest.raises(WireError, match=f"coded size of {codec.name} is {other}"):
                unpacked(resized, unit, codec)
    for place in (
        PLACE._replace(round=4),
        PLACE._replace(exchange=2),
        PLACE._replace(device=6),
        PLACE._replace(unit=3),
    ):
        with pytest.raises(WireError, match=r"(round|exchange|device|unit) is"):
            unpacked(bytes_, unit, codec, place)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@EVERY_CODEC
def test_what_is_no_number_is_refused_where_it_would_be_lost(codec: Codec, wrong: float) -> None:
    array = noise(3000)
    array[1234] = wrong
    if codec is RAW:
        assert unpacked(packed(array)[0], Unit("weights", (3000,)))[0].tobytes() == array.tobytes()
    else:
        with pytest.raises(NumericsError, match="weights: Found infinity or NaN among 3,000 values"):
            packed(array, codec=codec)


def with_payload(payload: bytes, unit: Unit, codec: Codec = RAW) -> np.ndarray:
    """Return a frame with a checksum that fits, whose LZ4 payload says what it likes."""
    bytes_ = np.concatenate([packed(signs(300))[0][: frame.HEADER_BYTES], np.frombuffer(payload, np.uint8)])
    return forged(bytes_, flags=LZ4, codec=codec.id, raw_bytes=unit.raw_bytes, coded_bytes=len(payload))


@EVERY_CODEC
def test_a_payload_that_opens_to_more_is_refused_without_opening_it(codec: Codec) -> None:
    unit = Unit("weights", (300,), lossy=True)
    bomb = with_payload(lz4.frame.compress(bytes(1 << 26), store_size=False), unit, codec)
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match=f"doesn't open to exactly {codec.coded_bytes(300)} bytes"):
            unpacked(bomb, unit, codec)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


RAW_BYTES = signs(300).tobytes()
GOOD = lz4.frame.compress(RAW_BYTES, content_checksum=True, store_size=False)
WRONG_PAYLOADS = {
    "one byte more": lz4.frame.compress(RAW_BYTES + b"x"),
    "one byte less": lz4.frame.compress(RAW_BYTES[:-1]),
    "nothing": lz4.frame.compress(b""),
    "trailing bytes": GOOD + b"trailing",
    "a second stream": GOOD + GOOD,
    "cut short": GOOD[:-6],
    "not lz4": bytes(40),
    "empty": b"",
}


@pytest.mark.parametrize("wrong", WRONG_PAYLOADS)
def test_lz4_payloads_that_are_not_exactly_the_unit_are_refused(wrong: str) -> None:
    unit = Unit("weights", (300,))
    assert np.array_equal(unpacked(with_payload(GOOD, unit), unit)[0], signs(300))
    with pytest.raises(WireError, match="LZ4"):
        unpacked(with_payload(WRONG_PAYLOADS[wrong], unit), unit)


@PLAIN_OR_LZ4
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_unit_of_at_most_so_many_rows_says_how_many_came(rows: int, lz4: bool) -> None:
    unit = Unit("coordinates", (5, 3), "<f4", at_most=True)
    array = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    sent = frame.pack(array, unit, PLACE, RAW, NOTE, lz4=lz4)
    assert sent.frame.size <= frame.bound(unit)
    found, note = unpacked(sent.frame.copy(), unit)
    np.testing.assert_array_equal(found, array)
    assert found.shape == array.shape
    assert note == NOTE
    if rows < 5:
        with pytest.raises(WireError, match="raw size is"):
            unpacked(sent.frame.copy(), unit._replace(at_most=False))


@pytest.mark.parametrize("shape", [(6, 3), (2, 4), (3,)])
def test_more_rows_than_the_unit_allows_or_other_rows_are_refused(shape: tuple[int, ...]) -> None:
    unit = Unit("coordinates", (5, 3), "<f4", at_most=True)
    with pytest.raises(WireError, match="at most"):
        frame.pack(np.zeros(shape, np.float32), unit, PLACE)
    bytes_, _ = packed(np.zeros(shape, np.float32))
    if np.prod(shape) % 3 or np.prod(shape) > 15:
        with pytest.raises(WireError, match="raw size is"):
            unpacked(bytes_, unit)
