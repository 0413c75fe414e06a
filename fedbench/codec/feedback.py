"""How the cloud codes a run's plans: the codec of each unit, and error feedback from one plan to the next.

With error feedback a plan's lossy units travel as V' = c (V + s e), V the plan with its random sign s, e what earlier
codings lost, and c the number that makes V' as long as V over all units. With D what V' is decoded to, the next e is
s (V + s e) without its part along D, unit by unit: that much was sent. So e can't grow without bound, whatever the codec.
What was lost of a unit that holds rows of a table is forgotten when the unit comes to hold other rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fedbench.base.arrays import Arrays, Unit
from fedbench.codec.coding import Codec
from fedbench.codec.frame import codec_of

#: How the names of a coder's state begin that tell which rows of a table a unit held.
_ROWS = "rows/"

#: Rows of plans whose units hold whole tensors, or tiles of them.
WHOLE: Mapping[str, np.ndarray] = {}


class PlanCoder:
    """The coding of plans on one rank; what was lost is known to the cloud alone."""

    def __init__(self, codec: Codec | None, *, feedback: bool = False, poll: Callable[[], None] = lambda: None) -> None:
        self._codec = codec
        self.feedback = feedback
        self._poll = poll
        self._lost: dict[str, np.ndarray] = {}
        self._rows: dict[str, np.ndarray] = {}
        self._sent: dict[str, np.ndarray] = {}
        self._sign = 1.0

    def codecs(self, units: Sequence[Unit]) -> list[Codec]:
        """Return the codec of each unit, the same on all ranks, where the job names one."""
        assert self._codec is not None
        return [codec_of(unit, self._codec) for unit in units]

    def prepare(
        self, units: Sequence[Unit], plan: Arrays, sign: float, rows: Mapping[str, np.ndarray] = WHOLE
    ) -> Arrays:
        """Return what is to be coded in the place of a plan that was made with a random sign (cloud only).

        `rows` tells by name which rows of a table (int32 ascending) a unit holds, where it holds some.
        """
        if not self.feedback:
            return plan
        wanted = found = 0.0
        with_lost: dict[str, np.ndarray] = {}
        for name in (unit.name for unit in units if unit.lossy):
            array = plan[name]
            if self._knows(name, array, rows.get(name)):
                with_lost[name] = array + np.float32(sign) * self._lost[name]
            else:
                with_lost[name] = array
            wanted, found = wanted + _square(array), found + _square(with_lost[name])
            self._poll()
        for name in with_lost:
            self._rows.pop(name, None)
        self._rows |= {name: np.array(own) for name, own in rows.items() if name in with_lost}
        factor = np.float32(math.sqrt(wanted / found)) if found else np.float32(1)
        self._sent = with_lost
        self._sign = sign
        return {**plan, **{name: factor * array for name, array in with_lost.items()}}

    def settle(self, decoded: Arrays) -> None:
        """Keep what a plan's coding lost, from what all ranks decode it to (cloud only; nothing without feedback)."""
        for name, sent in self._sent.items():
            self._poll()
            other = decoded[name]
            square = _square(other)
            along = _product(sent, other) / square if square else 0.0
            self._lost[name] = np.float32(self._sign) * (sent - np.float32(along) * other)
        self._sent = {}

    def _knows(self, name: str, array: np.ndarray, rows: np.ndarray | None) -> bool:
        """Whether what was lost under a unit's name was lost of the entries that it holds now."""
        if name not in self._lost or self._lost[name].shape != array.shape:
            return False
        before = self._rows.get(name)
        return before is None if rows is None else before is not None and np.array_equal(before, rows)

    def state(self) -> dict[str, np.ndarray]:
        """Return what must survive a stop."""
        return {**self._lost, **{_ROWS + name: rows for name, rows in self._rows.items()}}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take back what `state` returned."""
        self._lost = {name: np.array(array) for name, array in state.items() if not name.startswith(_ROWS)}
        self._rows = {
            name.removeprefix(_ROWS): np.array(rows) for name, rows in state.items() if name.startswith(_ROWS)
        }


def _product(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.sum(np.multiply(left, right, dtype=np.float64)))


def _square(array: np.ndarray) -> float:
    return _product(array, array)
