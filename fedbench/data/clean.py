"""Working sets of raw rows that know when two texts are the same, to draw from and to clean.

Texts are the same when their letters and digits agree in lower case, the second text of
a pair included. Nothing here knows which split is which.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from fedbench.data.raw import RawSplit

_NOT_LETTERS = re.compile(r"[\W_]+")


@dataclass
class Pool:
    """Rows of a split that are still in it: their numbers `rows` int64 [m]; `keys` has one string for every row."""

    split: RawSplit
    keys: list[str]
    rows: np.ndarray

    @classmethod
    def of(cls, split: RawSplit) -> Pool:
        """Return the pool of all rows of a split."""
        pairs = split.pairs if split.pairs is not None else [""] * len(split)
        keys = [_key(text) + "\n" + _key(pair) for text, pair in zip(split.texts, pairs, strict=True)]
        return cls(split, keys, np.arange(len(split)))

    def labels(self) -> np.ndarray:
        """Return the labels (int64 [m]) of the rows in the pool."""
        return self.split.labels[self.rows]

    def present(self) -> set[str]:
        """Return the keys of the rows in the pool."""
        return {self.keys[row] for row in self.rows}

    def drop(self, keys: Collection[str]) -> int:
        """Remove the rows with one of these keys and return how many they were."""
        keep = np.fromiter((self.keys[row] not in keys for row in self.rows), bool, self.rows.size)
        self.rows = self.rows[keep]
        return int(keep.size - keep.sum())

    def draw(self, per_class: np.ndarray, stream: np.random.Generator) -> np.ndarray:
        """Return sorted row numbers: up to `per_class[c]` random rows of each class c, no text twice."""
        left = per_class.astype(np.int64).copy()
        seen: set[str] = set()
        drawn = []
        for row in stream.permutation(self.rows):
            label, key = self.split.labels[row], self.keys[row]
            if left[label] > 0 and key not in seen:
                left[label] -= 1
                seen.add(key)
                drawn.append(row)
        return np.sort(np.array(drawn, np.int64))

    def take(self, rows: np.ndarray) -> Pool:
        """Return a pool of these rows alone."""
        return Pool(self.split, self.keys, rows)


def _key(text: str) -> str:
    """Return the letters and digits in lower case; a text that has none stands for itself."""
    return _NOT_LETTERS.sub("", text.lower()) or text.strip()
