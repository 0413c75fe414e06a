"""The memory of a rank, phase by phase: what it held at most while it imported, loaded, trained and evaluated.

The system's high-water mark is set back at the start of each phase and of each round, and what loading left free in
the heap is given back at its end, so that a phase does not answer for the one before. Nothing here knows another rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedbench.base import account, records
from fedbench.run.callbacks.metrics import Metrics
from fedbench.run.outcome import Outcome

PHASES = ("import", "load", "train", "evaluate")

#: Behind a phase's name where the high-water mark can't be set back.
CUMULATIVE = " (highest so far)"

#: Rows of memory over time at most; past it two neighbours become one. Even.
LOG_ROWS = 512


class Memory:
    """Highest resident memory of this process in each phase, in bytes, from the start of the process."""

    def __init__(self) -> None:
        self.apart = True
        self._phase = PHASES[0]
        self._peaks = dict.fromkeys(PHASES, 0)
        self._gpu = dict.fromkeys(PHASES, 0)
        self._weights = dict.fromkeys(PHASES, 0)
        self._baseline = 0
        self._held = 0
        self._log: list[tuple[int, int, int]] = []
        self._rounds = 0
        self._each = 1

    def enter(self, phase: str) -> None:
        """End the phase at hand and begin another, or go on with an earlier one."""
        self.note()
        if self._phase == "load":
            account.give_back_free_memory()
        if self._phase == "import":
            self._baseline = account.resident_bytes()
        self.apart = account.reset_peak() and self.apart
        self._phase = phase

    def weights(self, held_bytes: int) -> None:
        """Say how many bytes of weights are in memory at a time from now on."""
        self._held = held_bytes

    def note(self) -> None:
        """Take the high-water mark of the phase at hand."""
        phase = self._phase
        self._peaks[phase] = max(self._peaks[phase], account.peak_bytes())
        self._gpu[phase] = max(self._gpu[phase], account.gpu_peak_bytes())
        self._weights[phase] = self._held

    def started(self) -> None:
        """Nothing was read yet: memory watches a run as an observer, on every rank."""

    def played(self, outcome: Outcome) -> bool:
        """Read what a round held at most and what it left, and set the high-water mark back."""
        resident, peak = account.held()
        self._peaks[self._phase] = max(self._peaks[self._phase], peak)
        self._gpu[self._phase] = max(self._gpu[self._phase], account.gpu_peak_bytes())
        self.apart = account.reset_peak() and self.apart
        if self._rounds % self._each:
            self._log[-1] = _joined(self._log[-1], (outcome.number, resident, peak))
        else:
            if len(self._log) == LOG_ROWS:
                self._log = [_joined(*pair) for pair in zip(self._log[::2], self._log[1::2], strict=True)]
                self._each *= 2
            self._log.append((outcome.number, resident, peak))
        self._rounds += 1
        return False

    def log(self) -> np.ndarray:
        """Return int64 [rows, 3] over the rounds: last round of the row, resident at its end, highest during the row."""
        return np.array(self._log, np.int64).reshape(-1, 3)

    def table(self) -> np.ndarray:
        """Return int64 [phases, 3]: peak, the same above what was resident after the imports, weights held.

        A phase that never was is 0 throughout; less than after the imports is 0 above them.
        """
        after = [phase != PHASES[0] for phase in PHASES]
        peaks = np.array([*self._peaks.values()], np.int64)
        above = np.where(after, np.maximum(peaks - self._baseline, 0), 0)
        return np.stack([peaks, above, np.array([*self._weights.values()], np.int64)], axis=1)


def _joined(earlier: tuple[int, int, int], later: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return two rows of the log as one."""
    return (*later[:2], max(earlier[2], later[2]))


class Evaluating:
    """Metrics as an observer whose memory is counted as a phase of its own."""

    def __init__(self, metrics: Metrics, memory: Memory) -> None:
        self._metrics = metrics
        self._memory = memory

    def started(self) -> None:
        """Evaluate the start model."""
        self._memory.enter("evaluate")
        self._metrics.started()
        self._memory.enter("train")

    def played(self, outcome: Outcome) -> bool:
        """Evaluate after a round, if it is time; return whether the target is reached and the job stops there.

        The memory of other rounds is that of training: each look sets the system's mark back, which walks all pages.
        """
        if not self._metrics.evaluates(outcome.number):
            return self._metrics.played(outcome)
        self._memory.enter("evaluate")
        reached = self._metrics.played(outcome)
        self._memory.enter("train")
        return reached


def device_peak(memory: np.ndarray, hosts: Sequence[int]) -> int | None:
    """Return the highest peak above the imports of the ranks that host devices; None where the cloud is one of them."""
    return None if 0 in hosts else int(memory[list(hosts), 1:, 1].max())


def memory_columns(memory: np.ndarray, *, apart: bool) -> dict[str, np.ndarray]:
    """Return the run file's memory table of int64 [ranks, phases, 3]; rows of phases that never were are left out."""
    ranks, phases, _ = memory.shape
    names = [phase if apart else phase + CUMULATIVE for phase in PHASES]
    table = {
        "rank": np.repeat(np.arange(ranks, dtype=np.int32), phases),
        "phase": np.array(names * ranks),
        "peak_bytes": memory[:, :, 0].reshape(-1),
        "above_import_bytes": memory[:, :, 1].reshape(-1),
        "weights_bytes": memory[:, :, 2].reshape(-1),
    }
    return {name: column[table["peak_bytes"] > 0] for name, column in table.items()}


def memory_rounds(logs: Mapping[int, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the run file's memory over the rounds from every rank's `Memory.log`; nothing without a row."""
    rows = [np.insert(log, 0, rank, axis=1) for rank, log in logs.items() if len(log)]
    if not rows:
        return {}
    columns = zip(records.MEMORY_ROUND_COLUMNS, np.concatenate(rows).T, strict=True)
    return {name: values.astype(records.MEMORY_ROUND_COLUMNS[name].dtype) for name, values in columns}
