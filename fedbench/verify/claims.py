"""What a published claim is, and the rule that makes a verdict of a measured value. Nothing is run or read here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from fedbench.base.records import Run
from fedbench.verify.tasks import Shape, Task

Unit = Literal["points", "%", "times"]

REPRODUCED, PARTLY, NOT_REPRODUCED, UNTESTED = "reproduced", "partly", "not reproduced", "can't be tested here"

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Goal:
    """What a measured value has to reach: `value`, at least (or at most); `neutral` is what no effect would measure."""

    words: str
    value: float
    unit: Unit
    neutral: float
    least: bool = True


class Measured(NamedTuple):
    """A value with its interval; `bound`: it is a lower bound. `detail` are sentences on what it depends on."""

    value: float
    low: float
    high: float
    bound: bool = False
    detail: tuple[str, ...] = ()


class Untold(NamedTuple):
    """Why no value could be measured."""

    why: str


@dataclass(frozen=True)
class Found:
    """What was run of a task.

    `runs` maps an arm to the run of each seed; `lost` to the seeds that diverged, with the reason; `absent` maps an
    arm that has neither to the reason. The three hold every arm that was asked for.
    """

    task: Task
    runs: Mapping[str, Mapping[int, Run]]
    lost: Mapping[str, Mapping[int, str]]
    absent: Mapping[str, str]

    def of(self, arm: str) -> Mapping[int, Run]:
        """Return the arm's runs by seed; none where it has none."""
        return self.runs.get(arm, {})

    def without(self, arm: str) -> Untold:
        """Return the reason why an arm has no run."""
        lost = self.lost.get(arm, {})
        why = self.absent.get(arm, "") or "; ".join(f"seed {seed} diverged" for seed in lost)
        return Untold(f"{arm} has no run on {self.task.name}" + (f": {why}" if why else ""))


#: What a memory claim is measured from: arm of the bench -> peak bytes of each repetition.
Peaks = Mapping[str, list[float]]


@dataclass(frozen=True)
class Claim:
    """A claim, what was published, and how it is measured.

    On each of `tasks` the runs of `arms` (names of the task's arms) are measured by `measure`. On each of `shapes`
    memory is measured by `weigh`. A claim with `why` is not tested.
    """

    name: str
    published: str
    goal: Goal | None = None
    tasks: tuple[Task, ...] = ()
    arms: tuple[str, ...] = ()
    measure: Callable[[Found], Measured | Untold] | None = None
    shapes: tuple[Shape, ...] = ()
    weigh: Callable[[Peaks], Mapping[str, Measured]] | None = None
    why: str = ""


class Row(NamedTuple):
    """One line of the result: a claim on a task."""

    claim: Claim
    task: str
    measured: Measured | None
    verdict: str
    why: str = ""

    def tree(self) -> dict[str, Any]:
        """Return the row as `--json` prints it."""
        value = self.measured
        return {
            "claim": self.claim.name,
            "task": self.task,
            "measured": None if value is None else value.value,
            "low": None if value is None else value.low,
            "high": None if value is None else value.high,
            "goal": None if self.claim.goal is None else self.claim.goal.value,
            "verdict": self.verdict,
            "bound": value is not None and value.bound,
        }


def judge(claim: Claim, task: str, found: Measured | Untold) -> Row:
    """Return the row of a claim on a task.

    Reproduced: the value reaches the goal and its whole interval lies on the goal's side of `neutral`. Partly: the value
    alone lies on that side. A lower bound below the goal can't say that a claim is not reproduced.
    """
    if isinstance(found, Untold):
        return Row(claim, task, None, UNTESTED, found.why)
    goal = claim.goal
    assert goal is not None
    sign = 1.0 if goal.least else -1.0
    worst = found.low if goal.least else found.high
    beyond = sign * (found.value - goal.value)
    reached = beyond > _ROUNDING if goal.value == goal.neutral else beyond >= -_ROUNDING
    if reached and sign * (worst - goal.neutral) > _ROUNDING:
        return Row(claim, task, found, REPRODUCED)
    if sign * (found.value - goal.neutral) > _ROUNDING:
        return Row(claim, task, found, PARTLY)
    if found.bound:
        return Row(claim, task, found, UNTESTED, "the runs are too short to tell: a lower bound below no effect at all")
    return Row(claim, task, found, NOT_REPRODUCED)
