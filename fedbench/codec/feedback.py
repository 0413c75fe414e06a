"""How the cloud codes a run's plans: the codec of each unit, and error feedback from one plan to the next.

With error feedback a plan's lossy units travel as V' = c (V + s e), V the plan with its random sign s, e what earlier
codings lost, and c the number that makes V' as long as V over all units. With D what V' is decoded to, the next e is
s (V + s e) without its part along D, unit by unit: that much was sent. So e can't grow without bound, whatever the codec.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from fedbench.base.arrays import Arrays, Unit
from fedbench.codec.codecs import Codec
from fedbench.codec.frame import codec_of


class PlanCoder:
    """The coding of plans on one rank; what was lost is known to the cloud alone."""

    def __init__(self, codec: Codec | None, *, feedback: bool = False) -> None:
        self._codec = codec
        self.feedback = feedback
        self._lost: dict[str, np.ndarray] = {}
        self._sent: dict[str, np.ndarray] = {}
        self._sign = 1.0

    def codecs(self, units: Sequence[Unit]) -> list[Codec]:
        """Return the codec of each unit, the same on all ranks, where the job names one."""
        assert self._codec is not None
        return [codec_of(unit, self._codec) for unit in units]

    def prepare(self, units: Sequence[Unit], plan: Arrays, sign: float) -> Arrays:
        """Return what is to be coded in the place of a plan that was made with a random sign (cloud only)."""
        if not self.feedback:
            return plan
        whole = {unit.name: plan[unit.name] for unit in units if unit.lossy}
        with_lost = {
            name: array + np.float32(sign) * self._lost[name] if self._has_lost(name, array) else array
            for name, array in whole.items()
        }
        wanted, found = (sum(map(_square, arrays.values())) for arrays in (whole, with_lost))
        factor = np.float32(math.sqrt(wanted / found)) if found else np.float32(1)
        self._sent = with_lost
        self._sign = sign
        return {**plan, **{name: factor * array for name, array in with_lost.items()}}

    def settle(self, decoded: Arrays) -> None:
        """Keep what a plan's coding lost, from what all ranks decode it to (cloud only; nothing without feedback)."""
        for name, sent in self._sent.items():
            other = decoded[name]
            square = _square(other)
            along = _product(sent, other) / square if square else 0.0
            self._lost[name] = np.float32(self._sign) * (sent - np.float32(along) * other)
        self._sent = {}

    def _has_lost(self, name: str, array: np.ndarray) -> bool:
        """Whether something was lost of a unit that is as long as it was: rows of a table may come and go."""
        return name in self._lost and self._lost[name].shape == array.shape

    def state(self) -> dict[str, np.ndarray]:
        """Return what must survive a stop."""
        return dict(self._lost)

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take back what `state` returned."""
        self._lost = {name: np.array(array) for name, array in state.items()}


def _product(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.sum(np.multiply(left, right, dtype=np.float64)))


def _square(array: np.ndarray) -> float:
    return _product(array, array)
