"""The result of a verification for people, and one line of a page for each claim. It judges nothing."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fedbench.verify.claims import Measured, Row, Unit
from fedbench.verify.race import sentence

_HEADINGS = ("claim", "task", "measured", "interval", "goal", "verdict")
_WORDS: dict[Unit, str] = {"points": "points", "%": "%", "times": "x"}
_DIGITS: dict[Unit, str] = {"points": "+.1f", "%": ".1f", "times": ".3g"}


def cells(row: Row) -> tuple[str, ...]:
    """Return claim, task, measured value, interval, goal and verdict of a row as text."""
    goal = row.claim.goal
    if goal is None:
        return (row.claim.name, row.task, "-", "-", "-", row.verdict)
    wanted = _goal(row)
    if row.measured is None:
        return (row.claim.name, row.task, "-", "-", wanted, row.verdict)
    return (
        row.claim.name,
        row.task,
        value(row.measured, goal.unit),
        interval(row.measured, goal.unit),
        wanted,
        row.verdict,
    )


def value(measured: Measured, unit: Unit) -> str:
    """Return a measured value with its unit; `>` marks a lower bound."""
    return f"{'> ' if measured.bound else ''}{_number(measured.value, unit)}"


def interval(measured: Measured, unit: Unit) -> str:
    """Return the interval of a measured value."""
    return f"{measured.low:{_DIGITS[unit]}} to {measured.high:{_DIGITS[unit]}}"


def for_people(rows: Sequence[Row], notes: Sequence[str]) -> Group:
    """Return the table for the terminal, with the reasons below."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for number, heading in enumerate(_HEADINGS):
        table.add_column(heading, justify="right" if 2 <= number <= 4 else "left", overflow="fold", no_wrap=not number)
    for row in rows:
        table.add_row(*cells(row))
    reasons = [
        sentence(f"{row.claim.name}{f', {row.task}' if row.claim.goal else ''}: {row.why}") for row in rows if row.why
    ]
    told = [Text(text) for text in (*reasons, *notes)]
    return Group(table, Text("Interval: smallest to largest seed (from 6 seeds on: 95 % rank interval)."), *told)


def headings() -> tuple[str, ...]:
    """Return the headings of `cells`."""
    return _HEADINGS


def _goal(row: Row) -> str:
    goal = row.claim.goal
    assert goal is not None
    sign = (">" if goal.value == goal.neutral else ">=") if goal.least else "<="
    return f"{sign} {_number(goal.value, goal.unit).removeprefix('+')}"


def _number(number: float, unit: Unit) -> str:
    return f"{number:{_DIGITS[unit]}} {_WORDS[unit]}".replace(" x", "x")
