"""`bench overlap`: a guide streams to a device that computes meanwhile, on a paced link, beside what neither hides.

    compute     the probe on a guide that is there already           transfer  the guide alone
    both        the probe while the guide arrives                    sequential  the whole guide, then the probe
    hidden_fraction = (transfer + compute - both) / min(transfer, compute), cut to 0..1       (three-run control)
    over_ideal = both / (max(transfer, compute) + one unit's fill)

Rank 0 is the cloud and codes while it sends; rank 1 is the device, whose times count. All arms take turns within a
repetition; codecs are `adaptive`, from the link's rate and the compute alone as it was measured before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedbench.base import account
from fedbench.base.arrays import Arrays, Unit
from fedbench.base.clock import Clock
from fedbench.base.errors import ConfigError, WireError
from fedbench.base.job import CommSection, LinkSection
from fedbench.base.quantity import bit_s
from fedbench.base.rng import generator
from fedbench.bench import harness, ranks
from fedbench.bench.harness import Options
from fedbench.bench.models import Subject, subject
from fedbench.codec import frame
from fedbench.codec.allocate import Schedule, allocate
from fedbench.codec.codecs import CODECS, RAW
from fedbench.codec.coding import Codec
from fedbench.codec.frame import Place
from fedbench.comm.base import Transport
from fedbench.comm.connect import connect
from fedbench.comm.inbox import Inbox
from fedbench.comm.topology import Topology
from fedbench.zo.direction import Direction, as_keys, direction_key
from fedbench.zo.layout import Cutting, Layout, columns_of, row_sparse
from fedbench.zo.span import Span

#: Link of a benchmark that is told none.
LINK = "100Mbit/s"

ARMS = ("compute", "transfer", "both", "sequential")
_DEADLINE_S = 600.0
_H = 1e-3

#: Rows of an embedding table that a public set of a few hundred texts uses.
_PUBLIC_ROWS = 2048


def run(options: Options) -> dict[str, Any] | None:
    """Return hidden fraction, ratio to the ideal and their samples; None on other ranks than 0."""
    return ranks.measured("overlap", options)


def measure(transport: Transport, options: Options) -> dict[str, Any]:
    """Return the figures of the adaptive codec on rank 0."""
    play = Play(transport, options)
    codecs = play.adaptive()
    result = figures(play, codecs)
    play.finish()
    return result


def figures(play: Play, codecs: Sequence[Codec]) -> dict[str, Any]:
    """Return what `bench overlap` says of units in given codecs (rank 0), from as many rounds of each arm as asked for."""
    samples: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for number in range(max(6, play.options.repeats)):
        for arm in ARMS if number % 2 == 0 else reversed(ARMS):
            samples[arm].append(play.once(arm, codecs))
    link, framed = play.link_bit_s, [8.0 * frame.bound(u, c) for c, u in zip(codecs, play.units, strict=True)]
    payload = [8.0 * frame.coded_bytes(u, c) for c, u in zip(codecs, play.units, strict=True)]
    fill_s = max(framed) / link
    compute, transfer, both, sequential = (np.array(samples[arm]) for arm in ARMS)
    ideal = np.maximum(compute, transfer) + fill_s
    hidden = np.clip((transfer + compute - both) / np.minimum(transfer, compute), 0.0, 1.0)
    used: dict[str, int] = {}
    for codec in codecs:
        used[codec.name] = used.get(codec.name, 0) + 1
    return {
        "hidden_fraction": float(np.median(hidden)),
        "over_ideal": float(np.median(both / ideal)),
        "sequential_over_ideal": float(np.median(sequential / ideal)),
        "intervals": {
            "over_ideal": harness.ratio(both.tolist(), ideal.tolist()),
            "sequential_over_ideal": harness.ratio(sequential.tolist(), ideal.tolist()),
        },
        "rounds": len(both),
        "link_bit_s": link,
        "fill_s": fill_s,
        "nominal_transfer_s": sum(framed) / link,
        "units": len(framed),
        "units_by_codec": used,
        "bits_per_entry": sum(payload) / sum(unit.entries for unit in play.units),
        "medians_s": harness.medians(samples),
        "samples_hidden": hidden.tolist(),
        "samples_s": samples,
    }


class Play:
    """Both ranks' part in the benchmark: the same calls in the same order on each."""

    def __init__(self, transport: Transport, options: Options) -> None:
        if transport.size != 2:
            raise ConfigError(f"bench: found -n {transport.size}; one device and its cloud are 2 ranks.")
        account.keep_heap()
        self.options = options
        self.transport = transport
        rate = options.link or LINK
        self.link_bit_s = bit_s(rate)
        comm = CommSection(deadline_s=_DEADLINE_S)
        link = LinkSection(clock="paced", down=rate, up=rate)
        self.star: Topology = connect(transport, Clock(), comm, link, 0)
        self.on: Subject = subject(options)
        self.on.stream.poll = self.star.poll
        trainable = self.on.trainable
        sparse = row_sparse(self.on.cut, trainable)
        layout = Layout(trainable, 1, sparse=sparse)
        outline = {}
        for unit, table in zip(layout.outline_units(), sparse, strict=True):
            total = int(table.parameter.shape[0])
            if total > 2 * _PUBLIC_ROWS:
                drawn = generator(0, "bench rows of a table", total).choice(total, _PUBLIC_ROWS, replace=False)
                outline[unit.name] = np.sort(drawn).astype(np.int32)
        self.cutting = Cutting(layout, outline)
        self.units: list[Unit] = self.cutting.units()
        self._guide: Arrays = self._made() if self.star.is_cloud else {}
        self._round = 0
        self._key = as_keys([direction_key(0, 0, 0, 0, 0)])[0]

    def once(self, arm: str, codecs: Sequence[Codec]) -> float:
        """Return the seconds of one round of an arm on the device, known on both ranks."""
        place = Place(self._round, 0, -1, 0)
        self._round += 1
        unhurried = arm == "compute"
        self.transport.agree([0], _DEADLINE_S, "begin")
        start = time.perf_counter()
        inbox = self.star.down(
            "plan", self.units, self._guide or None, place, devices=() if unhurried else (0,), codecs=codecs
        )
        if self.star.is_cloud:
            seconds = 0.0
        else:
            if arm != "both":
                self.star.wait(inbox.requests, "the guide")
            start = time.perf_counter() if unhurried else start
            if arm != "transfer":
                self._probe(inbox)
            seconds = time.perf_counter() - start
        (micros,) = self.star.agree([int(1e6 * seconds)], "end a round")
        return micros / 1e6

    def adaptive(self) -> list[Codec]:
        """Return the codecs that a link and a device of these speeds choose, the same on both ranks."""
        codecs = [CODECS["int8"]] * len(self.units)
        self.once("compute", codecs)
        compute_s = min(self.once("compute", codecs) for _ in range(2))
        chosen = [RAW] * len(self.units)
        if self.star.is_cloud:
            squares = np.array([float(np.square(self._guide[u.name], dtype=np.float64).sum()) for u in self.units])
            chosen = allocate(self.units, squares, self.schedule(compute_s), self.link_bit_s)
        ids = self.transport.agree([codec.id for codec in chosen], _DEADLINE_S, "choose codecs")
        named = {codec.id: codec for codec in CODECS.values()}
        return [named[number] for number in ids]

    def schedule(self, compute_s: float) -> Schedule:
        """Return when the device reads each unit, its whole compute taking so long."""
        cut, shape = self.on.cut, (self.options.batch, self.options.length)
        share = compute_s / cut.forward_flops(*shape)
        stages = np.array(self.cutting.stages())
        entries = np.array([unit.entries for unit in self.units], np.float64)
        reads = np.zeros(len(stages))
        done = 0.0
        for stage in range(cut.stages):
            own, seconds = stages == stage, share * cut.stage_flops(stage, *shape)
            if own.any():
                reads[own] = done + seconds * (np.cumsum(entries[own]) - entries[own]) / entries[own].sum()
            done += seconds
        return Schedule(reads, compute_s)

    def finish(self) -> None:
        """Complete all messages."""
        self.star.finish()

    def _probe(self, inbox: Inbox) -> None:
        guide, factor = Span(self.cutting, inbox).mix(np.ones(1))
        plus, minus = self.on.stream.losses(self.on.batch, Direction(self._key, _H, guide, factor), _H)
        if not math.isfinite(plus + minus):
            raise WireError(f"The probe's losses are {plus} and {minus}.")

    def _made(self) -> dict[str, np.ndarray]:
        """Return a guide of normal entries, each tensor with a scale of its own, of length 1."""
        units: dict[str, np.ndarray] = {}
        for tensor in self.cutting.layout.trainable:
            draw = generator(0, "bench guide", tensor.key % (1 << 31))
            scale = 10.0 ** draw.uniform(-1, 0) / math.sqrt(columns_of(tensor))
            for tile in self.cutting.tiles(0, tensor):
                units[tile.name] = np.float32(scale) * draw.standard_normal(tile.end - tile.first, np.float32)
        length = math.sqrt(sum(float(np.square(a, dtype=np.float64).sum()) for a in units.values()))
        return {name: array / np.float32(length) for name, array in units.items()}


def table(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of several codecs as one tree without their samples."""
    return {name: {k: v for k, v in row.items() if not k.startswith("samples")} for name, row in rows.items()}
