"""A cloud and a device that play one round of a benchmark's arm after the other, on a paced link.

The guide has normal entries, each tensor a scale of its own; codecs may be those that `adaptive` would choose. Nothing
here forms a ratio or prints.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from fedbench.base import account
from fedbench.base.arrays import Arrays, Unit
from fedbench.base.clock import Clock
from fedbench.base.errors import ConfigError, WireError
from fedbench.base.job import CommSection, LinkSection
from fedbench.base.quantity import bit_s
from fedbench.base.rng import generator
from fedbench.bench.harness import Options
from fedbench.bench.models import Subject, subject
from fedbench.codec.allocate import Schedule, allocate
from fedbench.codec.codecs import CODECS, RAW
from fedbench.codec.coding import Codec
from fedbench.codec.frame import Place
from fedbench.comm.base import Transport
from fedbench.comm.connect import connect
from fedbench.comm.topology import Topology
from fedbench.models.trainable import Tensor
from fedbench.zo.direction import Direction, as_keys, direction_key
from fedbench.zo.layout import Cutting, Layout, columns_of, row_sparse
from fedbench.zo.ranges import NOTHING, Guide, Piece
from fedbench.zo.span import Span

#: Link of a benchmark that is told none.
LINK = "100Mbit/s"

_DEADLINE_S = 600.0
_H = 1e-3

#: Rounds of `compute` that a schedule is the median of.
_LOOKS = 3

#: Rows of an embedding table that a public set of a few hundred texts uses.
_PUBLIC_ROWS = 2048


def check(options: Options) -> None:
    """Return where two ranks are asked for and the link has a rate; ConfigError else, before any rank is started."""
    if options.ranks != 2:
        raise ConfigError(f"bench: found -n {options.ranks}; one device and its cloud are 2 ranks.")
    try:
        bit_s(options.link or LINK)
    except ValueError as error:
        raise ConfigError(f"--link: {error}.") from None


class _Timed(Mapping[str, np.ndarray]):
    """Units that note when each was first asked for, in seconds since `start`, and how many decoded ones live at most."""

    def __init__(self, units: Arrays, reads: dict[str, float], start: float) -> None:
        self._units, self._reads, self._start = units, reads, start
        self._alive: list[weakref.ref[np.ndarray]] = []
        self.most_alive = 0
        reads.clear()

    def __getitem__(self, name: str) -> np.ndarray:
        self._reads.setdefault(name, time.perf_counter() - self._start)
        array = self._units[name]
        owner = array if array.base is None else array.base
        if isinstance(owner, np.ndarray) and owner.dtype == np.float32:  # what travelled raw is a view of its frame
            self._alive = [known for known in self._alive if known() is not None and known() is not owner]
            self._alive.append(weakref.ref(owner))
            self.most_alive = max(self.most_alive, len(self._alive))
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._units)

    def __len__(self) -> int:
        return len(self._units)


class _Rows:
    """A guide of zeros that notes which rows of a tensor are asked for."""

    def __init__(self) -> None:
        self.by_name: dict[str, np.ndarray] = {}

    def pieces(self, tensor: Tensor, first: int, count: int) -> Iterator[Piece]:
        """Yield nothing but zeros."""
        yield first, first + count, NOTHING

    def rows(self, tensor: Tensor, rows: np.ndarray, columns: int) -> np.ndarray:
        """Note the rows, and return zeros."""
        self.by_name[tensor.name] = np.union1d(rows, self.by_name.get(tensor.name, rows))
        return np.zeros((len(rows), columns), np.float32)


class Play:
    """Both ranks' part in the benchmark: the same calls in the same order on each."""

    def __init__(self, transport: Transport, options: Options) -> None:
        account.keep_heap()
        self.options = options
        self.transport = transport
        rate = options.link or LINK
        self.link_bit_s = bit_s(rate)
        comm = CommSection(deadline_s=_DEADLINE_S)
        link = LinkSection(clock="paced", down=rate, up=rate)
        self._clock = Clock()
        self.star: Topology = connect(transport, self._clock, comm, link.link, 0)
        self.on: Subject = subject(options)
        self.on.stream.poll = self.star.poll
        self._key = as_keys([direction_key(0, 0, 0, 0, 0)])[0]
        trainable = self.on.trainable
        sparse = row_sparse(self.on.cut, trainable)
        layout = Layout(trainable, 1, sparse=sparse)
        outline = self._outline(layout, sparse)
        self.cutting = Cutting(layout, outline)
        self.units: list[Unit] = self.cutting.units()
        self._guide: Arrays = self._made() if self.star.is_cloud else {}
        self._round = 0
        self.reads: dict[str, float] = {}
        self.wait_s = 0.0

    def once(self, arm: str, codecs: Sequence[Codec]) -> float:
        """Return the seconds of one round of an arm on the device, known on both ranks."""
        place = Place(self._round, 0, -1, 0)
        self._round += 1
        unhurried = arm == "compute"
        self.transport.agree([0], _DEADLINE_S, "begin")
        start, waited = time.perf_counter(), self._clock.seconds("wait")
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
                self._probe(Span(self.cutting, _Timed(inbox, self.reads, start)))
            seconds = time.perf_counter() - start
        waited = self._clock.seconds("wait") - waited
        told = [int(1e6 * seconds), 0 if self.star.is_cloud else int(1e6 * waited)]
        micros, waited_micros = self.star.agree(told, "end a round")
        self.wait_s = waited_micros / 1e6
        return micros / 1e6

    def adaptive(self) -> list[Codec]:
        """Return the codecs that a link and a device of these speeds choose, the same on both ranks.

        Units are read a little earlier or later in other codecs, so that the choice is made twice.
        """
        codecs = [CODECS["int8"]] * len(self.units)
        self.once("compute", codecs)
        for _ in range(2):
            codecs = self._chosen(self._schedule(codecs))
        return codecs

    def _schedule(self, codecs: Sequence[Codec]) -> Schedule:
        """Return when the device reads each unit of a guide that is there, and its whole time: medians of some rounds."""
        reads, seconds = [], []
        for _ in range(_LOOKS):
            seconds.append(self.once("compute", codecs))
            unread = 0.0 if self.star.is_cloud else seconds[-1]
            mine = [int(1e6 * self.reads.get(unit.name, unread)) for unit in self.units]
            reads.append(self.transport.agree(mine, _DEADLINE_S, "tell when units are read"))
        return Schedule(np.median(np.array(reads, np.float64), axis=0) / 1e6, float(np.median(seconds)))

    def _chosen(self, schedule: Schedule) -> list[Codec]:
        chosen = [RAW] * len(self.units)
        if self.star.is_cloud:
            squares = np.array([float(np.square(self._guide[u.name], dtype=np.float64).sum()) for u in self.units])
            chosen = allocate(self.units, squares, schedule, self.link_bit_s)
        ids = self.transport.agree([codec.id for codec in chosen], _DEADLINE_S, "choose codecs")
        named = {codec.id: codec for codec in CODECS.values()}
        return [named[number] for number in ids]

    def finish(self) -> None:
        """Complete all messages."""
        self.star.finish()

    def memory(self, codecs: Sequence[Codec]) -> dict[str, int]:
        """Return what a device's probe takes at its peak above the guide as it came, in bytes, known on both ranks.

        `probe` has no guide, `with_spc` decodes units as it reads them, `without_spc` has decoded all of them before.
        `decoded_units` is how many decoded units lived at the same time with SPC, `unit` the size of the largest.
        """
        found = {"unit": max(unit.raw_bytes for unit in self.units), "coded_guide": 0, "decoded_units": 0}
        for arm in ("probe", "with_spc", "without_spc"):
            place = Place(self._round, 0, -1, 0)
            self._round += 1
            inbox = self.star.down("plan", self.units, self._guide or None, place, codecs=codecs)
            mine, alive = 0, 0
            if not self.star.is_cloud:
                self.star.wait(inbox.requests, "the guide")
                account.give_back_free_memory()
                account.reset_peak()
                before = account.resident_bytes()
                if arm == "probe":
                    self._losses(None, 0.0)
                elif arm == "with_spc":
                    units = _Timed(inbox, self.reads, 0.0)
                    self._probe(Span(self.cutting, units))
                    alive = units.most_alive
                else:
                    self._probe(Span(self.cutting, {unit.name: np.array(inbox[unit.name]) for unit in self.units}))
                mine = account.peak_bytes() - before
            found[arm], found["coded_guide"], alive = self.star.agree([mine, inbox.coded_bytes, alive], "end a round")
            found["decoded_units"] = max(found["decoded_units"], alive)
        return found

    def _outline(self, layout: Layout, sparse: Sequence[Tensor]) -> dict[str, np.ndarray]:
        """Return the rows of each table that a guide is not zero in: those of the batch, and of large tables other texts'."""
        used = _Rows()
        self._losses(used, 1.0)
        outline = {}
        for unit, table in zip(layout.outline_units(), sparse, strict=True):
            rows, total = used.by_name.get(table.name, np.empty(0, np.int64)), int(table.parameter.shape[0])
            if total > 2 * _PUBLIC_ROWS:
                others = generator(0, "bench rows of a table", total).choice(total, _PUBLIC_ROWS, replace=False)
                rows = np.union1d(rows, others)
            outline[unit.name] = rows.astype(np.int32)
        return outline

    def _probe(self, span: Span) -> None:
        self._losses(*span.mix(np.ones(1)))

    def _losses(self, guide: Guide | None, factor: float) -> None:
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
