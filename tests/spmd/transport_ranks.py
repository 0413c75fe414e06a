"""What the ranks of `test_transport.py` do: `transport_ranks.py DIR [FATAL]`.

Without FATAL every scenario of SCENARIOS runs on three ranks, and each rank leaves its
verdict: scenario -> "ok" or what was wrong. FATAL names one that must end the job.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedbench.base.arrays import Unit
from fedbench.base.clock import Clock
from fedbench.base.errors import WireError
from fedbench.base.job import CommSection, LinkSection
from fedbench.codec import frame
from fedbench.codec.frame import Place
from fedbench.comm.base import Transport
from fedbench.comm.connect import connect
from fedbench.comm.star import Star
from fedbench.run import launch

SENTINEL, TAIL = 0xA5, 64
DEADLINE_S = 15.0


def payload(count: int, seed: int) -> np.ndarray:
    """Return `count` bytes that only this seed gives."""
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 256, count, dtype=np.uint8)


def guarded(count: int) -> np.ndarray:
    """Return a buffer of `count` bytes with a sentinel behind it."""
    return np.full(count + TAIL, SENTINEL, np.uint8)


def unanswered(indices: object) -> str:
    """Return what a wait that must not fail would print."""
    return f"requests {indices} are missing"


def refused(call: Callable[[], object]) -> str:
    """Return the WireError's text, or fail."""
    try:
        call()
    except WireError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def sizes_and_sentinels(t: Transport) -> None:
    """A message fills exactly its own bytes, whatever room there is, on the eager and on the rendezvous path."""
    for tag, size in enumerate((1, 7, 4096, 1 << 20, 3 * (1 << 20) + 5)):
        if t.rank == 0:
            for peer in range(1, t.size):
                room = guarded(size + 100)
                request = t.receive(room[: size + 100], peer, tag)
                t.wait([request], DEADLINE_S, unanswered)
                assert request.received_bytes == size
                np.testing.assert_array_equal(room[:size], payload(size, peer))
                np.testing.assert_array_equal(room[size:], SENTINEL)
        else:
            request = t.send(payload(size, t.rank), 0, tag)
            t.wait([request], DEADLINE_S, unanswered)
            assert request.received_bytes == 0
    assert t.open_requests == 0


def many_messages(t: Transport) -> None:
    """Hundreds of messages each way between all pairs at once arrive whole, and every byte is counted once."""
    count, before = 150, t.moved_bytes
    sizes = [1 + (37 * index) % 5000 for index in range(count)]
    peers = [peer for peer in range(t.size) if peer != t.rank]
    rooms = {(p, i): guarded(size) for p in peers for i, size in enumerate(sizes)}
    receives = [t.receive(room[:-TAIL], peer, index) for (peer, index), room in rooms.items()]
    bodies = {(p, i): payload(size, 1000 * t.rank + i) for p in peers for i, size in enumerate(sizes)}
    sends = [t.send(body, peer, index) for (peer, index), body in reversed(bodies.items())]
    assert t.open_requests == 2 * count * len(peers)
    t.wait(receives + sends, DEADLINE_S, unanswered)
    for (peer, index), room in rooms.items():
        np.testing.assert_array_equal(room[:-TAIL], payload(sizes[index], 1000 * peer + index))
        np.testing.assert_array_equal(room[-TAIL:], SENTINEL)
    assert t.open_requests == 0
    assert t.moved_bytes - before == 2 * sum(sizes) * len(peers)


def same_tag_keeps_order(t: Transport) -> None:
    """Messages of one tag between two ranks don't overtake each other."""
    if t.rank == 1:
        bodies = [payload(1 + 3000 * (index % 5), index) for index in range(40)]
        t.wait([t.send(body, 0, 3) for body in bodies], DEADLINE_S, unanswered)
    elif t.rank == 0:
        for index in range(40):
            room = guarded(20_000)
            request = t.receive(room, 1, 3)
            t.wait([request], DEADLINE_S, unanswered)
            np.testing.assert_array_equal(room[: request.received_bytes], payload(1 + 3000 * (index % 5), index))


def late_rank_is_named(t: Transport) -> None:
    """The deadline of a wait is kept, and the error names exactly who is missing."""
    if t.rank == 1:
        t.wait([t.send(payload(10, 1), 0, 1)], DEADLINE_S, unanswered)
    if t.rank == 0:
        rooms = [np.empty(10, np.uint8) for _ in range(2)]
        requests = [t.receive(rooms[0], 1, 1), t.receive(rooms[1], 2, 1)]
        t.wait(requests[:1], DEADLINE_S, unanswered)
        start = time.monotonic()
        told = refused(lambda: t.wait(requests, 0.3, lambda left: f"{[t.name_of(1 + i) for i in left]} are missing"))
        assert 0.3 <= time.monotonic() - start < 3
        assert "After 0.3 s: ['rank 2 on " in told, told
        assert "rank 1" not in told, told
    t.agree([0], DEADLINE_S, "see the deadline pass")
    if t.rank == 2:
        t.wait([t.send(payload(10, 2), 0, 1)], DEADLINE_S, unanswered)
    if t.rank == 0:
        t.wait(requests, DEADLINE_S, unanswered)
    assert t.open_requests == 0


def late_device_is_named(t: Transport) -> None:
    """The star names the devices that have not reported, with their ranks."""
    star = Star(t, 0.4 if t.rank == 0 else DEADLINE_S, Clock())
    units, place, devices = [Unit("scalars", (3,))], Place(5, 0, -1, 0), (0, 1, 2)
    inboxes = star.expect(devices, lambda _: units, place)

    def report(device: int) -> None:
        star.report(devices, device, units, {"scalars": np.full(3, device, np.float32)}, place, frame.NO_NOTE)

    if t.rank == 1:
        report(0)
        report(2)
    if t.rank == 0:
        star.wait([r for d in (0, 2) for r in inboxes[d].requests], "rank 1")
        told = refused(lambda: star.gather(inboxes))
        assert "device 1 (rank 2 on " in told, told
        assert not {"device 0", "device 2"} & {told[i : i + 8] for i in range(len(told))}, told
    t.agree([0], DEADLINE_S, "see the deadline pass")
    if t.rank == 2:
        report(1)
    if t.rank == 0:
        star.gather(inboxes)
        assert [float(inboxes[d]["scalars"][0]) for d in devices] == [0.0, 1.0, 2.0]
    star.finish()


def agree_is_the_maximum(t: Transport) -> None:
    """All ranks get the element-wise maximum, negative numbers and 62-bit ones included, many times in a row."""
    for turn in range(50):
        mine = [t.rank, -t.rank, (1 << 62) + turn if t.rank == 1 else 0, turn - 1000 * t.rank]
        assert t.agree(mine, DEADLINE_S, "agree") == [t.size - 1, 0, (1 << 62) + turn, turn]
    assert t.agree([], DEADLINE_S, "agree on nothing") == []


def other_tag_is_never_taken(t: Transport) -> None:
    """A message of another tag stays where it is: a stale one can't be taken for the next."""
    if t.rank == 1:
        t.wait([t.send(payload(8, 1), 0, 4)], DEADLINE_S, unanswered)
    if t.rank == 0:
        wanted, stale = np.empty(8, np.uint8), np.empty(8, np.uint8)
        request = t.receive(wanted, 1, 6)
        assert "0.2 s" in refused(lambda: t.wait([request], 0.2, unanswered))
    t.agree([0], DEADLINE_S, "see that nothing was taken")
    if t.rank == 1:
        t.wait([t.send(payload(8, 2), 0, 6)], DEADLINE_S, unanswered)
    if t.rank == 0:
        t.wait([request, t.receive(stale, 1, 4)], DEADLINE_S, unanswered)
        np.testing.assert_array_equal(wanted, payload(8, 2))
        np.testing.assert_array_equal(stale, payload(8, 1))


def stale_frame_is_refused(t: Transport) -> None:
    """A frame of another round is refused with both numbers and the sender's name."""
    star = Star(t, DEADLINE_S, Clock())
    units = [Unit("reply", (4,))]
    sent = {"reply": np.arange(4, dtype=np.float32)} if t.rank == 0 else None
    inbox = star.down("reply", units, sent, Place(7 if t.rank == 0 else 8, 0, -1, 0))
    if t.rank:
        told = refused(lambda: inbox["reply"])
        assert re.search(r"from rank 0 on .*: round is 7, expected 8", told), told
    star.finish()


def star_round_trip(t: Transport) -> None:
    """Down to all and up from all, raw and LZ4, with more devices than ranks, in device order."""
    for lz4 in (False, True):
        star = Star(t, DEADLINE_S, Clock(), lz4=lz4)
        units = [Unit("a", (300, 7)), Unit("b", (1,), "<i8"), Unit("empty", (0,))]
        devices = tuple(range(7))
        for round_ in range(6):
            place = Place(round_, 0, -1, 0)
            arrays = {
                "a": np.full((300, 7), round_, np.float32),
                "b": np.array([round_]),
                "empty": np.empty(0, np.float32),
            }
            plan = star.down("plan", units, arrays if t.rank == 0 else None, place)
            inboxes = star.expect(devices, lambda _, units=units: units, place)
            for device in devices:
                if star.host_of(device) == t.rank:
                    mine = {"a": plan["a"] + np.float32(device), "b": plan["b"] * device, "empty": plan["empty"]}
                    star.report(devices, device, units, mine, place, frame.Note(loss=float(device)))
            star.gather(inboxes)
            assert list(inboxes) == (list(devices) if t.rank == 0 else [])
            for device, inbox in inboxes.items():
                np.testing.assert_array_equal(inbox["a"], np.float32(round_ + device))
                assert int(inbox["b"][0]) == round_ * device
                assert inbox.note.loss == device
        star.finish()


def paced_links(t: Transport) -> None:
    """Under every policy an exchange takes its links' time at least, brings what was sent, and leaves no thread."""
    link, devices = LinkSection(clock="paced", down="8Mbit/s", latency="20ms", jitter="1ms"), (0, 1, 2)
    units = [Unit(name, (5000,)) for name in "abc"]  # 20 ms each: a plan takes 80 ms, its answer 20 ms
    for progress in ("none", "poll", "thread"):
        star = connect(t, Clock(), CommSection(progress=progress, deadline_s=DEADLINE_S), link.link, 3)
        for round_ in range(2):
            place, start = Place(round_, 0, -1, 0), time.monotonic()
            sent = {unit.name: np.full(5000, round_, np.float32) for unit in units} if t.rank == 0 else None
            plan = star.down("plan", units, sent, place, devices=devices)
            inboxes = star.expect(devices, lambda _: units[:1], place)
            for device in devices:
                if star.host_of(device) == t.rank:
                    answer = {"a": plan["a"] + plan["b"] + plan["c"] + np.float32(device)}
                    star.poll()
                    star.report(devices, device, units[:1], answer, place, frame.NO_NOTE)
            star.gather(inboxes)
            for device, inbox in inboxes.items():
                np.testing.assert_array_equal(inbox["a"], np.float32(3 * round_ + device))
            assert t.rank > 0 or time.monotonic() - start >= 0.1
        star.finish()
        assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def gather_from_ranks(t: Transport) -> None:
    """Rank 0 gets what every other rank says of itself."""
    star = Star(t, DEADLINE_S, Clock())
    mine = {"x": np.full(3, 10 * t.rank, np.float32)}
    found = star.gather_from_ranks([Unit("x", (3,))], mine, Place(0, 0, -1, 0), frame.NO_NOTE)
    assert {rank: float(inbox["x"][0]) for rank, inbox in found.items()} == ({1: 10.0, 2: 20.0} if t.rank == 0 else {})
    star.finish()


def open_message_is_an_error(t: Transport) -> None:
    """A message that nobody meets is found at the end."""
    if t.rank == 0:
        star = Star(t, 0.2, Clock())
        request = t.receive(np.empty(1, np.uint8), 1, 9)
        assert "1 messages are still open" in refused(star.finish)
    t.agree([0], DEADLINE_S, "see the error")
    if t.rank == 1:
        t.wait([t.send(np.zeros(1, np.uint8), 0, 9)], DEADLINE_S, unanswered)
    if t.rank == 0:
        t.wait([request], DEADLINE_S, unanswered)


def limits_are_refused(t: Transport) -> None:
    """What MPI can't take is refused before it travels."""
    small = np.zeros(1, np.uint8)
    for tag in (-1, 1 << 40):
        assert str(tag) in refused(lambda tag=tag: t.send(small, (t.rank + 1) % t.size, tag))
        assert str(tag) in refused(lambda tag=tag: t.receive(small, (t.rank + 1) % t.size, tag))
    huge = np.empty((1 << 30) + 1, np.uint8)
    assert str(huge.size) in refused(lambda: t.send(huge, (t.rank + 1) % t.size, 0))
    assert t.open_requests == 0


SCENARIOS = {
    function.__name__: function
    for function in (
        sizes_and_sentinels,
        many_messages,
        same_tag_keeps_order,
        late_rank_is_named,
        late_device_is_named,
        agree_is_the_maximum,
        other_tag_is_never_taken,
        stale_frame_is_refused,
        star_round_trip,
        paced_links,
        gather_from_ranks,
        open_message_is_an_error,
        limits_are_refused,
    )
}


def truncated(t: Transport) -> None:
    """A message longer than the buffer that waits for it, on the eager path.

    On the rendezvous path (more than 4 KiB in shared memory) Open MPI 5.0 writes past the end of the
    buffer before it reports the error, so what the process prints before it dies can't be relied on there.
    """
    if t.rank == 1:
        t.wait([t.send(payload(1000, 1), 0, 1)], DEADLINE_S, unanswered)
    if t.rank == 0:
        t.wait([t.receive(np.empty(10, np.uint8), 1, 1)], DEADLINE_S, unanswered)
    t.agree([0], DEADLINE_S, "end well, which must not happen")


def truncated_rendezvous(t: Transport) -> None:
    """The same with a long message, on which the job must end as well, with whatever words."""
    if t.rank == 1:
        t.wait([t.send(payload(100_000, 1), 0, 1)], DEADLINE_S, unanswered)
    if t.rank == 0:
        t.wait([t.receive(np.empty(10, np.uint8), 1, 1)], DEADLINE_S, unanswered)
    t.agree([0], DEADLINE_S, "end well, which must not happen")


def nobody_agrees(t: Transport) -> None:
    """One rank never comes to an agreement."""
    if t.rank == 2:
        time.sleep(60)
    t.agree([0], 1.0, "end the round")


def silent_cloud(t: Transport) -> None:
    """Rank 0 never comes to an agreement."""
    if t.rank == 0:
        time.sleep(60)
    t.agree([0], 0.5, "end the round")


def crash(t: Transport) -> None:
    """A rank dies of a bad address, with the heap in use at that moment."""
    if t.rank == 1:
        ctypes.string_at(8)
    t.agree([0], DEADLINE_S, "end well, which must not happen")


def flipped_bit(t: Transport) -> None:
    """A damaged frame."""
    star = Star(t, DEADLINE_S, Clock())
    units, place = [Unit("scalars", (3,))], Place(0, 0, -1, 0)
    inboxes = star.expect((0,), lambda _: units, place)
    if t.rank == 1:
        packed = frame.pack(np.ones(3, np.float32), units[0], place._replace(device=0)).frame.copy()
        packed[-1] ^= 1
        t.wait([t.send(packed, 0, star._frames.tag(1, 0))], DEADLINE_S, unanswered)
    if t.rank == 0:
        star.gather(inboxes)
        print(inboxes[0]["scalars"])
    t.agree([0], DEADLINE_S, "end well, which must not happen")


FATAL = {
    function.__name__: function
    for function in (truncated, truncated_rendezvous, nobody_agrees, silent_cloud, crash, flipped_bit)
}


def body(transport: Transport, folder: Path, fatal: str | None) -> int:
    """Run one fatal scenario, or all others, each after an agreement that the one before is over."""
    if fatal is not None:
        FATAL[fatal](transport)
        return 0
    verdict = {}
    for name, scenario in SCENARIOS.items():
        try:
            scenario(transport)
            verdict[name] = "ok"
        except Exception:
            verdict[name] = traceback.format_exc()
            break
        transport.agree([0], DEADLINE_S, f"end {name}")
    (folder / f"verdict.{transport.rank}.json").write_text(json.dumps(verdict), encoding="utf-8")
    if verdict[name] != "ok":
        raise WireError(f"{name} failed:\n{verdict[name]}")
    return 0


def main() -> int:
    """Enter the world that there is and play."""
    transport = launch.enter(None)
    fatal = sys.argv[2] if len(sys.argv) > 2 else None
    return launch.guard(transport, lambda: body(transport, Path(sys.argv[1]), fatal), lambda: fatal or "scenarios")


if __name__ == "__main__":
    sys.exit(main())
