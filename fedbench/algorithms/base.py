"""What a method is: four steps on named arrays, and the settings that it owns.

A round is a sequence of exchanges. In each, the cloud plans, every sampled device
computes, the cloud combines what they sent (in device order) and all replicas apply the
reply. A method sees arrays, batches and a model; never ranks, codecs, links or files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field

from fedbench.base.account import Meter
from fedbench.base.arrays import Arrays, Unit
from fedbench.base.job import Section
from fedbench.data.rows import Batch
from fedbench.models.cut import Cut
from fedbench.models.trainable import Trainable
from fedbench.zo.direction import as_keys, direction_key
from fedbench.zo.stream import Stream

#: How the names of state begin that the cloud alone gets back.
CLOUD = "cloud/"

#: Type of every method's `lr`, so that a method that has a default of its own keeps the rule.
StepSize = Annotated[float, Field(gt=0, description="step size")]


class Settings(Section):
    """Settings that every method has."""

    lr: StepSize = 1e-2
    schedule: Literal["constant", "linear"] = Field(
        "constant", description="step size over rounds; linear: warm-up over 6 % of the rounds, then down to 0"
    )

    def lr_at(self, round_: int, rounds: int) -> float:
        """Return the step size of a round."""
        if self.schedule == "constant":
            return self.lr
        warmup = max(1, round(0.06 * rounds))
        return self.lr * min((round_ + 1) / warmup, (rounds - round_) / max(1, rounds - warmup))


class CatchUp(Enum):
    """What a device fetches of the rounds that it missed, unless the model is less."""

    #: Every round's plan and reply, and the numbers of the devices whose directions the reply weighs.
    REPLAY_OF_DEVICES = "replay of devices"
    #: Every round's plan and reply: directions are shared, or the reply is a step by itself.
    REPLAY = "replay"
    #: The newest reply: it stands for all before.
    NEWEST = "newest"


class Round(NamedTuple):
    """Where a run stands: round, exchange within it, sampled devices in ascending order, step size."""

    number: int
    exchange: int
    devices: tuple[int, ...]
    lr: float


class Upload(NamedTuple):
    """What a device sends, and its mean loss for people to look at."""

    arrays: Arrays
    loss: float


class Reply(NamedTuple):
    """What the cloud answers; `again` asks the same devices for another exchange in this round."""

    arrays: Arrays
    again: bool = False


@dataclass(frozen=True)
class Lab:
    """What a method works with.

    `private(round, step, device)` and `public(round, step)` return batches that depend on
    their arguments and the seed alone; `public_rows()` returns the whole public set in batches.
    `kept(units, coded)` returns the units of an earlier message, coded as they travelled (`Coded`).
    """

    seed: int
    rounds: int
    devices: int
    sampled: int
    local_steps: int
    perturbations: int
    epsilon: float
    cut: Cut
    trainable: Trainable
    stream: Stream
    meter: Meter
    private: Callable[[int, int, int], Batch]
    public: Callable[[int, int], Batch]
    public_rows: Callable[[], Sequence[Batch]]
    guide_lag: int = 0
    guide_reuse: str = "keep"
    kept: Callable[[Sequence[Unit], Arrays], Arrays] = lambda _, coded: coded

    @property
    def gaussian(self) -> bool:
        """Whether directions are Gaussian."""
        return self.stream.gaussian

    def directions(self, round_: int, device: int, steps: range, count: int) -> np.ndarray:
        """Return the keys of `count` directions in each of some local steps, uint64 [steps * count, 2]."""
        return as_keys([direction_key(self.seed, round_, s, device, p) for s in steps for p in range(count)])


class Algorithm(ABC):
    """One method on one replica; the cloud calls all four steps, other ranks `local` and `apply`."""

    name: ClassVar[str]
    summary: ClassVar[str]
    #: The part that is trained unless the job names one, and whether the job's choice counts at all.
    part: ClassVar[str] = "full"
    part_is_fixed: ClassVar[bool] = False
    uses_devices: ClassVar[bool] = True
    #: How a device catches up with the rounds that it missed (methods.md 2.17).
    catch_up: CatchUp = CatchUp.REPLAY_OF_DEVICES
    settings_type: ClassVar[type[Settings]] = Settings
    #: Whether a plan is a guide, which a device needs again for the update.
    keeps_plan: ClassVar[bool] = False
    #: Forwards that a pass over the plan makes at once.
    sides: ClassVar[int] = 2

    def __init__(self, settings: Settings, lab: Lab) -> None:
        self.settings = settings
        self.lab = lab
        self.cloud_loss = float("nan")
        self.replay_ops = 0.0

    @property
    def query_radius(self) -> float:
        """Root mean square over coordinates of the probing step; NaN where nothing is probed."""
        return float("nan")

    def outline_units(self, round_: Round) -> Sequence[Unit]:
        """Return what goes ahead of a plan whose units nobody but the cloud can know; nothing by default."""
        return ()

    def learn(self, outline: Arrays) -> None:  # noqa: B027  (most methods' plans have no outline)
        """Take the outline of the plan that comes next."""

    def plan_units(self, round_: Round) -> Sequence[Unit]:
        """Return what `plan` sends in this exchange, as the outline says; nothing by default."""
        return ()

    def plan(self, round_: Round) -> Arrays:
        """Return what devices need before they compute, and the plan's outline (cloud only)."""
        return {}

    def plan_stages(self, round_: Round) -> Sequence[int]:
        """Return the stage of the model that reads each of the plan's units first; for units that are coded with loss."""
        return [0] * len(self.plan_units(round_))

    def plan_rows(self, round_: Round) -> Mapping[str, np.ndarray]:
        """Return by name which rows of a table (int32) a unit of the plan holds, for units that are not whole tensors."""
        return {}

    def flops_before_plan(self, rows: int, length: int) -> float:
        """Return the FLOPs of a device on a batch before it first reads the plan."""
        return 0.0

    def ahead(self, round_: Round) -> None:  # noqa: B027  (most methods have nothing to do meanwhile)
        """Compute what can be known of later rounds while devices compute; weights are those of `plan` (cloud only)."""

    def plan_sign(self, round_: Round) -> float:
        """Return the random sign that all lossy units of a plan have in common, or 1 (cloud only)."""
        return 1.0

    @abstractmethod
    def upload_units(self, round_: Round, device: int) -> Sequence[Unit]:
        """Return what a device sends."""

    @abstractmethod
    def local(self, round_: Round, device: int, plan: Arrays) -> Upload:
        """Return one device's result; the replica's weights are the same before and after."""

    @abstractmethod
    def reply_units(self, round_: Round) -> Sequence[Unit]:
        """Return what `combine` answers."""

    @abstractmethod
    def combine(self, round_: Round, uploads: Mapping[int, Arrays]) -> Reply:
        """Return the reply to the uploads, which come in device order (cloud only)."""

    @abstractmethod
    def apply(self, round_: Round, plan: Arrays, reply: Arrays) -> None:
        """Bring this replica's weights up to date."""

    def skip(self, round_: Round, plan: Arrays) -> None:  # noqa: B027  (most methods keep nothing)
        """End the round where nobody answered: keep what later rounds need of its plan, drop what was half done."""

    def state(self) -> dict[str, np.ndarray]:
        """Return what must survive a stop besides the weights; nothing by default.

        Every rank gets it back, but for what begins with `CLOUD`.
        """
        return {}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:  # noqa: B027  (most methods keep nothing)
        """Take back what `state` returned."""


class ScalarMethod(Algorithm):
    """A method whose devices send scalars alone, and whose replicas rebuild the step from everybody's."""

    @property
    def query_radius(self) -> float:
        """Epsilon: isotropic directions have entries of mean square 1."""
        return self.lab.epsilon

    @abstractmethod
    def scalars(self, round_: Round) -> int:
        """Return how many scalars one device sends in an exchange."""

    def upload_units(self, round_: Round, device: int) -> Sequence[Unit]:
        """One float32 vector."""
        return (Unit("scalars", (self.scalars(round_),)),)

    def reply_units(self, round_: Round) -> Sequence[Unit]:
        """All sampled devices' vectors, in device order."""
        return (Unit("scalars", (len(round_.devices), self.scalars(round_))),)

    def combine(self, round_: Round, uploads: Mapping[int, Arrays]) -> Reply:
        """Return the scalars as they came."""
        return Reply({"scalars": np.stack([arrays["scalars"] for arrays in uploads.values()])})
