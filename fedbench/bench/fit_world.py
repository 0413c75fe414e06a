"""What `fedbench check` measures between ranks: that they are one world, what their cores are, messages, overlap.

    overlap = (transfer + compute - both) / min(transfer, compute), cut to 0..1     (three runs, medians)

Rank 0 and the first rank of every other host talk (rank 1 where all are on one host); the worst pair counts. A payload
is looked at before its time is.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fedbench.base.errors import WireError
from fedbench.bench.fit import Row, judged, span
from fedbench.bench.harness import Options
from fedbench.comm.base import Transport
from fedbench.comm.mpi import MpiTransport
from fedbench.report.units import quantity

_DEADLINE_S = 60.0
_SMALL, _SMALL_TURNS = 8, 200
_LARGE, _LARGE_TURNS = 4 << 20, 8
_STREAM = 32 << 20
_MOST_PEERS = 16
_SLICE = 160  # rows and columns of the product between two polls: well below a millisecond
_LEAST_COMPUTE_S = 0.03

_LATENCY_S, _BYTES_PER_S, _OVERLAP = 1e-3, 1e8, 0.5
_PATTERN = 251


def measure(transport: Transport, options: Options) -> dict[str, Any]:
    """Return on rank 0 what was found; WireError where a message came with other bytes than it left with."""
    if not isinstance(transport, MpiTransport):
        raise WireError("fedbench check looks at MPI; this process has none.")
    hosts = [transport.name_of(rank).rpartition(" ")[2] for rank in range(transport.size)]
    firsts = [hosts.index(host) for host in dict.fromkeys(hosts)]
    peers = [rank for rank in firsts if rank > 0][:_MOST_PEERS] or [1]
    mine = [0] * (2 * transport.size)
    mine[2 * transport.rank] = len(os.sched_getaffinity(0))
    mine[2 * transport.rank + 1] = torch.cuda.device_count() if torch.cuda.is_available() else 0
    told = transport.agree(mine, _DEADLINE_S, "tell their cores")
    pairs = []
    for peer in peers:
        pair = {"peer": peer, "host": hosts[peer], **_ping_pong(transport, peer, options.repeats)}
        pairs.append(pair | _overlap(transport, peer, options.repeats))
    return {
        "ranks": transport.size,
        "hosts": hosts,
        "cores_of_ranks": told[::2],
        "gpus_of_ranks": told[1::2],
        "library": transport.library,
        "thread_level": transport.thread_level,
        "takes_threads": transport.takes_threads,
        "pairs": pairs,
    }


def rows(found: dict[str, Any], asked: int, threads: int) -> list[Row]:
    """Return the rows of what `measure` found, for so many ranks asked for."""
    size, hosts = int(found["ranks"]), sorted(set(found["hosts"]))
    several, pairs = len(hosts) > 1, found["pairs"]
    world = judged(
        "world",
        f"{size} rank(s) on {len(hosts)} host(s), {found['library'].partition(',')[0]}",
        f"{asked} rank(s)",
        fail="" if size == asked else "use the launcher of the MPI library that mpi4py was built for",
    )
    level = judged(
        "thread level",
        found["thread_level"],
        "MPI_THREAD_MULTIPLE, for comm.progress = 'thread' alone",
        warn="" if found["takes_threads"] else "leave comm.progress = 'poll'",
    )
    return [world, level, _bound(found, threads), _messages(pairs, several), _hidden(pairs, several), *_per_rank(found)]


def _bound(found: dict[str, Any], threads: int) -> Row:
    fewest = min(found["cores_of_ranks"])
    few = fewest < threads
    return judged(
        "cores of a rank",
        span(found["cores_of_ranks"]),
        f"{threads} at least, its threads",
        warn="ranks are bound to fewer cores than they have threads: mpirun --bind-to none" if few else "",
    )


def _messages(pairs: Sequence[dict[str, Any]], several: bool) -> Row:
    latency, rate = max(p["latency_s"] for p in pairs), min(p["bytes_per_s"] for p in pairs)
    slow = latency > _LATENCY_S or rate < _BYTES_PER_S
    where = "between hosts" if several else "within this host"
    return judged(
        "ping-pong",
        f"{quantity(latency, 's')} one way, {quantity(rate, 'B/s')} {where}",
        f"{quantity(_LATENCY_S, 's')}, {quantity(_BYTES_PER_S, 'B/s')}",
        warn="slow for an interconnect: is the library on the fast network, or are cores oversubscribed?"
        if slow
        else "",
    )


def _hidden(pairs: Sequence[dict[str, Any]], several: bool) -> Row:
    polled, silent = min(p["overlap"] for p in pairs), min(p["overlap_silent"] for p in pairs)
    transfer = max(p["transfer_s"] for p in pairs)
    value = f"{polled:.2f} polled, {silent:.2f} without, {_STREAM >> 20} MiB in {quantity(transfer, 's')}"
    needed = f"{_OVERLAP:g} polled, between hosts"
    if not several:
        return Row("overlap", f"{value}; one host: a copy by the same cores", needed)
    advice = "transfers are not hidden behind compute on this transport: try comm.progress = 'thread', another provider"
    return judged("overlap", value, needed, warn=advice if polled < _OVERLAP else "")


def _per_rank(found: dict[str, Any]) -> list[Row]:
    """Return a row on GPUs where any rank sees one: all should, or none."""
    seen = found["gpus_of_ranks"]
    if not any(seen):
        return []
    blind = [rank for rank, count in enumerate(seen) if rank > 0 and not count]
    advice = f"ranks {', '.join(map(str, blind))} see no GPU: ask for one on each node (--gpus-per-node)"
    value = f"{span(seen)} seen by a rank"
    return [judged("GPU of a rank", value, "one at least, or none anywhere", warn=advice if blind else "")]


def _ping_pong(transport: MpiTransport, peer: int, repeats: int) -> dict[str, Any]:
    """Return one-way latency and rate between rank 0 and `peer`, known on rank 0."""
    seconds = {}
    for size, turns in ((_SMALL, _SMALL_TURNS), (_LARGE, _LARGE_TURNS)):
        pattern = (np.arange(size, dtype=np.int64) % _PATTERN).astype(np.uint8)
        samples = []
        for turn in range(repeats + 1):
            buffer = pattern.copy() if transport.rank == 0 else np.zeros(size, np.uint8)
            transport.agree([0], _DEADLINE_S, "begin a ping-pong")
            start = time.perf_counter()
            transport.ping_pong(buffer, turns, peer)
            if turn:  # the first one only warms up
                samples.append((time.perf_counter() - start) / (2 * turns))
            if transport.rank in (0, peer) and not np.array_equal(buffer, pattern):
                raise WireError(f"{transport.name_of(transport.rank)} received other bytes than were sent.")
        seconds[size] = samples
    return {
        "latency_s": statistics.median(seconds[_SMALL]),
        "bytes_per_s": _LARGE / statistics.median(seconds[_LARGE]),
        "samples_s": {str(size): samples for size, samples in seconds.items()},
    }


def _overlap(transport: MpiTransport, peer: int, repeats: int) -> dict[str, Any]:
    """Return how much of a transfer from rank 0 runs behind the compute of `peer`, polled and not, by three runs."""
    matrix, out = np.ones((_SLICE, _SLICE), np.float32), np.empty((_SLICE, _SLICE), np.float32)
    content = np.full(_STREAM, 7, np.uint8) if transport.rank == 0 else np.zeros(_STREAM, np.uint8)

    def once(slices: int, *, moving: bool, polled: bool) -> float:
        """Return the seconds of one arm on `peer`, known on every rank."""
        transport.agree([0], _DEADLINE_S, "begin a transfer")
        start = time.perf_counter()
        request = None
        if moving and transport.rank == 0:
            request = transport.send(content, peer, 1)
        if moving and transport.rank == peer:
            request = transport.receive(content, 0, 1)
        if transport.rank == peer:
            for _ in range(slices):
                np.matmul(matrix, matrix, out=out)
                if polled and request is not None:
                    request.done()
        if request is not None:
            transport.wait([request], _DEADLINE_S, lambda _: "a message did not come.")
        mine = time.perf_counter() - start if transport.rank == peer else 0.0
        return transport.agree([int(1e9 * mine)], _DEADLINE_S, "end a transfer")[0] / 1e9

    once(1, moving=True, polled=True)
    alone = once(64, moving=False, polled=False) / 64
    slices = max(1, round(max(_LEAST_COMPUTE_S, once(0, moving=True, polled=True)) / alone))
    arms = {"transfer": (0, True, True), "compute": (slices, False, False)}
    arms |= {"both": (slices, True, True), "silent": (slices, True, False)}
    samples: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, (count, moving, polled) in arms.items():
            samples[name].append(once(count, moving=moving, polled=polled))
    middle = {name: statistics.median(values) for name, values in samples.items()}
    shorter, both = min(middle["transfer"], middle["compute"]), middle["transfer"] + middle["compute"]
    return {
        "overlap": min(1.0, max(0.0, (both - middle["both"]) / shorter)),
        "overlap_silent": min(1.0, max(0.0, (both - middle["silent"]) / shorter)),
        "transfer_s": middle["transfer"],
        "samples_overlap_s": samples,
    }
