"""The first words of a report: what was run on what, where and when, and what the numbers can't carry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedbench.base.records import Run
from fedbench.report import units
from fedbench.report.arms import Arm

#: Below this number of seeds a spread says nothing.
_FEW_SEEDS = 3


def lead(arms: Sequence[Arm], skipped: Sequence[str]) -> str:
    """Return how many runs there are, what they have in common, and what to be careful about."""
    runs = [run for arm in arms for run in arm.runs]
    seeds = sorted({len(arm.runs) for arm in arms})
    text = f"{_many(len(runs), 'run')} of {_many(len(arms), 'arm')} over "
    text += f"{_many(len({run.summary.seed for run in runs}), 'seed')}: {', '.join(_common(runs))}."
    if seeds[0] < _FEW_SEEDS:
        whose = "per arm" if len(seeds) == 1 else "for some arms"
        text += f" Careful: only {_many(seeds[0], 'seed')} {whose}, so differences may be chance."
    return f"{text} Left out: {' '.join(skipped)}" if skipped else text


def _common(runs: Sequence[Run]) -> list[str]:
    """Return the facts that are the same in all runs, and when and by which code they were made."""
    found = []
    for fact in _FACTS:
        told = {fact(run) for run in runs}
        found += [text for text in told if text] if len(told) == 1 else []
    days = sorted({day for run in runs if (day := str(run.provenance.get("ended", ""))[:10])})
    commits = sorted({_commit(run.provenance) for run in runs} - {""})
    found += [" to ".join(dict.fromkeys((days[0], days[-1])))] if days else []
    return found + ([f"commit {commits[0]}" if len(commits) == 1 else f"{len(commits)} commits"] if commits else [])


def _model(run: Run) -> str:
    entries = run.provenance.get("model", {}).get("trainable_entries")
    name = str(run.config["model"]["name"])
    return f"{name} ({units.quantity(entries, '')} trainable parameters)" if entries else f"model {name}"


def _partition(run: Run) -> str:
    federation = run.config["federation"]
    kind = federation["partition"]
    return f"Dirichlet {federation['alpha']:g}" if kind == "dirichlet" else f"partition {kind}"


def _devices(run: Run) -> str:
    federation = run.config["federation"]
    devices, sampled = federation["devices"], federation["sampled"]
    return f"{_many(devices, 'device')}{'' if sampled in (None, devices) else f' ({sampled} a round)'}"


_FACTS: tuple[Callable[[Run], str], ...] = (
    _model,
    _devices,
    _partition,
    lambda run: f"batch {run.config['federation']['batch_size']}",
    lambda run: _many(run.summary.ranks, "rank"),
)


def _commit(provenance: Mapping[str, Any]) -> str:
    commit = provenance.get("commit") or {}
    return f"{commit['hash'][:9]}{' (dirty)' if commit['dirty'] else ''}" if commit else ""


def _many(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
