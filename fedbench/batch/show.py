"""What people see of a running sweep on stderr: a bar on a terminal, one line a run elsewhere."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedbench.batch.lanes import Outcome
from fedbench.batch.manifest import Line


class ShowSweep:
    """Counts runs as they end, and names those that failed at once."""

    def __init__(self, name: str, console: Console) -> None:
        self._console = console
        self._runs = 0
        self._states: Counter[str] = Counter()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"), TimeRemainingColumn())
            self._bar = Progress(TextColumn("[bold]{task.description}"), *columns, console=console, transient=True)
            self._task = self._bar.add_task(name, total=None, facts="")
            self._bar.start()

    def planned(self, runs: int) -> None:
        """Take the number of runs."""
        self._runs = runs
        if self._bar is not None:
            self._bar.update(self._task, total=runs)

    def started(self, line: Line) -> None:
        """Nothing is said before there is something to say."""

    def ended(self, outcome: Outcome) -> None:
        """Count a run; say it where there is no bar, or where it is not done."""
        self._states[outcome.state] += 1
        ended = self._states.total()
        if self._bar is not None:
            facts = ", ".join(f"{count} {state}" for state, count in self._states.items())
            self._bar.update(self._task, completed=ended, facts=facts)
        if self._bar is None or outcome.state != "done":
            why = f": {outcome.reason}" if outcome.reason else ""
            line = f"{ended} of {self._runs}  {outcome.line.run_id} {outcome.state} in {outcome.wall_s:.1f} s{why}"
            self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
