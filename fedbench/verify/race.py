"""An arm against all baselines at once: which is the best one, and by how much it is beaten; words for both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from fedbench.base.records import Run
from fedbench.verify import paired
from fedbench.verify.claims import Found, Measured, Untold
from fedbench.verify.paired import Cost


class Race(NamedTuple):
    """The best baseline, the ratio to it, and the ratio to each baseline that has a run."""

    best: str
    ratio: Measured
    each: Mapping[str, Measured]


def race(found: Found, ours: str, others: Sequence[str], unit: Callable[[Run], float]) -> Race | Untold:
    """Return how much more the fastest of `others` spends to the target than `ours` does, seed by seed.

    `unit` returns the FLOPs that costs are counted in from a run of `ours`.
    """
    runs = found.of(ours)
    if not runs:
        return found.without(ours)
    units = {seed: unit(run) for seed, run in runs.items()}
    usual = sum(units.values()) / len(units)
    lost = found.lost.get(ours, {})
    mine = {seed: paired.to_target(run, units[seed]) for seed, run in runs.items()}
    mine |= {seed: Cost(0.0, reached=False) for seed in lost}
    costs = {
        name: {seed: paired.to_target(run, units.get(seed, usual)) for seed, run in found.of(name).items()}
        for name in others
        if found.of(name)
    }
    if not costs:
        return Untold(f"no baseline has a run on {found.task.name}")
    best = paired.fastest(costs, sorted(mine))
    each = {name: ratio for name, own in costs.items() if (ratio := paired.ratios(mine, own)) is not None}
    if best not in each:
        return Untold(f"neither {ours} nor {best} reached the target on a seed that both have")
    return Race(best, each[best], each)


def told(found: Found, ours: str, run: Race) -> tuple[str, ...]:
    """Return sentences on the best baseline, on each of the others, and on how often our arm reached the target."""
    each = ", ".join(f"{name} {times(value)}" for name, value in sorted(run.each.items(), key=lambda at: at[1].value))
    reached = sum(own.summary.rounds_to_target is not None for own in found.of(ours).values())
    planned = len(found.of(ours)) + len(found.lost.get(ours, {}))
    ratios = sorted(run.each.values(), key=lambda value: value.value)
    spread = f"{times(ratios[0])} to {times(ratios[-1])}" if ratios[0].value < ratios[-1].value else ""
    return (
        f"Best baseline: {run.best}. {ours} against each: {each}.",
        *([f"It depends on the baseline and its tuning ([tuning.md](tuning.md)): {spread}."] if spread else []),
        f"{ours} reached the target on {reached} of {planned} seeds.",
        f"The target is looked for {_looked(found, ours)} of {ours} and {_looked(found, run.best)} of {run.best}.",
    )


def _looked(found: Found, arm: str) -> str:
    run = next(iter(found.of(arm).values())).config["run"]
    first = f"after each of the first {run['eval_first']} rounds and then " if run["eval_first"] else ""
    return f"{first}every {run['eval_every']} round(s)"


def missing(found: Found, arms: Iterable[str]) -> tuple[str, ...]:
    """Return a sentence for each of the arms that has lost seeds, or runs that could not be made."""
    told = []
    for arm in arms:
        seeds = found.lost.get(arm, {})
        if seeds:
            told.append(f"{arm} diverged on {len(seeds)} seed(s): {', '.join(map(str, seeds))}.")
        if arm in found.absent:
            told.append(sentence(f"{arm}: {found.absent[arm]}"))
    return tuple(told)


def sentence(text: str) -> str:
    """Return a text with one full stop at its end."""
    return text.rstrip(".") + "."


def times(value: Measured) -> str:
    """Return a ratio as text; `>` marks a lower bound."""
    return f"{'> ' if value.bound else ''}{value.value:.3g}x"
