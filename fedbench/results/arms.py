"""Names arms: runs that differ by their seed alone have one name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fedbench.base.config import as_tree, flatten
from fedbench.base.job import OUTSIDE_HASH, Config
from fedbench.base.records import Run

_SEED, _NAME = "run.seed", "method.name"
_QUIET = ("run.eval_every", "run.eval_first", "run.rounds")


class Name(NamedTuple):
    """What a run's arm is called, and the settings that set it apart from other arms of its method."""

    label: str
    settings: dict[str, Any]


def names(runs: Sequence[Run]) -> dict[str, Name]:
    """Return the arm of each run_id: its method, and the settings that differ between that method's runs.

    A text or switch at its default is left out of the label, since it says nothing; how long and how often a run looked
    tells arms apart only where nothing else does.
    """
    defaults = flatten(as_tree(Config(method={})))
    named = {}
    for method in {run.summary.method for run in runs}:
        own = {run.summary.run_id: (run.summary.seed, settings_of(run)) for run in runs if run.summary.method == method}
        varied = varying([tree for _, tree in own.values()])
        loud = [key for key in varied if key not in _QUIET]
        if len({(seed, *(str(tree.get(key)) for key in loud)) for seed, tree in own.values()}) == len(own):
            varied = loud
        for run_id, (_, tree) in own.items():
            values = {key: tree.get(key) for key in varied}
            told = _told(values, defaults)
            named[run_id] = Name(f"{method} ({told})" if told else method, values)
    return named


def varying(trees: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the sorted keys whose values are not the same in all flat trees."""
    keys = sorted({key for tree in trees for key in tree})
    return [key for key in keys if any(tree.get(key) != trees[0].get(key) for tree in trees)]


def settings_of(run: Run) -> dict[str, Any]:
    """Return the flat settings of a run, seed and keys without effect apart."""
    return {k: v for k, v in flatten(run.config).items() if k not in OUTSIDE_HASH and k not in (_SEED, _NAME)}


def setting(value: object) -> str:
    """Return a value of the job file as one reads it there."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return "unset" if value is None else str(value)


def _told(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Return settings as `name = value`, by their last word where it says which."""
    last = [key.rpartition(".")[2] for key in values]
    parts = []
    for key, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number or key not in defaults or defaults[key] != value:
            name = key.rpartition(".")[2]
            parts.append(f"{name if last.count(name) == 1 else key} = {setting(value)}")
    return ", ".join(parts)
