"""The tree: what a star brings, by edges that pass units on as they come and open none."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from fedbench.base.arrays import Unit
from fedbench.base.clock import Clock
from fedbench.base.errors import WireError
from fedbench.codec import frame
from fedbench.codec.frame import Note, Place
from fedbench.comm import bundle
from fedbench.comm.bundle import Piece
from fedbench.comm.inbox import Inbox
from fedbench.comm.tree import Tree, edge_count

from hub import Hub, Rank  # isort: skip

PLAN = [Unit("layer.0", (40, 8)), Unit("layer.1", (7,)), Unit("layer.2", (512,))]
DEVICES = (1, 2, 4, 5, 7)

#: (edges asked for, ranks, edges)
COUNTS = [
    (2, 1, 0),
    (2, 2, 0),
    (2, 3, 1),
    (2, 4, 1),
    (2, 5, 2),
    (2, 8, 2),
    (4, 8, 3),
    (1, 9, 1),
    (4, 9, 4),
    (99, 100, 49),
]


def trees(size: int, edges: int, chunk_bytes: int = 1 << 20, *, lz4: bool = False) -> list[Tree]:
    hub = Hub(size)
    kinds = {"edges": edges, "chunk_bytes": chunk_bytes, "lz4": lz4}
    return [Tree(Rank(hub, r), 5.0, Clock(), **kinds) for r in range(size)]


def units_of(device: int) -> Sequence[Unit]:
    """Two units, the second of a length of its own."""
    return Unit("scalars", (2,)), Unit("indices", (4 + device,), "<u4", at_most=True)


def upload(device: int, number: int) -> dict[str, np.ndarray]:
    return {"scalars": np.array([device, number], np.float32), "indices": np.arange(device, dtype=np.uint32)}


def turn(ranks: Sequence[Tree]) -> None:
    """Let every rank move its messages until nothing moves."""
    while any([tree._mail.poll() == 0.0 for tree in ranks]):
        continue


def play(ranks: Sequence[Tree], number: int) -> None:
    """One exchange on all ranks, which must bring what was sent."""
    place, cloud = Place(number, 0, -1, 0), ranks[0]
    stream = np.random.default_rng(number)
    sent = {unit.name: stream.integers(-3, 4, unit.shape).astype(np.float32) for unit in PLAN}
    plans = [tree.down("plan", PLAN, sent if tree.is_cloud else None, place) for tree in ranks]
    inboxes, *others = [tree.expect(DEVICES, units_of, place) for tree in ranks]
    assert others == [{}] * len(others)
    turn(ranks)
    for plan in plans[1:]:
        assert all(np.array_equal(plan[name], sent[name]) for name in sent)
    for device in reversed(DEVICES):
        host = ranks[cloud.host_of(device)]
        host.report(DEVICES, device, units_of(device), upload(device, number), place, Note(float(device)))
    turn(ranks)
    cloud.gather(inboxes)
    assert tuple(inboxes) == DEVICES
    for device, inbox in inboxes.items():
        assert inbox.note.loss == device
        for name, array in upload(device, number).items():
            assert np.array_equal(inbox[name], array)


@pytest.mark.parametrize(("edges", "size", "count"), COUNTS)
def test_a_small_world_makes_fewer_of_its_ranks_edges(edges: int, size: int, count: int) -> None:
    assert edge_count(edges, size) == count
    if count:
        ranks = trees(size, count)
        assert list(ranks[0].peers) == list(range(1 + count, size))
        below = [list(tree._children) for tree in ranks]
        assert below[0] == list(range(1, 1 + count))
        assert sorted(itertools.chain(*below[1 : 1 + count])) == list(ranks[0].peers)
        assert not any(below[1 + count :])
        assert {ranks[rank]._parent for rank in ranks[0].peers} == set(below[0])


@pytest.mark.parametrize("lz4", [False, True], ids=["raw", "lz4"])
@pytest.mark.parametrize("chunk_bytes", [1 << 20, 4096, 250, 1])
@pytest.mark.parametrize(("size", "edges"), [(3, 1), (5, 2), (8, 3)])
def test_exchanges_bring_what_was_sent_in_device_order(size: int, edges: int, chunk_bytes: int, lz4: bool) -> None:
    ranks = trees(size, edges, chunk_bytes, lz4=lz4)
    for number in range(4):
        play(ranks, number)
    for tree in ranks:
        tree.finish()
    assert not any(ranks[0].transport.hub.boxes.values())


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 300, 1])
def test_the_cloud_knows_every_byte_that_was_moved_between_any_ranks(chunk_bytes: int) -> None:
    ranks = trees(6, 2, chunk_bytes)
    for number in range(2):
        play(ranks, number)
    moved = ranks[0].transport.hub.moved
    assert ranks[0].moved_bytes == sum(moved) // 2 > moved[0] > 0


def test_a_unit_goes_on_while_the_next_is_not_yet_there() -> None:
    cloud, edge, *below = trees(4, 1)
    place = Place(0, 0, -1, 0)
    received = [tree.down("plan", PLAN, None, place) for tree in (edge, *below)]
    cloud._frames.next_move()
    for index in range(len(PLAN)):
        array = np.full(PLAN[index].shape, index, np.float32)
        packed = frame.pack(array, PLAN[index], place._replace(unit=index)).frame
        cloud.transport.send(packed, 1, cloud._frames.tag(0, index))
        turn([edge])
        for inbox in received[1:]:
            assert [request.done() for request in inbox.requests] == [n <= index for n in range(len(PLAN))]
            assert np.array_equal(inbox[PLAN[index].name], array)


def test_an_edge_passes_messages_on_in_their_order_whichever_it_reads_first() -> None:
    """Plan and reply have tags of the same parity: whoever reads the reply first may not let it overtake the plan."""
    ranks = trees(3, 1)
    place, sent = Place(0, 0, -1, 0), {"plan": 1.0, "reply": 2.0}
    boxes: dict[str, list[Inbox]] = {}
    for channel, value in sent.items():
        made = {PLAN[0].name: np.full(PLAN[0].shape, value, np.float32)}
        boxes[channel] = [tree.down(channel, PLAN[:1], made if tree.is_cloud else None, place) for tree in ranks]
        for tree in ranks:
            tree._frames.next_move()  # the uploads of the exchange
    for channel in ("reply", "plan"):
        for inbox in boxes[channel][1:]:  # the edge first
            assert (inbox["layer.0"] == sent[channel]).all(), channel


def test_bundles_of_one_tag_go_up_in_their_order() -> None:
    ranks = trees(4, 1, chunk_bytes=1)
    units, place, devices, late = [Unit("scalars", (2,))], Place(0, 0, -1, 0), tuple(range(8200)), 3
    cloud = ranks[0]
    inboxes, *_ = [tree.expect(devices, lambda _: units, place) for tree in ranks]
    assert cloud._frames.tag(1, late, 1) == cloud._frames.tag(1, late + 8191, 1), "there are no more tags"
    assert cloud.host_of(late) != cloud.host_of(late + 8191), "so that they may come in any order"
    for device in (*(device for device in devices if device != late), late):
        host = ranks[cloud.host_of(device)]
        host.report(devices, device, units, {"scalars": np.full(2, device, np.float32)}, place, Note())
        if device in (devices[-1], late):
            turn(ranks)
    for device in (late, late + 8191):
        assert inboxes[device]["scalars"][0] == device


def test_a_channel_that_is_released_holds_no_memory_and_may_be_used_again() -> None:
    ranks = trees(4, 1)
    for number in range(2):
        place, sent = Place(number, 0, -1, 0), {PLAN[0].name: np.full(PLAN[0].shape, number, np.float32)}
        for channel in ("resume", "plan"):
            made = [sent if tree.is_cloud else None for tree in ranks]
            boxes = [tree.down(channel, PLAN[:1], m, place) for tree, m in zip(ranks, made, strict=True)]
        for tree in ranks:
            tree.release("resume")  # an edge passes on first what nobody here reads
            assert {slot[1] for slot in tree._mail._buffers} == {"plan"}
        assert all((box["layer.0"] == number).all() for box in boxes)
    for tree in ranks:
        tree.finish()


def test_whoever_is_missing_is_named_by_the_edge_and_by_the_cloud() -> None:
    ranks = trees(6, 2)  # devices 1 and 4 on rank 4 below edge 2, 2 and 5 on rank 5 and 7 on rank 4
    place = Place(3, 0, -1, 0)
    inboxes, *_ = [tree.expect(DEVICES, units_of, place) for tree in ranks]
    for device in (2, 5, 7):
        host = ranks[ranks[0].host_of(device)]
        host.report(DEVICES, device, units_of(device), upload(device, 3), place, Note())
    turn(ranks)
    with pytest.raises(
        WireError, match=r"still waits for device 1 \(rank 4 on host4, by edge rank 2 on host2\), device 4"
    ):
        ranks[0].gather(inboxes)
    (reply,) = [ranks[2].down("reply", PLAN[:1], None, place)]
    told = (
        r"rank 2 on host2 \(edge\) still waits for layer.0 of round 3 from rank 0 on host0, and for device 1 \(rank 4"
    )
    with pytest.raises(WireError, match=told):
        reply["layer.0"]
    (reply,) = [ranks[4].down("reply", PLAN[:1], None, place)]
    with pytest.raises(WireError, match=r"layer.0 of round 3 from rank 0 on host0, by edge rank 2 on host2\.$"):
        reply["layer.0"]


def test_a_frame_that_an_edge_passes_on_is_checked_at_its_end() -> None:
    ranks = trees(3, 1)
    place = Place(5, 0, -1, 0)
    inboxes, *_ = [tree.expect((0,), units_of, place) for tree in ranks]
    ranks[2].report((0,), 0, units_of(0), upload(0, 5), place._replace(round=4), Note())
    turn(ranks)
    ranks[0].gather(inboxes)
    with pytest.raises(WireError, match=r"from device 0 \(rank 2 on host2, by edge rank 1 on host1\): round is 4"):
        inboxes[0]["scalars"]


def test_groups_are_in_order_and_bounded() -> None:
    pieces = [Piece(s, 10 + s, i, Unit(str(i), (size,))) for s in range(9) for i, size in enumerate((1, 30, 400, 2))]
    for most in (1, 100, 300, 500, 2000, 1 << 20):
        found = bundle.groups(pieces, most)
        assert [piece for group in found for piece in group] == pieces
        assert all(len(group) == 1 or bundle.bound(group) <= most for group in found)
        assert all(group for group in found)
    assert len(bundle.groups(pieces, 1)) == len(pieces)
    assert len(bundle.groups(pieces, 1 << 20)) == 1
    assert bundle.groups([], 100) == []


class Arrived:
    """A request that is done."""

    def __init__(self, size: int) -> None:
        self.received_bytes = size

    def done(self) -> bool:
        return True


def test_a_bundle_that_does_not_fit_its_table_is_refused() -> None:
    frames = [np.full(size, size, np.uint8) for size in (80, 100, 72)]
    good = bundle.pack(frames, np.empty(400, np.uint8))
    rooms = [np.zeros(100, np.uint8) for _ in frames]
    whole = bundle.Split(Arrived(good.size), good, rooms, "edge 1")
    assert [bundle.Part(whole, n).done() for n in range(3)] == [True] * 3
    assert [bundle.Part(whole, n).received_bytes for n in range(3)] == [80, 100, 72]
    assert all(np.array_equal(room[: part.size], part) for room, part in zip(rooms, frames, strict=True))
    bad = {
        "cut off": good[:-1],
        "too long": np.append(good, np.uint8(0)),
        "no table": good[:20],
        "empty": good[:0],
        "other sizes": np.concatenate([np.array([80, 101, 71], "<u8").view(np.uint8), good[24:]]),
        "huge sizes": np.concatenate([np.array([2**63, 100, 72], "<u8").view(np.uint8), good[24:]]),
    }
    for name, bytes_ in bad.items():
        with pytest.raises(WireError, match="edge 1: "):
            bundle.Split(Arrived(bytes_.size), bytes_, rooms, "edge 1").done()
        assert name


def damaged(stream: np.random.Generator, bytes_: np.ndarray, earlier: np.ndarray) -> np.ndarray:
    """Return a message with one fault: a flipped bit, a part, something more, or the one of the round before."""
    kind = int(stream.integers(4))
    if kind == 0:
        flipped = bytes_.copy()
        flipped[stream.integers(len(bytes_))] ^= np.uint8(1 << stream.integers(8))
        return flipped
    if kind == 1:
        return bytes_[: stream.integers(len(bytes_))]
    if kind == 2:
        return np.concatenate([bytes_, stream.integers(0, 256, stream.integers(1, 200), np.uint8)])
    return earlier


@pytest.mark.parametrize("devices", [(2,), DEVICES], ids=["a frame", "a bundle"])
def test_whatever_happens_to_a_message_between_edge_and_cloud_is_noticed(devices: Sequence[int]) -> None:
    stream, scalars = np.random.default_rng(1), [Unit("scalars", (2,))]

    def sent(number: int) -> tuple[Tree, dict[int, Inbox], np.ndarray]:
        """Return the cloud, its inboxes, and the message that an edge sends it in a round."""
        cloud, edge, host = trees(3, 1)
        place = Place(number, 0, -1, 0)
        inboxes, *_ = [tree.expect(devices, lambda _: scalars, place) for tree in (cloud, edge, host)]
        for device in devices:
            host.report(devices, device, scalars, {"scalars": np.ones(2, np.float32)}, place, Note())
        bytes_: list[np.ndarray] = []
        edge.transport.send = lambda buffer, *_: bytes_.append(buffer.copy()) or Arrived(0)  # type: ignore[method-assign]
        turn([edge])
        return cloud, inboxes, bytes_[0]

    *_, earlier = sent(6)
    for case in range(301):
        cloud, inboxes, good = sent(7)
        bytes_ = damaged(stream, good, earlier) if case else good
        request, tag = inboxes[devices[0]].requests[0], cloud._frames.tag(1, 0, 1)
        room = cloud.transport.hub.boxes[1, 0, tag, "receive"][0].buffer
        if len(bytes_) > len(room):
            continue  # the library itself ends the job: tests/spmd/test_transport.py
        Rank(cloud.transport.hub, 1).send(bytes_, 0, tag)
        noticed = 0
        for device in devices:
            try:
                assert request.done()
                inboxes[device]["scalars"]
            except WireError:
                noticed += 1
        assert (noticed > 0) == (case > 0), (case, bytes_.tobytes(), good.tobytes())
