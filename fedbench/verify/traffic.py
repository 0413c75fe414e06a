"""Claims on traffic, from the counted payload of one device: DeComFL's in all, FedKSeed's in a round."""

from __future__ import annotations

from fedbench.base import stats
from fedbench.base.records import Run
from fedbench.report.units import quantity
from fedbench.verify import race
from fedbench.verify.claims import Claim, Found, Goal, Measured, Untold
from fedbench.verify.tasks import EMBEDDED

_DECOMFL_BYTES = 1e6
_FEDKSEED_BYTES = 18e3
_REFERENCE = "fedavg"


def decomfl(found: Found) -> Measured | Untold:
    """Return DeComFL's bytes of a device in all its rounds over 1 MB."""
    return _over(found, "decomfl", _DECOMFL_BYTES, total=True)


def fedkseed(found: Found) -> Measured | Untold:
    """Return FedKSeed's bytes of a device in the round that moves most over 18 kB."""
    return _over(found, "fedkseed", _FEDKSEED_BYTES, total=False)


def _over(found: Found, arm: str, published: float, *, total: bool) -> Measured | Untold:
    runs = found.of(arm)
    if not runs:
        return found.without(arm)
    sizes = [_bytes(run, total=total) / published for run in runs.values()]
    detail = [_told(arm, next(iter(runs.values())))]
    if found.of(_REFERENCE):
        detail.append(_told(_REFERENCE, next(iter(found.of(_REFERENCE).values()))))
    detail.append(f"No size of a model enters the bytes of {arm}, so the ones counted here are those of any model.")
    middle = stats.median(sizes)
    return Measured(middle.value, min(sizes), max(sizes), detail=(*detail, *race.missing(found, (arm, _REFERENCE))))


def _bytes(run: Run, *, total: bool) -> float:
    both = run.rounds["uplink_bytes"] + run.rounds["downlink_bytes"]
    return float(both.sum() if total else both.max())


def _told(arm: str, run: Run) -> str:
    rounds = run.summary.rounds
    up, down = (quantity(float(run.rounds[name].sum()) / rounds, "B") for name in ("uplink_bytes", "downlink_bytes"))
    return (
        f"{arm}: {up} up and {down} down a round (at most {quantity(_bytes(run, total=False), 'B')}), "
        f"{quantity(_bytes(run, total=True), 'B')} in {rounds} rounds."
    )


CLAIMS = (
    Claim(
        "decomfl.traffic",
        "about 1 MB in all for a device, a constant amount a round, to fine-tune models of billions of parameters",
        Goal("at most 1 MB in all rounds (as a ratio to it)", 1.0, "times", 1.0, least=False),
        (EMBEDDED,),
        ("decomfl", _REFERENCE),
        decomfl,
    ),
    Claim(
        "fedkseed.traffic",
        "less than 18 kB a round with all parameters trained",
        Goal("less than 18 kB in any round (as a ratio to it)", 1.0, "times", 1.0, least=False),
        (EMBEDDED,),
        ("fedkseed", _REFERENCE),
        fedkseed,
    ),
)
