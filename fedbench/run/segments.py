"""The stretches of a run, one for each process that played some of its rounds: when, where, and with which code.

They go into checkpoints and from there into the provenance, so that a resumed run does not pass for the work of the
process that ended it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from fedbench.base import provenance

#: What may change the numbers where it differs between segments.
_TELLING = ("commit", "packages", "python", "cpu")


class Segments:
    """The earlier segments of a run, as a checkpoint brought them, and the one of this process."""

    def __init__(self) -> None:
        self._earlier: list[dict[str, Any]] = []
        self._first_round = 0
        self._started = provenance.now()

    def restore(self, earlier: Sequence[dict[str, Any]], next_round: int) -> None:
        """Go on behind earlier segments with a round."""
        self._earlier = list(earlier)
        self._first_round = next_round

    def told(self, next_round: int) -> list[dict[str, Any]]:
        """Return all segments, this process's up to the round before `next_round`, as a tree that JSON can hold."""
        times = {"started": self._started, "ended": provenance.now()}
        rounds = {"first_round": self._first_round, "last_round": next_round - 1}
        return [*self._earlier, {**times, **rounds, **self._process}]

    def change(self) -> str:
        """Return in words what differs from the segment before, or an empty string."""
        if not self._earlier:
            return ""
        before = self._earlier[-1]
        told = [
            f"{name}: found {_brief(self._process[name], before[name])}, before {_brief(before[name], self._process[name])}"
            for name in _TELLING
            if self._process[name] != before[name]
        ]
        return "; ".join(told)

    @cached_property
    def _process(self) -> dict[str, Any]:
        """The facts of this process."""
        facts = provenance.collect({})
        return {name: facts[name] for name in ("host", *_TELLING)}


def _brief(facts: Any, others: Any) -> str:
    """Return a value in words; of a table what differs from another alone."""
    if not isinstance(facts, dict) or not isinstance(others, dict):
        return str(facts)
    return ", ".join(f"{k} {v}" for k, v in facts.items() if others.get(k) != v) or "nothing more"
