"""The star: three moves in order, buffers that keep their word, and names for whoever did not send."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedbench.base.arrays import Unit
from fedbench.base.clock import Clock
from fedbench.base.errors import WireError
from fedbench.codec.codecs import CODECS, RAW
from fedbench.codec.frame import HEADER_BYTES, Note, Place
from fedbench.comm.loopback import Loopback
from fedbench.comm.star import Star

from hub import Hub, Rank  # isort: skip

LZ4 = pytest.mark.parametrize("lz4", [False, True], ids=["plain", "lz4"])
PLAN = [Unit("layer.0", (40, 8)), Unit("layer.1", (7,)), Unit("layer.2", (512,))]
SCALARS = [Unit("scalars", (2,))]
DEVICES = (1, 4, 5)


def alone(*, lz4: bool = False) -> Star:
    return Star(Loopback(), 5.0, Clock(), lz4=lz4)


def plan(seed: int) -> dict[str, np.ndarray]:
    stream = np.random.default_rng(seed)
    return {unit.name: stream.integers(-3, 4, unit.shape).astype(np.float32) for unit in PLAN}


def report(star: Star, device: int, value: float, place: Place) -> None:
    upload = {"scalars": np.array([value, -value], np.float32)}
    star.report(DEVICES, device, SCALARS, upload, place, Note(value, 0.5, 3e6))


@LZ4
def test_rounds_of_three_moves_bring_every_array_in_device_order(lz4: bool) -> None:
    star = alone(lz4=lz4)
    for number, exchange in itertools.product(range(3), range(2)):
        place = Place(number, exchange, -1, 0)
        sent = plan(10 * number + exchange)
        received = star.down("plan", PLAN, sent, place)
        inboxes = star.expect(DEVICES, lambda _: SCALARS, place)
        for device in reversed(DEVICES):  # whoever is ready first sends first
            report(star, device, device + number, place)
        star.gather(inboxes)
        assert tuple(inboxes) == DEVICES
        for device, inbox in inboxes.items():
            assert inbox["scalars"].tolist() == [device + number, -device - number]
            assert inbox.note == Note(device + number, 0.5, 3e6)
            assert inbox.coded_bytes == 8
        reply = np.arange(6, dtype=np.float32).reshape(3, 2) + number
        answered = star.down("reply", [Unit("scalars", (3, 2))], {"scalars": reply}, place, Note(again=exchange == 0))
        assert np.array_equal(answered["scalars"], reply)
        assert answered.note.again == (exchange == 0)
        assert list(received) == [unit.name for unit in PLAN]
        for name, array in received.items():
            assert np.array_equal(array, sent[name])
    star.finish()


@LZ4
def test_a_plan_outlives_the_messages_of_other_channels(lz4: bool) -> None:
    star = alone(lz4=lz4)
    first = plan(1)
    kept = star.down("plan", PLAN, first, Place(0, 0, -1, 0))
    views = {name: kept[name] for name in list(kept)[:1]}
    for exchange in range(4):  # later exchanges of the round, on buffers of the same sizes
        place = Place(0, exchange, -1, 0)
        inboxes = star.expect(DEVICES, lambda _: PLAN, place)
        for device in DEVICES:
            star.report(DEVICES, device, PLAN, plan(50 + device), place, Note())
        star.gather(inboxes)
        star.down("reply", PLAN, plan(90 + exchange), place)["layer.0"]
        for name in kept:
            assert np.array_equal(kept[name], first[name]), (exchange, name)
        for device, inbox in inboxes.items():
            for name in inbox:
                assert np.array_equal(inbox[name], plan(50 + device)[name])
    assert np.array_equal(views["layer.0"], first["layer.0"])


def test_the_next_message_of_a_channel_takes_its_buffers() -> None:
    """What the promise above is limited to, so that no copy per round is made."""
    star = alone()
    first = star.down("plan", PLAN, plan(1), Place(0, 0, -1, 0))["layer.2"]
    before = first.copy()
    second = star.down("plan", PLAN, plan(2), Place(1, 0, -1, 0))["layer.2"]
    assert np.shares_memory(first, second)
    assert not np.array_equal(first, before)


def test_lz4_units_are_decoded_when_asked_for_and_few_are_kept() -> None:
    star = alone(lz4=True)
    units = [Unit(f"layer.{index}", (256,)) for index in range(5)]
    sent = {unit.name: np.full(256, index, np.float32) for index, unit in enumerate(units)}
    inbox = star.down("plan", units, sent, Place(0, 0, -1, 0))
    assert inbox._latest is None
    for name in inbox:
        array = inbox[name]
        assert np.array_equal(array, sent[name])
        assert inbox[name] is array, "the latest is kept"
        assert not inbox._views
    assert 0 < inbox.coded_bytes < sum(unit.raw_bytes for unit in units)
    raw = alone().down("plan", units, sent, Place(0, 0, -1, 0))
    assert raw.coded_bytes == sum(unit.raw_bytes for unit in units)


def test_coded_units_are_the_same_on_all_ranks_and_as_large_as_their_codecs_say() -> None:
    hub = Hub(3)
    stars = [Star(Rank(hub, rank), 5.0, Clock()) for rank in range(3)]
    names = ["int4", "sign", "topk", "raw", "int8"]
    units = [Unit(name, (40, 50), lossy=True) for name in names[:-1]] + [Unit("int8", (2000,))]
    sent = {unit.name: np.random.default_rng(9).standard_normal(unit.shape).astype(np.float32) for unit in units}
    codecs = [CODECS[name] for name in names]
    place = Place(0, 0, -1, 0)
    boxes = [star.down("plan", units, sent if star.is_cloud else None, place, codecs=codecs) for star in stars[::-1]]
    sizes = [codec.coded_bytes(2000) for codec in [*codecs[:-1], RAW]]  # the last unit must arrive to the bit
    for inbox in boxes:
        assert inbox.coded_bytes == sum(sizes)
        for name in names:
            assert inbox[name].tobytes() == boxes[-1][name].tobytes()
            assert (inbox[name].tobytes() == sent[name].tobytes()) == (name in ("raw", "int8"))
            assert set(inbox._views) <= {"raw", "int8"}, "a decoded copy was kept beside the latest"
    assert [inbox._frames[0][0].size for inbox in boxes[:2]] == 2 * [HEADER_BYTES + sizes[0]]


def test_devices_that_sent_nothing_are_all_named() -> None:
    star = alone()
    place = Place(2, 0, -1, 0)
    inboxes = star.expect(DEVICES, lambda _: SCALARS, place)
    report(star, 4, 1.0, place)
    with pytest.raises(WireError, match=r"rank 0 still waits for device 1 \(rank 0\), device 5 \(rank 0\)\."):
        star.gather(inboxes)
    assert inboxes[4]["scalars"][0] == 1.0
    with pytest.raises(WireError, match="waits for scalars of round 2 from device 5"):
        inboxes[5]["scalars"]


@pytest.mark.parametrize(
    ("stale", "message"),
    [
        (Place(6, 1, -1, 0), "round is 6, expected 7"),
        (Place(7, 0, -1, 0), "exchange is 0, expected 1"),
        (Place(8, 1, -1, 0), "round is 8, expected 7"),
    ],
)
def test_a_frame_of_another_round_or_exchange_is_refused(stale: Place, message: str) -> None:
    star = alone()
    inboxes = star.expect(DEVICES, lambda _: SCALARS, Place(7, 1, -1, 0))
    for device in DEVICES:
        report(star, device, 0.0, stale)
    star.gather(inboxes)
    with pytest.raises(WireError, match=f"Frame of scalars from device 4 .*: {message}"):
        inboxes[4]["scalars"]


def test_a_frame_of_another_device_is_refused() -> None:
    star = alone()
    place = Place(0, 0, -1, 0)
    inboxes = star.expect(DEVICES, lambda _: SCALARS, place)
    star.report((4, 5), 4, SCALARS, {"scalars": np.zeros(2, np.float32)}, place, Note())  # in device 1's slot
    with pytest.raises(WireError, match="device is 4, expected 1"):
        inboxes[1]["scalars"]


def test_a_late_message_of_the_move_before_meets_no_receive_of_this_one() -> None:
    star = alone()
    star._frames.next_move()  # a move whose receives are gone
    report(star, 1, 3.0, Place(0, 0, -1, 0))
    inboxes = star.expect(DEVICES, lambda _: SCALARS, Place(0, 1, -1, 0))
    assert not any(request.done() for inbox in inboxes.values() for request in inbox.requests)
    report(star, 4, 3.0, Place(0, 1, -1, 0))
    assert inboxes[4].requests[0].done()


def test_the_end_finds_messages_that_never_met() -> None:
    star = alone()
    star.expect(DEVICES, lambda _: SCALARS, Place(0, 0, -1, 0))
    with pytest.raises(WireError, match="3 messages are still open at the end of the run"):
        star.finish()
    star = alone()
    report(star, 1, 1.0, Place(0, 0, -1, 0))
    with pytest.raises(WireError, match="rank 0 still waits for its own messages to be taken"):
        star.finish()


def test_a_cloud_without_a_plan_and_units_out_of_turn_are_refused() -> None:
    with pytest.raises(WireError, match="nothing to send"):
        alone().down("plan", PLAN, None, Place(0, 0, -1, 0))
    inbox = alone().down("plan", PLAN, plan(0), Place(0, 0, -1, 0))
    with pytest.raises(WireError, match="Unit 7 put where 3 was next"):
        inbox.put(7, np.empty(1, np.uint8), None)
    with pytest.raises(KeyError):
        inbox["layer.9"]


@LZ4
def test_three_ranks_see_the_same_arrays_and_the_cloud_their_order(lz4: bool) -> None:
    hub = Hub(3)
    stars = [Star(Rank(hub, rank), 5.0, Clock(), lz4=lz4) for rank in range(3)]
    assert [star.host_of(device) for star in stars[:1] for device in range(5)] == [1, 2, 1, 2, 1]
    for number in range(3):
        place = Place(number, 0, -1, 0)
        sent = plan(number)
        boxes = [star.down("plan", PLAN, sent if star.is_cloud else None, place) for star in reversed(stars)]
        for inbox in boxes:
            assert all(np.array_equal(inbox[name], sent[name]) for name in sent)
        expected = [star.expect(DEVICES, lambda _: SCALARS, place) for star in stars]
        assert expected[1:] == [{}, {}]
        for star in reversed(stars[1:]):
            for device in DEVICES:
                if star.host_of(device) == star.transport.rank:
                    report(star, device, 10.0 * device, place)
        stars[0].gather(expected[0])
        assert [(d, inbox["scalars"][0]) for d, inbox in expected[0].items()] == [(d, 10.0 * d) for d in DEVICES]
    for star in stars:
        star.finish()
    assert not any(hub.boxes.values())


def test_the_hosts_of_missing_devices_are_named() -> None:
    hub = Hub(3)
    stars = [Star(Rank(hub, rank), 5.0, Clock()) for rank in range(3)]
    place = Place(0, 0, -1, 0)
    inboxes, *_ = [star.expect(DEVICES, lambda _: SCALARS, place) for star in stars]
    report(stars[1], 4, 0.0, place)  # device 4 lives on rank 1, devices 1 and 5 on rank 2
    with pytest.raises(WireError, match=r"rank 0 on host0 still waits for device 1 \(rank 2 on host2\), device 5"):
        stars[0].gather(inboxes)


def test_ranks_report_of_themselves() -> None:
    hub = Hub(3)
    stars = [Star(Rank(hub, rank), 5.0, Clock()) for rank in range(3)]
    units = [Unit("memory", (2,), "<i8")]
    tables = []
    for star in reversed(stars):  # the cloud comes last: its receives would wait otherwise
        mine = {"memory": np.array([star.transport.rank, 1], np.int64)}
        tables.append(star.gather_from_ranks(units, mine, Place(0, 0, -1, 0), Note()))
    assert {rank: table["memory"].tolist() for rank, table in tables[-1].items()} == {1: [1, 1], 2: [2, 1]}
    assert tables[:2] == [{}, {}]


def test_loopback_keeps_the_rules_of_a_real_transport() -> None:
    loopback = Loopback()
    with pytest.raises(WireError, match="Loopback has rank 0 alone; asked for rank 1"):
        loopback.send(np.zeros(1, np.uint8), 1, 0)
    loopback.receive(np.zeros(3, np.uint8), 0, 9)
    with pytest.raises(WireError, match=r"Message of 4 bytes for a buffer of 3 \(tag 9\)"):
        loopback.send(np.zeros(4, np.uint8), 0, 9)
    loopback = Loopback()
    memory = np.full(20, 0xA5, np.uint8)
    pending = loopback.receive(memory[5:15], 0, 1)
    assert not pending.done()
    loopback.send(np.arange(4, dtype=np.uint8), 0, 1)
    assert pending.done()
    assert pending.received_bytes == loopback.moved_bytes == 4
    assert memory.tolist() == [0xA5] * 5 + [0, 1, 2, 3] + [0xA5] * 11
    assert loopback.open_requests == 0


def test_wire_bytes_count_headers_and_payload_once() -> None:
    star = alone()
    star.down("plan", PLAN, plan(0), Place(0, 0, -1, 0))
    assert star.transport.moved_bytes == sum(HEADER_BYTES + unit.raw_bytes for unit in PLAN)


@pytest.mark.parametrize("count", [600, 9000])
def test_a_plan_of_more_units_than_there_are_tags_arrives_in_order(count: int) -> None:
    hub = Hub(2)
    stars = [Star(Rank(hub, rank), 5.0, Clock()) for rank in range(2)]
    units = [Unit(f"unit.{index}", (2,)) for index in range(count)]
    sent = {unit.name: np.array([index, -index], np.float32) for index, unit in enumerate(units)}
    for number in range(2):
        place = Place(number, 0, -1, 0)
        inbox = stars[1].down("plan", units, None, place)
        stars[0].down("plan", units, sent, place)
        assert all(np.array_equal(inbox[name], array) for name, array in sent.items())
