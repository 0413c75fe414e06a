"""FedKSeed-Pro: FedKSeed that draws candidates with large scalars more often (methods.md 2.6).

    cloud:  m_k = mean of |a|, each at most 1000, over all that was ever found along candidate k, and one 0
            p = softmax((m - min m) / (max m - min m)), frozen for the round and sent to devices
    device: as FedKSeed, k drawn by p

The most and the least likely candidate differ by a factor e at most. Pairs (k, a) travel even where H would be less,
since the history needs every a. The published simulation lets devices see each other's scalars within a round; here
all see the history of the rounds before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedbench.algorithms.base import Lab, Reply, Round, Settings
from fedbench.algorithms.fedkseed import FedKSeed
from fedbench.base.arrays import Arrays, Unit

#: The largest |a| that counts in a history.
CLIP = 1000.0


class FedKSeedPro(FedKSeed):
    """FedKSeed with candidates drawn by their history."""

    name = "fedkseed_pro"
    summary = "FedKSeed, candidates drawn by the size of their scalars"
    _sends_pairs = True

    def __init__(self, settings: Settings, lab: Lab) -> None:
        super().__init__(settings, lab)
        self._size = np.zeros(self.settings.candidates)  # sum of |a| by candidate
        self._found = np.zeros(self.settings.candidates, np.int64)  # how many

    def plan_units(self, round_: Round) -> Sequence[Unit]:
        """The probabilities of all candidates."""
        return (Unit("probabilities", (self.settings.candidates,)),)

    def plan(self, round_: Round) -> Arrays:
        """Return p [K]."""
        m = self._size / (self._found + 1)
        low, high = m.min(), m.max()
        e = np.exp((m - low) / (high - low) if high > low else np.zeros(len(m)))
        return {"probabilities": (e / e.sum()).astype(np.float32)}

    def probabilities(self, plan: Arrays) -> np.ndarray:
        """Return p as it travelled, with a sum of 1 in float64."""
        p = plan["probabilities"].astype(np.float64)
        return p / p.sum()

    def combine(self, round_: Round, uploads: Mapping[int, Arrays]) -> Reply:
        """Return A as FedKSeed does, and add the scalars to the history."""
        for sent in uploads.values():
            np.add.at(self._size, sent["index"], np.minimum(np.abs(sent["scalars"]).astype(np.float64), CLIP))
            np.add.at(self._found, sent["index"], 1)
        return super().combine(round_, uploads)

    def state(self) -> dict[str, np.ndarray]:
        """A and the history."""
        return super().state() | {"size": self._size, "found": self._found}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take A and the history back."""
        super().restore(state)
        self._size, self._found = np.array(state["size"]), np.array(state["found"])
