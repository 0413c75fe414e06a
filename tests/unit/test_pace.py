"""Links in real time, on a clock of the test's own: when a message arrives, in which order, and what moves it."""

from __future__ import annotations

import math
import threading
import time

import numpy as np
import pytest

from fedbench.base.arrays import Unit
from fedbench.base.clock import Clock
from fedbench.base.errors import ConfigError, WireError
from fedbench.base.job import CommSection, LinkSection
from fedbench.base.link import Link
from fedbench.codec.frame import HEADER_BYTES, Note, Place
from fedbench.comm.base import Request
from fedbench.comm.connect import connect
from fedbench.comm.loopback import Loopback
from fedbench.comm.mail import Mail, Progress
from fedbench.comm.pace import Outbox, Pacer
from fedbench.comm.star import Star
from fedbench.comm.topology import Topology

from hub import Hub, Rank  # isort: skip

#: 1000 bytes take 1 s down and 2 s up, and arrive 0.25 s later.
SLOW = Link(8000.0, 4000.0, 0.25)
UNITS = [Unit("a", (232,)), Unit("b", (232,))]  # 1000 bytes each with its header
assert HEADER_BYTES + UNITS[0].raw_bytes == 1000


class Ticks:
    """A clock that stands until it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def started(log: list[str], name: str) -> Request:
    log.append(name)
    return Rank(Hub(1), 0).receive(np.empty(1, np.uint8), 0, 0)


def test_messages_of_a_link_follow_each_other_and_links_are_independent() -> None:
    clock = Ticks()
    pacer = Pacer(lambda device: SLOW if device < 5 else Link(80_000.0), 0, clock)
    assert pacer.due(1000, [1], up=False) == 101.25
    assert pacer.due(500, [1], up=False) == 101.75  # the first one's latency is under way meanwhile
    assert pacer.due(1000, [1], up=True) == 102.25  # the other way has a queue of its own
    assert pacer.due(1000, [2], up=False) == 101.25  # another device a link of its own
    assert pacer.due(1000, [5], up=False) == 100.1
    assert pacer.due(1000, [1, 2, 5], up=False) == 102.75  # copies go out at once, the last one counts
    assert pacer.due(1000, [5], up=False) == pytest.approx(100.3)
    assert pacer.due(1000, [], up=False) == 100.0
    clock.now = 200.0
    assert pacer.due(1000, [1], up=False) == 201.25  # an idle link begins anew


def test_jitter_comes_from_the_key_and_lets_nothing_overtake() -> None:
    link = Link(8e6, 8e6, 0.01, 0.05)
    pacers = [Pacer(lambda _: link, seed, Ticks()) for seed in (3, 3, 4)]
    dues = [[pacer.due(100, [7], up=False) for _ in range(40)] for pacer in pacers]
    assert dues[0] == dues[1] != dues[2]
    assert dues[0] == sorted(dues[0])
    free = 100.0 + 1e-4 * np.arange(1, 41)
    assert ((np.array(dues[0]) >= free + 0.01) & (np.array(dues[0]) <= free[-1] + 0.06)).all()


def test_an_outbox_starts_what_is_due_in_order() -> None:
    clock, log = Ticks(), []
    outbox = Outbox(clock)
    held = [outbox.hold(due, 0, tag, lambda n=n: started(log, n)) for due, tag, n in ((103, 1, "c"), (101, 2, "a"))]
    outbox.hold(100.5, 0, 1, lambda: started(log, "d"))  # not before the earlier one with its tag
    outbox.hold(102, 0, 3, lambda: started(log, "b"))
    assert outbox.release() == 1.0
    assert log == []
    clock.now = 102.0
    assert outbox.release() == 0.0
    assert outbox.release() == 1.0
    assert log == ["a", "b"]
    clock.now = 103.0
    assert (outbox.release(), outbox.release()) == (0.0, math.inf)
    assert log == ["a", "b", "c", "d"]
    assert not any(message.done() for message in held)


def paced_stars(clock: Ticks, size: int = 3) -> list[Star]:
    hub = Hub(size)
    return [Star(Rank(hub, rank), 5.0, Clock(), Pacer(lambda _: SLOW, 0, clock)) for rank in range(size)]


def arrived(star: Star) -> list[bool]:
    return [request.done() for request in star._receiving.values()]


def test_a_plan_arrives_unit_by_unit_when_its_transfer_is_over() -> None:
    clock = Ticks()
    cloud, one, two = paced_stars(clock)
    place, arrays = Place(0, 0, -1, 0), {unit.name: np.ones(unit.shape, np.float32) for unit in UNITS}
    for star in (one, two):
        star.down("plan", UNITS, None, place, devices=(0, 2))
    cloud.down("plan", UNITS, arrays, place, devices=(0, 2))  # both on rank 1; rank 2 has nobody who waits
    table = [(100.0, [False, False]), (101.2, [False, False]), (101.25, [True, False]), (102.25, [True, True])]
    for now, expected in table:
        clock.now = now
        cloud._mail.poll()
        assert arrived(one) == expected, now
        assert arrived(two) == [True, True]


def test_only_paced_links_ask_who_hosts_whom() -> None:
    devices = (0, 1, 2, 5)
    assert paced_stars(Ticks())[0]._links(devices) == {1: [0, 2], 2: [1, 5]}
    assert Star(Rank(Hub(3), 0), 5.0, Clock())._links(devices) == {}


def test_an_upload_is_under_way_while_the_next_device_computes() -> None:
    """The rank polls from within the computation; nothing else moves the first device's scalars."""
    clock = Ticks()
    cloud, one = paced_stars(clock, 2)
    one._mail._progress = Progress("poll", 0.0)
    place = Place(0, 0, -1, 0)
    inboxes, _ = [star.expect((0, 1), lambda _: UNITS[:1], place) for star in (cloud, one)]
    one.report((0, 1), 0, UNITS[:1], {"a": np.ones(232, np.float32)}, place, Note())
    seen = []
    for _ in range(5):  # device 1 computes in five pieces of a second
        clock.now += 1.0
        one.poll()
        seen.append(inboxes[0].requests[0].done())
    assert seen == [False, False, True, True, True]
    assert not inboxes[1].requests[0].done()


def test_a_wait_is_one_span_that_says_for_what() -> None:
    clock = Clock()
    clock.keep(1, 100)
    clock.begin(0)
    link = LinkSection(clock="paced", down="8Mbit/s", up="8Mbit/s")
    topology = connect(Loopback(), clock, CommSection(progress="none", deadline_s=5.0), link.link, 0)
    place, made = Place(0, 0, -1, 0), {"a": np.ones(2500, np.float32)}
    units = [Unit("a", (2500,))]  # 10 ms
    topology.down("plan", units, made, place, devices=(0,))["a"].sum()
    inboxes = topology.expect((0,), lambda _: units, place)
    topology.report((0,), 0, units, made, place, Note())
    topology.gather(inboxes)
    topology.down("plan", units, made, place, devices=(0,))
    topology.down("plan", units, made, place, devices=(0,))
    topology.finish()
    waits = [(span.unit, span.length_s) for _, span in clock.spans if span.kind == "wait"]
    assert [unit for unit, _ in waits] == ["plan/a", "upload", "last plan", "own messages"]
    assert clock.seconds("wait") == pytest.approx(sum(length for _, length in waits))


@pytest.mark.parametrize("progress", ["none", "poll", "thread"])
def test_real_links_take_their_time_under_every_policy(progress: str) -> None:
    link = LinkSection(clock="paced", down="8Mbit/s", up="8Mbit/s", latency="20ms")
    comm = CommSection(progress=progress, deadline_s=5.0)  # type: ignore[arg-type]
    topology = connect(Loopback(), Clock(), comm, link.link, 0)
    units, place = [Unit("a", (24_982,))], Place(0, 0, -1, 0)  # 100 kB: 0.1 s
    start = time.monotonic()
    inbox = topology.down("plan", units, {"a": np.ones(24_982, np.float32)}, place, devices=(0,))
    assert not inbox.requests[0].done()
    most_s = 0.25 if progress == "none" else 5.0
    while not inbox.requests[0].done() and time.monotonic() - start < most_s:
        topology.poll()  # a computation that polls
    assert inbox.requests[0].done() == (progress != "none")
    assert time.monotonic() - start >= 0.12
    assert inbox["a"].sum() == 24_982
    topology.finish()
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_waits_release_what_is_held_back() -> None:
    link = LinkSection(clock="paced", latency="60ms")
    topology: Topology = connect(Loopback(), Clock(), CommSection(progress="none", deadline_s=5.0), link.link, 0)
    start = time.monotonic()
    inbox = topology.down("plan", UNITS[:1], {"a": np.ones(232, np.float32)}, Place(0, 0, -1, 0), devices=(0,))
    assert inbox["a"].sum() == 232
    assert 0.06 <= time.monotonic() - start < 5.0
    topology.finish()


def test_the_end_waits_for_messages_that_the_progress_thread_has_in_its_hands() -> None:
    mail = Mail(Rank(Hub(1), 0), Clock(), 1.0, None, Progress())
    mail.watch("up", mail.receive(np.empty(1, np.uint8), 0, 0))
    (queue,), taken = mail._watched.values(), threading.Event()

    def advance() -> None:
        with mail.lock:
            request = queue.popleft()
            taken.set()
            time.sleep(0.1)
            queue.append(request)

    other = threading.Thread(target=advance)
    other.start()
    assert taken.wait(5.0)
    with pytest.raises(WireError, match="waits for messages to pass on"):
        mail.finish(lambda: None)
    other.join()


def test_a_thread_needs_a_library_that_takes_threads() -> None:
    rank = Rank(Hub(2), 0)
    rank.takes_threads = False
    with pytest.raises(
        ConfigError, match=r"comm\.progress: found 'thread', but .* THREAD_MULTIPLE; allowed with it: 'none'"
    ):
        Mail(rank, Clock(), 1.0, None, Progress("thread"))
    Mail(rank, Clock(), 1.0, None, Progress("poll"))
