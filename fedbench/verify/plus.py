"""Claims of cooperllm_plus: above public-only, above CooperLLM and above plain zeroth-order, whatever the budget."""

from __future__ import annotations

from collections.abc import Sequence

from fedbench.verify import paired, race
from fedbench.verify.claims import Claim, Found, Goal, Measured, Untold
from fedbench.verify.tasks import ABLATION, BEST_BASELINES, BUDGETS, EMBEDDED, POOR, SST2, TREC

_OURS, _UNIT = "cooperllm_plus", "cooperllm"
_TASKS = (EMBEDDED, POOR, TREC, SST2)


def over_public_only(found: Found) -> Measured | Untold:
    """Return the smallest mean difference to public-only training over all budgets, in points."""
    return _smallest(found, ("public_only",))


def over_cooperllm(found: Found) -> Measured | Untold:
    """Return the smallest mean difference to CooperLLM over all budgets, in points."""
    return _smallest(found, (_UNIT,))


def over_zo(found: Found) -> Measured | Untold:
    """Return the smallest mean difference to the best of three plain baselines at each budget, in points."""
    return _smallest(found, BEST_BASELINES)


def _smallest(found: Found, others: Sequence[str]) -> Measured | Untold:
    """Return the smallest over budgets of the mean paired difference to the arm that is best at that budget."""
    for needed in (_OURS, _UNIT):
        if not found.of(needed):
            return found.without(needed)
    known = [name for name in others if found.of(name)]
    if not known:
        return found.without(others[0]) if len(others) == 1 else Untold(f"no baseline has a run on {found.task.name}")
    closest: dict[int, tuple[str, Measured]] = {}
    for budget in BUDGETS:
        ours = paired.within(found, _UNIT, _OURS, budget)
        each = {
            name: value
            for name in known
            if (value := paired.differences(ours, paired.within(found, _UNIT, name, budget))) is not None
        }
        if each:
            name = min(each, key=lambda one: each[one].value)
            closest[budget] = name, each[name]
    if not closest:
        return Untold(f"no budget was spent by both sides on {found.task.name}")
    least = min(closest, key=lambda budget: closest[budget][1].value)
    told = ", ".join(f"{budget}: {value.value:+.1f} ({name})" for budget, (name, value) in closest.items())
    return closest[least][1]._replace(
        detail=(
            f"Points by budget in CooperLLM's rounds: {told}; the smallest counts.",
            *race.missing(found, dict.fromkeys((_OURS, _UNIT, *others))),
        )
    )


CLAIMS = (
    Claim(
        "plus.over_public_only",
        "nothing; cooperllm_plus is fedbench's own",
        Goal("at least 5 points above public-only training at every budget", 5.0, "points", 0.0),
        _TASKS,
        (_OURS, _UNIT, "public_only"),
        over_public_only,
    ),
    Claim(
        "plus.over_cooperllm",
        "nothing; cooperllm_plus is fedbench's own",
        Goal("above CooperLLM at every budget", 0.0, "points", 0.0),
        _TASKS,
        (_OURS, _UNIT, "fedspzo", "fedspzo B1", *(arm.name for arm in ABLATION)),
        over_cooperllm,
    ),
    Claim(
        "plus.over_zo",
        "nothing; cooperllm_plus is fedbench's own",
        Goal("above the best plain zeroth-order baseline at every budget", 0.0, "points", 0.0),
        _TASKS,
        (_OURS, _UNIT, *BEST_BASELINES),
        over_zo,
    ),
)
