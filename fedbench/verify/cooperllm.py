"""CooperLLM's claims: fewer rounds and a better accuracy than zeroth-order baselines, and what public rows alone reach."""

from __future__ import annotations

from collections.abc import Mapping

from fedbench.base.records import Run
from fedbench.base.stats import mean_sd
from fedbench.report import compare
from fedbench.report.arms import Arm
from fedbench.verify import paired, race
from fedbench.verify.claims import Claim, Found, Goal, Measured, Untold
from fedbench.verify.tasks import BASELINES, EMBEDDED, OTHERS, POOR, SST2, TREC

_OURS, _CONTROL = "cooperllm", "public_only"
_SHUFFLED, _WARM = "shuffled labels", "fedavg from public"
_TASKS = (EMBEDDED, POOR, TREC, SST2)


def convergence(found: Found) -> Measured | Untold:
    """Return the best baseline's rounds to target over CooperLLM's, rounds counted at CooperLLM's device FLOPs a round."""
    result = race.race(found, _OURS, BASELINES, paired.flops_per_round)
    if isinstance(result, Untold):
        return result
    return result.ratio._replace(detail=(*race.told(found, _OURS, result), *race.missing(found, (_OURS, *BASELINES))))


def accuracy(found: Found) -> Measured | Untold:
    """Return by how many points CooperLLM, where it has converged, is above the best baseline at its device FLOPs."""
    ours = found.of(_OURS)
    if not ours:
        return found.without(_OURS)
    each: dict[str, Measured] = {}
    early, ends = [], []
    for name in BASELINES:
        pairs = compare.pairs_of(_arm(_OURS, ours), _arm(name, found.of(name))) if found.of(name) else []
        ends += [pair.converged + 1 for pair in pairs if pair.converged is not None]
        points = {pair.seed: pair.points / 100 for pair in pairs if pair.points is not None}
        value = paired.differences(points, dict.fromkeys(points, 0.0))
        if value is not None:
            each[name] = value
        elif pairs:
            early.append(name)
    if not ends:
        return Untold(f"{_OURS} has not converged within its rounds on {found.task.name}, or no baseline shares a seed")
    if not each:
        return Untold(f"all baselines ended before {_OURS} had converged on {found.task.name}")
    best = min(each, key=lambda name: each[name].value)
    told = ", ".join(f"{name} {each[name].value:+.1f}" for name in sorted(each, key=lambda name: each[name].value))
    return each[best]._replace(
        detail=(
            f"Best baseline: {best}. Points above each: {told}.",
            f"CooperLLM had converged after {min(ends)} to {max(ends)} rounds.",
            *(f"{name} ended before that point." for name in early),
            *race.missing(found, (_OURS, *BASELINES)),
        )
    )


def over_public_only(found: Found) -> Measured | Untold:
    """Return by how many points CooperLLM is above public-only training at equal rounds, each at its best on dev."""
    return above_control(found, _OURS)


def above_control(found: Found, arm: str) -> Measured | Untold:
    """Return an arm's test accuracy at its best evaluation on dev minus public-only's, in points, at equal rounds."""
    ours, control = found.of(arm), found.of(_CONTROL)
    if not ours or not control:
        return found.without(_CONTROL if ours else arm)
    rounds = min(run.summary.rounds for side in (ours, control) for run in side.values())
    best = {name: _best(found.of(name), rounds) for name in (arm, _CONTROL)}
    value = paired.differences(best[arm], best[_CONTROL])
    if value is None:
        return Untold(f"{arm} and {_CONTROL} share no seed on {found.task.name}")
    final = paired.differences(_last(ours), _last(control))
    assert final is not None
    detail = [f"Over {rounds} rounds each; at the last round {final.value:+.1f} points."]
    for name, tree in (*best.items(), *((other, _best(found.of(other), rounds)) for other in (_SHUFFLED, _WARM))):
        if tree:
            detail.append(f"{name}: {100 * mean_sd(list(tree.values())).mean:.1f} at its best on dev.")
    return value._replace(detail=(*detail, *race.missing(found, (arm, _CONTROL, _SHUFFLED, _WARM))))


def _best(runs: Mapping[int, Run], rounds: int) -> dict[int, float]:
    return {seed: paired.best_on_dev(run, rounds) for seed, run in runs.items()}


def _last(runs: Mapping[int, Run]) -> dict[int, float]:
    return {seed: run.summary.final_accuracy for seed, run in runs.items()}


def _arm(name: str, runs: Mapping[int, Run]) -> Arm:
    return Arm(name, name, {}, tuple(runs.values()))


CLAIMS = (
    Claim(
        "cooperllm.convergence",
        "8.8 times faster convergence than the best zeroth-order baselines",
        Goal("at least 8.8 times fewer rounds to the target", 8.8, "times", 1.0),
        _TASKS,
        (_OURS, *BASELINES),
        convergence,
    ),
    Claim(
        "cooperllm.accuracy",
        "up to 10 points more accuracy than zeroth-order baselines",
        Goal("at least 10 points at equal device FLOPs", 10.0, "points", 0.0),
        _TASKS,
        (_OURS, *BASELINES),
        accuracy,
    ),
    Claim(
        "cooperllm.over_public_only",
        "nothing; a comparison with training on the public rows alone is missing",
        Goal("above public-only training at equal rounds", 0.0, "points", 0.0),
        _TASKS,
        (_OURS, _CONTROL, _SHUFFLED, _WARM, *OTHERS),
        over_public_only,
    ),
)
