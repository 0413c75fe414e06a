"""Progress for people on stderr: a bar on a terminal, plain lines elsewhere; rank 0 only."""

from __future__ import annotations

import math
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedbench.run.callbacks.metrics import Metrics
from fedbench.run.outcome import Outcome

_LINE_EVERY_S = 5.0


class ShowProgress:
    """Shows the round, dev accuracy and device loss."""

    def __init__(self, name: str, rounds: int, metrics: Metrics, console: Console) -> None:
        self._name = name
        self._rounds = rounds
        self._metrics = metrics
        self._console = console
        self._bar: Progress | None = None
        self._said_s = 0.0
        self._accuracy = math.nan

    def started(self) -> None:
        """Show the start."""
        first = self._metrics.rows[0]
        self._accuracy = first["dev_accuracy"]
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(self._name, total=self._rounds, facts="")
            self._bar.start()
        else:
            self._say(f"{self._name}: start, dev accuracy {self._accuracy:.3f}")

    def played(self, outcome: Outcome) -> bool:
        """Show a round."""
        row = self._metrics.rows[-1]
        self._accuracy = row.get("dev_accuracy", self._accuracy)
        facts = f"dev accuracy {self._accuracy:.3f}"
        if not math.isnan(row["device_loss"]):
            facts += f", device loss {row['device_loss']:.3f}"
        done = outcome.number + 1
        if self._bar is not None:
            self._bar.update(self._task, completed=done, facts=facts)
        elif done == self._rounds or time.monotonic() - self._said_s > _LINE_EVERY_S:
            self._say(f"{self._name}: round {done} of {self._rounds}, {facts}")
        return False

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def _say(self, line: str) -> None:
        self._said_s = time.monotonic()
        self._console.print(line, highlight=False, soft_wrap=True)
