"""The cloud's choice of a codec for every unit of a plan (`comm.codec = "adaptive"`), and what it is based on.

Nominal rates come from the job alone, so that equal jobs choose equal codecs. Measured ones follow the rounds played,
and no two runs need choose alike: such a run's choices are in its run file, from which `adapt = "replay"` takes them.
How bits are shared out among the units stands in `codec/allocate.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from fedbench.algorithms.base import Round
from fedbench.base.arrays import Arrays, Unit
from fedbench.base.errors import ConfigError
from fedbench.base.job import Config
from fedbench.codec.allocate import LADDER, Schedule, allocate
from fedbench.codec.coding import Codec
from fedbench.codec.frame import Note
from fedbench.results import reader
from fedbench.run.build import Built
from fedbench.run.course import Courses
from fedbench.sim.profiles import device_of, link_of

#: FLOP/s of a device where the job names none: one core of a small computer.
DEFAULT_FLOPS_PER_S = 2e10

#: Where no device had to wait for a plan, the link carries more than is known: the next plan may be larger by the first
#: factor before the link has been measured at all, by the second one afterwards.
_UNKNOWN, _BOLDER = 2.0, 1.05


class Rates:
    """What the choice rests on: the link's rate in bit/s and a device's FLOP/s, both the slowest's."""

    def __init__(self, config: Config, *, measured: bool) -> None:
        flops_per_s = device_of(config).flops_per_s
        self.bit_s = link_of(config).down_bit_s
        self.flops_per_s = flops_per_s if math.isfinite(flops_per_s) else DEFAULT_FLOPS_PER_S
        self.measured = measured
        self._link_seen = False

    def observe(self, notes: Sequence[Note]) -> None:
        """Learn from what devices tell of an exchange with a plan: the rate at which it came, and how fast they are."""
        speeds = [note.flops / note.compute_s for note in notes if note.compute_s > 0 and note.flops > 0]
        if not self.measured or not speeds:
            return
        self.flops_per_s = min(speeds)
        seen = [note.link_bit_s for note in notes if note.link_bit_s > 0]
        if seen:
            self.bit_s, self._link_seen = min(seen), True
        else:
            self.bit_s *= _BOLDER if self._link_seen else _UNKNOWN

    def state(self) -> dict[str, float]:
        """Return what has been learnt, for a checkpoint."""
        return {"bit_s": self.bit_s, "flops_per_s": self.flops_per_s, "link_seen": float(self._link_seen)}

    def restore(self, state: Mapping[str, float]) -> None:
        """Take up what had been learnt."""
        self.bit_s, self.flops_per_s = float(state["bit_s"]), float(state["flops_per_s"])
        self._link_seen = bool(state["link_seen"])


class Chooser(Protocol):
    """What chooses on the cloud."""

    def choose(self, at: Round, units: Sequence[Unit], arrays: Arrays, poll: Callable[[], None]) -> list[Codec]:
        """Return a codec for each unit of a plan; `poll` is called after each."""

    def observe(self, notes: Sequence[Note]) -> None:
        """Learn from what devices tell of an exchange with a plan."""

    def state(self) -> dict[str, float]:
        """Return what has been learnt, for a checkpoint."""

    def restore(self, state: Mapping[str, float]) -> None:
        """Take up what had been learnt."""


class ByRates:
    """Chooses what the link carries while the device computes."""

    def __init__(self, courses: Courses, rates: Rates, passes: int) -> None:
        self._courses = courses
        self._passes = passes
        self.rates = rates
        self.observe, self.state, self.restore = rates.observe, rates.state, rates.restore

    def choose(self, at: Round, units: Sequence[Unit], arrays: Arrays, poll: Callable[[], None]) -> list[Codec]:
        """Return a codec for each unit of a plan; `poll` is called after each."""
        squares = np.zeros(len(units))
        for k, unit in enumerate(units):
            squares[k] = _square(arrays[unit.name])
            poll()
        course = self._courses.of(at, units)
        total = course.before + self._passes * course.behind.sum()
        schedule = Schedule(course.reads / self.rates.flops_per_s, total / self.rates.flops_per_s)
        return allocate(units, squares, schedule, self.rates.bit_s)


class Replay:
    """Chooses what another run chose, round by round."""

    def __init__(self, path: Path) -> None:
        self._path = path
        table = reader.read(path).codec
        self._rounds: dict[int, list[tuple[str, float]]] = {}
        for number, unit, bits in zip(*(table.get(name, ()) for name in ("round", "unit", "bits")), strict=True):
            self._rounds.setdefault(int(number), []).append((str(unit), float(bits)))
        if not self._rounds:
            raise ConfigError(f"comm.replay: {path} holds no chosen codecs; its run was not adaptive.")

    def choose(self, at: Round, units: Sequence[Unit], arrays: Arrays, poll: Callable[[], None]) -> list[Codec]:
        """Return the codecs that the other run chose for these units in this round."""
        told = self._rounds.get(at.number, [])
        mine, told[: len(units)] = told[: len(units)], []
        if [name for name, _ in mine] != [unit.name for unit in units]:
            raise ConfigError(
                f"comm.replay: round {at.number} of {self._path} has codecs of {len(mine)} units, "
                f"this run's plan has {len(units)}; it can replay a run of the same job alone."
            )
        named = {codec.bits: codec for codec in LADDER}
        return [named[bits] for _, bits in mine]

    def observe(self, notes: Sequence[Note]) -> None:
        """Learn nothing."""

    def state(self) -> dict[str, float]:
        """Return nothing: rounds are looked up by number."""
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        """Take up nothing."""


def chooser_of(built: Built) -> Chooser | None:
    """Return what chooses for a run, or None where its job names one codec."""
    config = built.job.config
    if config.comm.codec != "adaptive":
        return None
    if config.comm.adapt == "replay":
        return Replay(Path(config.comm.replay))
    rates = Rates(config, measured=config.comm.adapt == "measured")
    return ByRates(Courses(built), rates, max(1, config.zo.perturbations))


def _square(array: np.ndarray) -> float:
    return float(np.square(array, dtype=np.float64).sum())
