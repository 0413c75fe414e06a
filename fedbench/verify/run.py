"""Makes the runs that claims need, each once however many claims share it, and reads them back.

Each job has a sweep of its own, `FOLDER/JOB`; what is done there is not run again. Nothing is measured or judged here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedbench.base.errors import EXIT_USER, ConfigError, FedbenchError
from fedbench.base.records import Run
from fedbench.batch import failures, local, lock, manifest, sweep
from fedbench.batch.manifest import Line, Sweep
from fedbench.results import reader
from fedbench.run.build import construct
from fedbench.verify.claims import Claim, Found
from fedbench.verify.tasks import Scale, Task


@dataclass(frozen=True)
class Plan:
    """The runs of one task: `lines` maps the arms that are wanted to their lines."""

    task: Task
    sweep: Sweep
    lines: Mapping[str, tuple[Line, ...]]

    @property
    def wanted(self) -> Sweep:
        """The sweep with the wanted lines alone; their numbers are still those of its manifest."""
        numbers = {line.number for lines in self.lines.values() for line in lines}
        return Sweep(self.sweep.folder, tuple(line for line in self.sweep.lines if line.number in numbers))


def plans(claims: Sequence[Claim], folder: Path, *, quick: bool) -> list[Plan]:
    """Return one checked plan for each task that a claim is tested on at this scale; nothing is written."""
    wanted: dict[str, set[str]] = {}
    tasks = {task.name: task for claim in claims for task in claim.tasks}
    for claim in claims:
        for task in claim.tasks:
            wanted.setdefault(task.name, set()).update(claim.arms)
    return [
        _plan(task, scale, wanted[name], folder)
        for name, task in tasks.items()
        if (scale := task.scale(quick=quick)) is not None
    ]


def save(plan: Plan) -> None:
    """Write the plan's manifest; one that is there and differs (another job file) gives way, its runs stay."""
    path = plan.sweep.folder / manifest.NAME
    text = "".join(f"{line.text()}\n" for line in plan.sweep.lines)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        with lock.held(plan.sweep.folder):
            path.unlink()
    sweep.save(plan.task.path, plan.sweep.folder, plan.sweep.lines)


def unfit(plan: Plan) -> str:
    """Return why this machine can't make the runs of a plan (no such data or model), or an empty string."""
    todo = sweep.to_run(plan.wanted)
    try:
        if todo:
            construct(todo[0].job())
    except FedbenchError as error:
        if error.exit_code != EXIT_USER:
            raise
        return str(error)
    return ""


def make(plan: Plan, parallel: int | None, progress: local.Progress | None) -> local.Results:
    """Run what is not done of what is wanted."""
    return local.run_local(plan.wanted, parallel, progress)


def read(plan: Plan, unfit: str) -> Found:
    """Return the runs of the wanted arms, the seeds that diverged, and why other arms have none."""
    why = failures.read(plan.sweep.folder)
    runs: dict[str, dict[int, Run]] = {}
    lost: dict[str, dict[int, str]] = {}
    absent: dict[str, str] = {}
    for arm, lines in plan.lines.items():
        for line in lines:
            path = plan.sweep.run_file(line)
            if reader.is_done(path, line.run_id):
                runs.setdefault(arm, {})[line.seed] = reader.read(path)
                continue
            failure = why.get(line.run_id)
            if failure is not None and failure.kind == failures.DIVERGED:
                lost.setdefault(arm, {})[line.seed] = failure.reason
            else:
                told = f"failed: {failure.reason}" if failure else "was not run"
                absent[arm] = unfit or f"seed {line.seed} {told}"
    return Found(plan.task, runs, lost, absent)


def _plan(task: Task, scale: Scale, wanted: set[str], folder: Path) -> Plan:
    if not task.path.exists():
        raise ConfigError(f"{task.path}: no such job file; claims are verified in a checkout of fedbench.")
    arms = task.arms_at(scale)
    lines = sweep.plan(task.path, [scale.settings(arm) for arm in arms], scale.seeds, None, {})
    if len(lines) != len(arms) * len(scale.seeds):
        raise ConfigError(f"{task.path}: two arms of {task.name} are the same run; each arm must differ.")
    width = len(scale.seeds)
    by_arm = {arm.name: lines[i * width : (i + 1) * width] for i, arm in enumerate(arms)}
    return Plan(task, Sweep(folder / task.job, lines), {name: own for name, own in by_arm.items() if name in wanted})
