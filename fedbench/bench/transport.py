"""`bench transport`: messages there and back between two ranks, as fedbench sends them, beside blocking calls.

    ratio = time of upper-case Send and Recv / time of fedbench's own, the same bytes, in the same job, in turn

`frames` is the whole way of an array: coded as a frame, sent, received, checked and decoded. Only ranks 0 and 1 talk.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedbench.base.arrays import Unit
from fedbench.base.clock import Clock
from fedbench.base.errors import WireError
from fedbench.bench import harness, ranks
from fedbench.bench.harness import Options
from fedbench.codec import frame
from fedbench.codec.codecs import RAW
from fedbench.codec.frame import Place
from fedbench.comm.base import Transport
from fedbench.comm.mail import AT_WAITS, Mail
from fedbench.comm.mpi import MpiTransport

MIB = 1 << 20

#: Message size in MiB -> turns there and back in one sample.
TURNS = {1: 16, 4: 8, 16: 4, 64: 1}

_DEADLINE_S = 60.0
_PLACE = Place(0, 0, -1, 0)


def run(options: Options) -> dict[str, Any] | None:
    """Return the ratios; None on other ranks than 0 where a launcher started several."""
    return ranks.measured("transport", options)


def measure(transport: Transport, options: Options) -> dict[str, Any]:
    """Return the smallest ratio over the sizes, each size's own with its interval, rates, and all samples."""
    if not isinstance(transport, MpiTransport):
        raise WireError("bench transport measures MPI; this process has none.")
    arms: dict[str, harness.Arm] = {}
    for size in TURNS:
        arms |= _arms(transport, size)
    if transport.rank > 1:
        arms = {}
    samples = harness.measure(arms, options.repeats)
    transport.agree([0], _DEADLINE_S, "end the benchmark")
    return {} if transport.rank else _result(samples)


def _result(samples: dict[str, list[float]]) -> dict[str, Any]:
    seconds = harness.medians(samples)
    found: dict[str, dict[str, Any]] = {
        str(size): {
            "ratio_pingpong": harness.ratio(samples[f"ping-pong {size}"], samples[f"messages {size}"]),
            "ratio_frames": harness.ratio(samples[f"ping-pong {size}"], samples[f"frames {size}"]),
            **{f"{way}_bytes_per_s": 2 * turns * size * MIB / seconds[f"{way} {size}"] for way in _WAYS},
        }
        for size, turns in TURNS.items()
    }
    return {
        "ratio_pingpong": min(one["ratio_pingpong"]["value"] for one in found.values()),
        "ratio_frames": min(one["ratio_frames"]["value"] for one in found.values()),
        "by_mib": found,
        "medians_s": seconds,
        "samples_s": samples,
    }


_WAYS = ("ping-pong", "messages", "frames")


def _arms(transport: MpiTransport, size: int) -> dict[str, harness.Arm]:
    """Return the three ways of passing `size` MiB there and back."""
    turns, peer, first = TURNS[size], 1 - transport.rank, transport.rank == 0
    mail = Mail(transport, Clock(), _DEADLINE_S, None, AT_WAITS)
    out, room = np.ones(size * MIB, np.uint8), np.empty(size * MIB, np.uint8)
    unit = Unit("array", (size * MIB // 4,))
    array = np.ones(unit.shape, np.float32)
    coded, coming = (np.empty(frame.bound(unit), np.uint8) for _ in range(2))

    def messages(mine: np.ndarray = out, theirs: np.ndarray = room) -> None:
        """Pass bytes there and back by fedbench's own messages."""
        request = mail.receive(theirs, peer, 0)
        if not first:
            mail.wait([request], "a message")
        mail.send(("out",), mine, peer, 0)
        if first:
            mail.wait([request], "a message")
        mail.settle(("out",))

    def frames() -> None:
        """Pass the array there and back as a frame: coded, checked, decoded."""
        packed = frame.pack(array, unit, _PLACE, out=coded).frame
        messages(packed, coming)
        frame.unpack(coming, unit, _PLACE, (RAW,), "the other rank")

    def repeated(once: harness.Arm) -> harness.Arm:
        """Return an arm that does it `turns` times."""
        return lambda: [once() for _ in range(turns)]

    return {
        f"ping-pong {size}": lambda: transport.ping_pong(out, turns),
        f"messages {size}": repeated(messages),
        f"frames {size}": repeated(frames),
    }
