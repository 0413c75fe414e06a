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

#: The first three of them where all were tuned.
BEST_BASELINES = ("fedkseed", "fedmezo", "fwdllm")

#: Guided arms, and controls that run as long as they do.
GUIDED = ("cooperllm", "cooperllm_plus", "public_only", "shuffled labels")

#: CooperLLM's rounds at whose device FLOPs arms are compared.
BUDGETS = (10, 20, 40, 100)

#: Device FLOPs of a round over those of one two-sided direction, where it isn't about 1 with the jobs' settings.
_COSTS = {
    "baffle": 2.5,
    "fwdllm": 1.1,
    "cooperllm_plus": 1.12,
    "fedavg": 1.5,
    "fedavg_lora": 1.5,
    "bitfit": 1.5,
    "ferret": 1.5,
}

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
    """How much is run: seeds, rounds, and rounds from one evaluation to the next.

    A round is short beside an evaluation, and a guided arm may be done after a few rounds, so of GUIDED arms the first
    `guided_first` rounds are all evaluated. `arms`: those alone; `more` is laid over all but GUIDED.
    """

    seeds: tuple[int, ...]
    rounds: int
    eval_every: int
    guided_rounds: int | None = None
    guided_first: int = 8
    more: Mapping[str, Any] = MappingProxyType({})
    arms: tuple[str, ...] | None = None

    def settings(self, arm: Arm) -> dict[str, Any]:
        """Return the arm's settings at this scale."""
        guided = arm.name in GUIDED
        rounds = (guided and self.guided_rounds) or self.rounds
        return {
            **arm.settings,
            "run.rounds": max(1, round(rounds / arm.cost)),
            "run.eval_every": max(1, round(self.eval_every / arm.cost)),
            **({"run.eval_first": self.guided_first} if guided else self.more),
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


def _variant(name: str, method: str, cost: float = 1.0, **settings: Any) -> Arm:
    return Arm(name, {"method.name": method, **{f"method.{key}": value for key, value in settings.items()}}, cost)


#: The arms of every task with a cloud that has public rows.
_GUIDED_ARMS = (
    *_plain("cooperllm", "cooperllm_plus", "public_only"),
    Arm("shuffled labels", {"method.name": "cooperllm", "data.public_labels": "shuffled"}),
    Arm("fedavg from public", {"method.name": "fedavg", "method.public_rounds": 20}, _COSTS["fedavg"]),
)

#: Methods that no claim is about; they stand in the tables beside the others.
OTHERS = ("fedavg", "fedavg_lora", "bitfit", "ferret", "spry", "meerkat", "agzo")

#: Step sizes beside those of the job file: tuned with the same budget (docs/tuning.md).
_AC = MappingProxyType({"lr": 4.6e-4})
_BLOCKWISE = MappingProxyType({"lr": 2.2e-3, "lr_ratio": 4.0})
_FROZEN = MappingProxyType({"lr": 1e-3})
_ONE_BLOCK = MappingProxyType({"lr": 1e-3, "guide_ratio": 50.0})

#: FedSPZO's readings of its abstract beside MeZO with block-wise steps and beside block 2 alone. On the embedded model
#: block 2 is the last layer, which runs at one position, and the head.
_SPLIT_ARMS = (
    _variant("fedspzo B1", "fedspzo", 1.12, estimator="B1"),
    _variant("fedspzo Ac", "fedspzo", 1.24, estimator="Ac", **_AC),
    _variant("block-wise MeZO", "fedspzo", estimator="A", p1=1, p2=1, **_BLOCKWISE),
    _variant("first block frozen", "fedspzo", 0.63, estimator="B1", freeze_first=True, **_FROZEN),
)

#: What CooperLLM plus is made of, one part left out at a time, and guides of other kinds.
ABLATION = (
    _variant("plus without guide", "cooperllm_plus", 1.12, guide_ratio=0.0),
    _variant("plus without split", "cooperllm_plus", 1.0, p2=0, **_ONE_BLOCK),
    _variant("plus without shrinking", "cooperllm_plus", 1.12, shrink=False),
    _variant("plus, a guide a layer", "cooperllm_plus", 1.12, guide="layers", b=1.0),
)

EMBEDDED = Task(
    "embedded",
    "embedded",
    (*_GUIDED_ARMS, *_plain(*BASELINES, *OTHERS), *_SPLIT_ARMS),
    full=Scale(_SEEDS, 120, 5, guided_rounds=100),
    quick=Scale(
        _SEEDS[:2],
        80,
        5,
        guided_rounds=40,
        more=_STOP,
        arms=(*(arm.name for arm in (*_GUIDED_ARMS, *_SPLIT_ARMS)), *BASELINES),
    ),
)
POOR = Task(
    "embedded:poor",
    "embedded_poor",
    (*_GUIDED_ARMS, *_plain(*BASELINES, *OTHERS), _SPLIT_ARMS[0], *ABLATION),
    full=Scale(_SEEDS, 120, 5, guided_rounds=100),
    quick=Scale(_SEEDS[:2], 40, 5, arms=(*(arm.name for arm in _GUIDED_ARMS), "fedmezo", "fedkseed")),
)
#: On text FedSPZO (B1) is also cooperllm_plus without its guide.
_TEXT_ARMS = (*_GUIDED_ARMS, *_plain("fedmezo", "fedspzo", "fedavg"))
TREC = Task("trec", "trec", _TEXT_ARMS, full=Scale(_SEEDS[:3], 40, 5, guided_first=4))
SST2 = Task("sst2", "sst2", _TEXT_ARMS, full=Scale(_SEEDS[:3], 20, 10, guided_first=2))

MEMORY = (Shape("opt-125m", 16, 256), Shape("opt-125m", 8, 64, quick=True))
