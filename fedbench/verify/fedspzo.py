"""FedSPZO's claims: less device compute than zeroth-order baselines, and what is left of it over block-wise steps alone."""

from __future__ import annotations

from fedbench.base.records import Run
from fedbench.base.stats import mean_sd
from fedbench.verify import race
from fedbench.verify.claims import Claim, Found, Goal, Measured, Untold
from fedbench.verify.tasks import BASELINES, EMBEDDED

_READINGS = ("fedspzo B1", "fedspzo Ac")
_BLOCKWISE, _FROZEN = "block-wise MeZO", "first block frozen"


def compute(found: Found) -> Measured | Untold:
    """Return the device FLOPs to target of the best one-step baseline over those of FedSPZO (estimator B1)."""
    return _against(found, BASELINES)


def over_blockwise(found: Found) -> Measured | Untold:
    """Return the device FLOPs to target of MeZO with block-wise steps over those of FedSPZO (estimator B1)."""
    return _against(found, (_BLOCKWISE,))


def _against(found: Found, others: tuple[str, ...]) -> Measured | Untold:
    results = {name: race.race(found, name, others, _flop) for name in _READINGS}
    first = results[_READINGS[0]]
    if isinstance(first, Untold):
        return first
    detail = list(race.told(found, _READINGS[0], first))
    second = results[_READINGS[1]]
    if not isinstance(second, Untold):
        detail.append(f"With estimator Ac: {race.times(second.ratio)} (against {second.best}).")
    frozen = race.race(found, _FROZEN, others, _flop)
    if not isinstance(frozen, Untold):
        detail.append(f"Block 2 alone, block 1 frozen: {race.times(frozen.ratio)} (against {frozen.best}).")
    alone = race.race(found, _BLOCKWISE, others, _flop) if _BLOCKWISE not in others else Untold("")
    if not isinstance(alone, Untold):
        detail.append(
            f"Block-wise step sizes alone, without a split: {race.times(alone.ratio)} (against {alone.best})."
        )
    for name in (*_READINGS, _BLOCKWISE, _FROZEN):
        ends = [100 * run.summary.final_accuracy for run in found.of(name).values()]
        if ends:
            rounds = max(run.summary.rounds for run in found.of(name).values())
            detail.append(f"{name} ends at {mean_sd(ends).mean:.1f} after at most {rounds} rounds.")
    detail += race.missing(found, (*_READINGS, _BLOCKWISE, _FROZEN, *others))
    return first.ratio._replace(detail=tuple(dict.fromkeys(detail)))


def _flop(run: Run) -> float:
    """Costs are counted in FLOPs."""
    return 1.0


CLAIMS = (
    Claim(
        "fedspzo.compute",
        "2.5 to 7 times less compute than zeroth-order federated methods (later versions of the paper: 1.6 to 3)",
        Goal("at least 2.5 times fewer device FLOPs to the target", 2.5, "times", 1.0),
        (EMBEDDED,),
        (*_READINGS, _BLOCKWISE, _FROZEN, *BASELINES),
        compute,
    ),
    Claim(
        "fedspzo.over_blockwise",
        "nothing; a comparison with block-wise step sizes is missing",
        Goal("fewer device FLOPs than MeZO with one step size for each block", 1.0, "times", 1.0),
        (EMBEDDED,),
        (*_READINGS, _BLOCKWISE, _FROZEN),
        over_blockwise,
    ),
)
