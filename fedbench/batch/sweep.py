"""Plans a sweep and tells how far it is: from a job, arms and seeds to checked manifest lines, and their states.

Every line is checked when the sweep is made. Nothing is run here, and a run counts as done by its complete file
alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedbench.base import config, fsio
from fedbench.base.config import Setting
from fedbench.base.errors import ConfigError, FedbenchError
from fedbench.batch import arrays, failures, grid, lock, manifest, tasklog
from fedbench.batch.done import DoneRuns
from fedbench.batch.grid import Arm, Factor
from fedbench.batch.manifest import Line, Sweep
from fedbench.batch.scheduler import Queued
from fedbench.results import collect as collection
from fedbench.run.launch import say

if TYPE_CHECKING:  # the state of a sweep is asked often, and what builds a run takes seconds to import
    from fedbench.run.build import Job

#: What a planned run can be, in the order in which it is counted.
STATES = ("done", "running", "queued", "diverged", "failed", "resumable", "missing")


class State(NamedTuple):
    """Where one planned run stands; `reason` is empty unless there is something to say."""

    line: Line
    state: str
    reason: str


def make(
    job_path: Path,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    ranks: int | None,
    out: Path,
    settings: Arm | None = None,
) -> Sweep:
    """Return the sweep of all arms with all seeds, its manifest and a copy of the job file written to `out`.

    `settings` are laid over the job first. An arm maps dotted keys to values or Factors; `method.<setting>` means the
    active method's own. Without seeds and ranks the arms' own hold. ConfigError names what a line can't be made of.
    """
    return save(job_path, out, plan(job_path, arms, seeds, ranks, settings or {}))


def save(job_path: Path, out: Path, lines: Sequence[Line]) -> Sweep:
    """Write planned lines to `out` as its manifest, beside a copy of the job file for people; see `make`."""
    swept = manifest.write(out, lines)
    fsio.write_bytes(out / f"job{job_path.suffix}", job_path.read_bytes())
    return swept


def plan(
    job_path: Path, arms: Sequence[Arm], seeds: Sequence[int], ranks: int | None, settings: Arm
) -> tuple[Line, ...]:
    """Return the checked lines, arm by arm and seed by seed; a run that two combinations name stands there once."""
    base = config.read(job_path)
    lines: dict[str, Line] = {}
    for arm in arms:
        for seed in seeds or (None,):
            last = {key: value for key, value in (("run.seed", seed), ("run.ranks", ranks)) if value is not None}
            twice = next((key for key in last if key in arm), None)
            if twice is not None:
                raise ConfigError(
                    f"{twice}: varied twice, by the arms and by {'--seeds' if seed is not None else '-n'}."
                )
            job, overrides = _job(base, settings, {**arm, **last}, str(job_path))
            line = Line(len(lines), job.run_id, overrides, job.tree)
            if line.job(str(job_path)) and job.run_id not in lines:
                lines[job.run_id] = line
    return tuple(lines.values())


def states(sweep: Sweep, *, fresh: bool = False) -> list[State]:
    """Return the state of every planned run, in line order; `fresh`: every run file is looked at in full."""
    look = _Look(sweep, fresh=fresh)
    return [look.state(line) for line in sweep.lines]


def to_run(sweep: Sweep, *, retry: bool = False) -> list[Line]:
    """Return the lines that are neither done nor under way; those that diverged are left out unless `retry`."""
    settled = {"done", "running", "queued"} | (set() if retry else {"diverged"})
    return [at.line for at in states(sweep, fresh=True) if at.state not in settled]


def run_files(sweep: Sweep) -> dict[str, Path]:
    """Return run_id -> run file of the lines that have one, whatever is in it."""
    return {line.run_id: path for line in sweep.lines if (path := sweep.run_file(line)).exists()}


def collect(sweep: Sweep) -> Path:
    """Bring the sweep's finished runs together in `all.h5` and return its path."""
    path = sweep.folder / collection.NAME
    collection.collect(path, run_files(sweep))
    return path


def status(sweep: Sweep) -> dict[str, Any]:
    """Return the counts by state and one entry per run, as a tree that JSON can hold."""
    found = states(sweep)
    counts = {state: sum(at.state == state for at in found) for state in STATES}
    runs = [
        {
            "line": at.line.number,
            "run_id": at.line.run_id,
            "method": at.line.method,
            "seed": at.line.seed,
            "state": at.state,
            "reason": at.reason,
        }
        for at in found
    ]
    return {"planned": len(found), **counts, "runs": runs}


def _told_queue(sweep: Sweep) -> dict[int, Queued]:
    """Return Slurm's queue for people: where it can't be read they are told, and see what the files say."""
    try:
        return arrays.in_queue(sweep)
    except FedbenchError as error:
        say(f"what waits or runs in Slurm is not known: {error}")
        return {}


class _Look:
    """One look at a sweep: Slurm's queue, the leases that are held, how runs ended that are not done, and the run files.

    The files are looked at last: a run that ends between two looks is then told as done, never as lost.
    """

    def __init__(self, sweep: Sweep, *, fresh: bool) -> None:
        self._sweep = sweep
        self._queue = arrays.in_queue(sweep) if fresh else _told_queue(sweep)
        self._alive = lock.running(sweep.folder)
        self._failures = failures.read(sweep.folder)
        self._logs = tasklog.newest(sweep.folder)
        ckpt = sweep.folder / "ckpt"
        self._checkpoints = {path.parent.name for path in ckpt.glob("*/LATEST")} if ckpt.is_dir() else set()
        self._done = DoneRuns(sweep, fresh=fresh)

    def state(self, line: Line) -> State:
        """Return where a run stands; what holds now is asked before what a failure or a log tells of the past."""
        if line.run_id in self._done.runs:
            return State(line, "done", "")
        if line.run_id in self._alive:
            return State(line, "running", "")
        queued = self._queue.get(line.number)
        if queued is not None:
            return State(line, "queued" if queued.waits else "running", queued.why)
        resumable = line.run_id in self._checkpoints
        damaged = self._done.reasons.get(line.run_id, "")
        kind, reason = ("", damaged) if damaged else self._past(line)  # an attempt since would have put the file aside
        if kind in (failures.DIVERGED, failures.FAILED):
            return State(line, kind, reason + (" (a checkpoint exists)" if resumable else ""))
        return State(line, "resumable" if resumable else "missing", reason)

    def _past(self, line: Line) -> tuple[str, str]:
        """Return how the newest attempt of a run that is not done ended, and why: by its Slurm log or a local submit."""
        log, failure = self._logs.get(line.number), self._failures.get(line.run_id)
        ended = tasklog.end(log) if log is not None else None
        if ended is not None and (failure is None or ended.at > failure.at):
            if ended.state == "done":
                return failures.FAILED, "its task saw it done, its run file is gone or has changed since"
            return ended.state, ended.reason
        return (failure.kind, failure.reason) if failure is not None else ("", "")


def _job(base: Mapping[str, Any], settings: Arm, arm: Arm, source: str) -> tuple[Job, dict[str, Any]]:
    """Return the checked job of one combination, and the values laid over the job file by full key."""
    from fedbench.run.build import resolve

    said = f"{source} with {grid.told(arm)}" if arm else source
    tree: dict[str, Any] = copy.deepcopy(dict(base))
    laid: dict[str, Any] = {}

    def lay(values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            config.put(tree, Setting(tuple(key.split(".")), value), said)
            laid[key] = value

    name = {**settings, **arm}.get("method.name")
    if name is not None:
        lay({"method.name": name})
    method = tree.get("method")
    active = method.get("name") if isinstance(method, dict) else None
    first, own = (
        {_full(key, active): value for key, value in part.items() if key != "method.name"} for part in (settings, arm)
    )
    factors = {key: value for key, value in own.items() if isinstance(value, Factor)}
    lay(first | {key: value for key, value in own.items() if key not in factors})
    job = resolve(config.check(tree, source=said), said)
    if factors:
        known = config.flatten(manifest.as_job_file(job.tree))
        lay({key: _multiple(key, factor, known.get(key), said) for key, factor in factors.items()})
        job = resolve(config.check(tree, source=said), said)
    return job, laid


def _full(key: str, active: Any) -> str:
    """Return the key with `method.<setting>` led into the active method's table."""
    from fedbench.run.build import METHODS

    head, _, rest = key.partition(".")
    inner = rest.partition(".")[0]
    if head != "method" or not rest or inner == "name" or inner in METHODS or not isinstance(active, str):
        return key
    return f"method.{active}.{rest}"


def _multiple(key: str, factor: Factor, value: Any, said: str) -> float | int:
    """Return `value` times the factor, rounded to 2 significant digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(
            f"{key}: found {factor}; only a number can be multiplied, the job has "
            f"{'no such key' if value is None else repr(value)}. (From {said})"
        )
    product = float(f"{value * factor.by:.2g}")
    return round(product) if isinstance(value, int) else product
