"""What a reader needs in order to trust a report: the settings of each arm, provenance, and the runs behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedbench.base.config import flatten
from fedbench.report import units
from fedbench.report.arms import Arm
from fedbench.report.table import Grid
from fedbench.results.arms import setting, settings_of, varying

_FIRST = ("commit", "dirty", "version", "start", "end", "cpu", "gpu", "host", "mpi", "python", "packages", "versions")
_SHOWN = 3
_METHOD = "method.settings."


def settings_grid(arms: Sequence[Arm]) -> Grid:
    """Return one row per arm: its method's settings, and what else is not the same in all arms."""
    flat = {arm.label: settings_of(arm.runs[0]) for arm in arms}
    others = [key for key in varying(list(flat.values())) if not key.startswith(_METHOD)]
    rows = []
    for label, values in flat.items():
        own = [f"{k.removeprefix(_METHOD)} = {setting(v)}" for k, v in values.items() if k.startswith(_METHOD)]
        rest = [f"{key} = {setting(values.get(key))}" for key in others]
        rows.append((label, ", ".join(own) or units.NOTHING, ", ".join(rest) or units.NOTHING))
    return Grid("Settings", ("arm", "settings of the method", "other settings that differ between arms"), tuple(rows))


def shared_grid(arms: Sequence[Arm]) -> Grid:
    """Return the settings that are the same in all arms."""
    flat = [settings_of(arm.runs[0]) for arm in arms]
    differ = set(varying(flat))
    same = {key: value for key, value in flat[0].items() if key not in differ and not key.startswith(_METHOD)}
    rows = tuple((key, setting(value)) for key, value in same.items())
    return Grid("Settings that all arms share", ("setting", "value"), rows)


def provenance_grid(arms: Sequence[Arm]) -> Grid:
    """Return where the numbers come from, one row per fact; facts that differ between runs list their values."""
    trees = [flatten(run.provenance) for arm in arms for run in arm.runs]
    keys = sorted({key for tree in trees for key in tree}, key=_order)
    return Grid(
        "Provenance", ("fact", "value"), tuple((key, _values([tree.get(key) for tree in trees])) for key in keys)
    )


def runs_grid(arms: Sequence[Arm]) -> Grid:
    """Return one row per run: arm, seed, run id and the hash of its trajectory."""
    rows = [
        (arm.label, str(run.summary.seed), run.summary.run_id, run.summary.trajectory_sha256[:16])
        for arm in arms
        for run in arm.runs
    ]
    return Grid("Runs", ("arm", "seed", "run", "trajectory (first 16 digits)"), tuple(rows))


def _order(key: str) -> tuple[int, str]:
    place = next((i for i, first in enumerate(_FIRST) if key.startswith(first)), len(_FIRST))
    return place, key


def _values(found: Sequence[Any]) -> str:
    texts = sorted({_text(value) for value in found})
    if len(texts) > _SHOWN:
        return f"{texts[0]} ... {texts[-1]} ({len(texts)} values)"
    return ", ".join(texts)


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(_text(item) for item in value) or units.NOTHING
    return setting(value) if value is not None else units.NOTHING
