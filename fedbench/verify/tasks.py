"""The tasks that claims are tested on: a job file of jobs/claims, its arms, and how long and how often they run.

Step sizes stand in the job files, one for each method; what needs a step size beside its method's own brings it here.
Seeds are fresh: tuning used 1000 and up. Nothing is run here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

#: Where the job files lie: verification runs in a checkout.
JOBS = Path(__file__).resolve().parents[2] / "jobs" / "claims"

#: Plain zeroth-order baselines: one step size for all weights, no gradient of the cloud.
BASELINES = ("fedzo", "fedmezo", "fedkseed", "fedkseed_pro", "fwdllm", "decomfl", "baffle")

#: Guided arms, and controls that run as long as they do.
GUIDED = ("cooperllm", "cooperllm_plus", "public_only", "shuffled labels")

#: CooperLLM's rounds at whose device FLOPs arms are compared.
BUDGETS = (10, 20, 40, 100, 200)

#: What a round costs where a method has more than one direction by its own default.
_COSTS = {"baffle": 10.5, "fwdllm": 11.0}

_STOP = MappingProxyType({"run.stop_at_target": True})

_SEEDS = (2000, 2001, 2002, 2003, 2004)


@dataclass(frozen=True)
class Arm:
    """Settings laid over a job; `name` is unique within a task.

    `cost` is about the arm's device FLOPs a round over those of one two-sided direction. Rounds are divided by it, so
    that every arm runs up to the same device FLOPs.
    """

    name: str
    settings: Mapping[str, Any]
    cost: float = 1.0


class Scale(NamedTuple):
    """How much is run: seeds, rounds, and rounds from one evaluation to the next, those of GUIDED arms apart.

    A lone direction's round is short beside an evaluation, and a guided arm may be done after a few rounds, so guided
    arms are looked at more often. `arms`: those alone; `more` is laid over all but GUIDED.
    """

    seeds: tuple[int, ...]
    rounds: int
    eval_every: int
    guided_rounds: int | None = None
    guided_every: int = 1
    more: Mapping[str, Any] = MappingProxyType({})
    arms: tuple[str, ...] | None = None

    def settings(self, arm: Arm) -> dict[str, Any]:
        """Return the arm's settings at this scale."""
        guided = arm.name in GUIDED
        rounds = (guided and self.guided_rounds) or self.rounds
        every = self.guided_every if guided else self.eval_every
        return {
            **arm.settings,
            "run.rounds": max(1, round(rounds / arm.cost)),
            "run.eval_every": max(1, round(every / arm.cost)),
            **({} if guided else self.more),
        }


@dataclass(frozen=True)
class Task:
    """A job file with its arms; `quick` is None where --quick leaves the task out."""

    name: str
    job: str
    arms: tuple[Arm, ...]
    full: Scale
    quick: Scale | None = None
    reference: str = "cooperllm"

    @property
    def path(self) -> Path:
        """The job file."""
        return JOBS / f"{self.job}.toml"

    def scale(self, *, quick: bool) -> Scale | None:
        """Return how much is run, None where nothing is."""
        return self.quick if quick else self.full

    def arms_at(self, scale: Scale) -> tuple[Arm, ...]:
        """Return the arms that are run at a scale."""
        return tuple(arm for arm in self.arms if scale.arms is None or arm.name in scale.arms)


@dataclass(frozen=True)
class Shape:
    """A step whose memory is measured; `quick`: that of --quick, else of a full verification."""

    model: str
    batch: int
    length: int
    quick: bool = False

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{self.model} {self.batch}x{self.length}"


def _plain(*methods: str) -> tuple[Arm, ...]:
    return tuple(Arm(method, {"method.name": method}, _COSTS.get(method, 1.0)) for method in methods)


def _split(name: str, cost: float = 1.0, **settings: Any) -> Arm:
    return Arm(name, {"method.name": "fedspzo", **{f"method.{key}": value for key, value in settings.items()}}, cost)


#: The arms of every task with a cloud that has public rows.
_ARMS = (
    *_plain("cooperllm", "cooperllm_plus", "public_only"),
    Arm("shuffled labels", {"method.name": "cooperllm", "data.public_labels": "shuffled"}),
    *_plain(*BASELINES, "fedavg"),
)

EMBEDDED = Task(
    "embedded",
    "embedded",
    _ARMS,
    full=Scale(_SEEDS, 200, 2),
    quick=Scale(_SEEDS[:2], 120, 4, guided_rounds=40, more=_STOP),
)
POOR = Task(
    "embedded:poor",
    "embedded_poor",
    _ARMS,
    full=Scale(_SEEDS, 200, 2),
    quick=Scale(_SEEDS[:2], 40, 4),
)
TREC = Task("trec", "trec", _ARMS, full=Scale(_SEEDS[:3], 100, 5, guided_every=2))
SST2 = Task("sst2", "sst2", _ARMS, full=Scale(_SEEDS[:3], 100, 5, guided_every=2))

#: FedSPZO's readings of its abstract beside MeZO with block-wise steps and beside block 2 alone.
_SPLIT_ARMS = (
    _split("fedspzo B1", estimator="B1"),
    _split("fedspzo Ac", estimator="Ac"),
    _split("block-wise MeZO", estimator="A", p1=1, p2=1, lr=1e-3, lr_ratio=3.0),
    _split("first block frozen", 0.5, estimator="B1", freeze_first=True),
)
SPLIT = Task(
    "embedded, long",
    "fedspzo",
    (*_SPLIT_ARMS, *_plain(*BASELINES)),
    full=Scale(_SEEDS, 400, 4),
    quick=Scale(
        _SEEDS[:2],
        120,
        4,
        more=_STOP,
        arms=(*(arm.name for arm in _SPLIT_ARMS), "fedzo", "fedmezo", "decomfl"),
    ),
    reference="fedmezo",
)

MEMORY = (Shape("opt-125m", 16, 256), Shape("opt-125m", 8, 64, quick=True))
