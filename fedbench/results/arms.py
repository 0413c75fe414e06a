"""Names arms: runs that differ by their seed alone have one name, the same that a report gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedbench.base.config import as_tree, flatten
from fedbench.base.job import OUTSIDE_HASH, Config
from fedbench.base.records import Run

_SEED, _NAME = "run.seed", "method.name"
_QUIET = ("run.eval_every", "run.eval_first", "run.rounds")


def names(runs: Sequence[Run]) -> dict[str, str]:
    """Return the arm of each run_id: its method, and the settings that differ between that method's runs.

    A text or switch at its default is left out, and so is how long and how often a run looked, unless nothing else differs.
    """
    defaults = flatten(as_tree(Config(method={})))
    named = {}
    for method in {run.summary.method for run in runs}:
        own = {run.summary.run_id: (run.summary.seed, _settings(run)) for run in runs if run.summary.method == method}
        trees = [tree for _, tree in own.values()]
        keys = sorted({key for tree in trees for key in tree})
        varied = [key for key in keys if any(tree.get(key) != trees[0].get(key) for tree in trees)]
        loud = [key for key in varied if key not in _QUIET]
        if len({(seed, *(str(tree.get(key)) for key in loud)) for seed, tree in own.values()}) == len(own):
            varied = loud
        for run_id, (_, tree) in own.items():
            told = _told({key: tree.get(key) for key in varied}, defaults)
            named[run_id] = f"{method} ({told})" if told else method
    return named


def _settings(run: Run) -> dict[str, Any]:
    return {k: v for k, v in flatten(run.config).items() if k not in OUTSIDE_HASH and k not in (_SEED, _NAME)}


def _told(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Return settings as `name = value`, by their last word where it says which."""
    last = [key.rpartition(".")[2] for key in values]
    parts = []
    for key, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number or key not in defaults or defaults[key] != value:
            name = key.rpartition(".")[2]
            parts.append(f"{name if last.count(name) == 1 else key} = {_value(value)}")
    return ", ".join(parts)


def _value(value: Any) -> str:
    """Return a value as one reads it in a job file."""
    if isinstance(value, bool):
        return str(value).lower()
    return "unset" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
