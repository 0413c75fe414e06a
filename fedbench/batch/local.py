"""Runs what is not done of a sweep on this machine, several lines at a time, and stops in good order.

A failed run stops no other. The first INT or TERM asks all children to stop at a round boundary, where they leave
checkpoints; the second ends them. This module alone writes failures.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple, Protocol

from fedbench.batch import failures, lock, sweep
from fedbench.batch.failures import Failure
from fedbench.batch.lanes import Lane, Outcome
from fedbench.batch.manifest import Line, Sweep

_LOOK_EVERY_S = 0.2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Progress(Protocol):
    """What is told while a sweep runs."""

    def planned(self, runs: int) -> None:
        """That many lines are to be run."""

    def started(self, line: Line) -> None:
        """A line was given to a lane."""

    def ended(self, outcome: Outcome) -> None:
        """A line has come to its end."""


class Results(NamedTuple):
    """What became of the lines that were run, in the order in which they ended; `stopped`: by a signal, before all."""

    outcomes: tuple[Outcome, ...]
    stopped: bool

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """Runs that ended without a result; one that diverged is a result."""
        return tuple(outcome for outcome in self.outcomes if outcome.state in ("failed", "stopped"))


def lanes_for(lines: Sequence[Line]) -> int:
    """Return how many lines fit on this machine's cores at a time, at least 1."""
    wide = max((line.ranks * line.threads for line in lines), default=1)
    return max(1, len(os.sched_getaffinity(0)) // wide)


def run_local(
    swept: Sweep, parallel: int | None = None, progress: Progress | None = None, *, retry: bool = False
) -> Results:
    """Run what is not done, `parallel` lines at a time (unset: as many as fit); ConfigError if another submit does.

    What diverged before is run again with `retry` alone.
    """
    with lock.held(swept.folder):
        lines = sweep.to_run(swept, retry=retry)
        for line in lines:
            line.job(f"{swept.folder / 'manifest.jsonl'} line {line.number}")
        if progress is not None:
            progress.planned(len(lines))
        count = min(len(lines), parallel or lanes_for(lines))
        return _Crew(swept, lines, count, progress).work() if lines else Results((), False)


class _Crew:
    """Lanes, each with a thread that waits for it; everything else happens in the thread that called."""

    def __init__(self, swept: Sweep, lines: Sequence[Line], count: int, progress: Progress | None) -> None:
        self._sweep = swept
        self._progress = progress
        self._todo: queue.SimpleQueue[Line] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[Line | Outcome | BaseException | None] = queue.SimpleQueue()
        self._lanes = [Lane(swept) for _ in range(count)]
        self._asked = 0
        for line in lines:
            self._todo.put(line)

    def work(self) -> Results:
        """Run all lines and return what became of them."""
        outcomes: list[Outcome] = []
        threads = [threading.Thread(target=self._serve, args=(lane,), name="lane", daemon=True) for lane in self._lanes]
        with self._signals():
            for thread in threads:
                thread.start()
            open_lanes, told = len(threads), 0
            while open_lanes:
                if self._asked > told:
                    told = self._asked
                    self._stop(now=told > 1)
                try:
                    event = self._events.get(timeout=_LOOK_EVERY_S)
                except queue.Empty:
                    continue
                if event is None:
                    open_lanes -= 1
                elif isinstance(event, BaseException):
                    self._stop(now=False)
                    raise event
                else:
                    self._take(event, outcomes)
        return Results(tuple(outcomes), self._asked > 0)

    def _take(self, event: Line | Outcome, outcomes: list[Outcome]) -> None:
        if isinstance(event, Outcome):
            outcomes.append(event)
            if event.state in (failures.DIVERGED, failures.FAILED):
                failures.add(self._sweep.folder, Failure(event.line.run_id, event.state, event.reason, time.time()))
        if self._progress is None:
            return
        if isinstance(event, Line):
            self._progress.started(event)
        else:
            self._progress.ended(event)

    def _serve(self, lane: Lane) -> None:
        """Run lines in one lane until there are none, and say so."""
        try:
            while (line := self._next()) is not None:
                self._events.put(line)
                self._events.put(lane.run(line))
            lane.close()
        except BaseException as error:
            self._events.put(error)
        self._events.put(None)

    def _next(self) -> Line | None:
        try:
            return None if self._asked else self._todo.get_nowait()
        except queue.Empty:
            return None

    def _stop(self, *, now: bool) -> None:
        for lane in self._lanes:
            lane.stop(now=now)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Count INT and TERM for the block; in another thread than the main one signals stay as they are."""

        def on_signal(number: int, frame: FrameType | None) -> None:
            self._asked += 1

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, on_signal) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
