"""What more ranks bring: arms that differ by `run.ranks` alone, the same seeds on the fewest and on more ranks."""

from __future__ import annotations

from collections.abc import Sequence

from fedbench.base import stats
from fedbench.base.config import flatten
from fedbench.report import units
from fedbench.report.arms import Arm
from fedbench.report.table import Grid
from fedbench.results.arms import settings_of

_RANKS = "run.ranks"


def speedup_grid(arms: Sequence[Arm]) -> Grid | None:
    """Return one row per arm of a family of several rank counts; None where no arms are such a family."""
    families: dict[str, list[Arm]] = {}
    for arm in arms:
        settings = {key: value for key, value in settings_of(arm.runs[0]).items() if key != _RANKS}
        families.setdefault(f"{arm.method} {sorted(settings.items(), key=str)}", []).append(arm)
    rows = [row for family in families.values() if len(family) > 1 for row in _rows(family)]
    if not rows:
        return None
    headings = ("arm", "ranks", "pairs", "median round", "speed-up", "efficiency", "cores")
    note = (
        "Round time on the fewest ranks over that on more, same seed against same seed: median, with its 95 % interval "
        "from 6 pairs on. Efficiency is the speed-up over the ratio of ranks; rank 0 is the cloud, which hosts no devices "
        "where there are others. *: more ranks times threads than the host has cores."
    )
    return Grid("Speed-up over ranks", headings, tuple(rows), note)


def _rows(family: Sequence[Arm]) -> list[tuple[str, ...]]:
    ordered = sorted(family, key=_ranks)
    first = ordered[0]
    rows: list[tuple[str, ...]] = []
    for arm in ordered:
        seeds = sorted(arm.by_seed.keys() & first.by_seed.keys())
        if not seeds:
            continue
        ratios = [first.by_seed[s].summary.round_s_median / arm.by_seed[s].summary.round_s_median for s in seeds]
        middle, ranks = stats.median(ratios), _ranks(arm)
        spread = "" if middle.low is None else f" [{middle.low:.2f}, {middle.high:.2f}]"
        seconds = stats.median([run.summary.round_s_median for run in arm.runs]).value
        cores = min((run.provenance.get("cores") or 0 for run in arm.runs), default=0)
        threads = int(flatten(arm.runs[0].config)["run.threads"])
        over = " *" if cores and ranks * threads > cores else ""
        efficiency = middle.value * _ranks(first) / ranks
        speed = (units.quantity(seconds, "s"), f"{middle.value:.2f}{spread}", f"{efficiency:.2f}")
        rows.append((arm.label, f"{ranks}{over}", str(len(seeds)), *speed, str(cores) if cores else units.NOTHING))
    return rows


def _ranks(arm: Arm) -> int:
    return arm.runs[0].summary.ranks
