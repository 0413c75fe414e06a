"""Tokenised rows as arrays: what every data source returns and every partition and batch is cut from.

It knows nothing of text, files or tasks, and it never changes a row once made.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from fedbench.base.errors import DataError


@dataclass(frozen=True)
class Batch:
    """Rows as torch tensors: `ids` int64 [b, t], `mask` bool [b, t], `labels` and `lengths` int64 [b].

    `mask` is True on real tokens, which come first in every row.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True)
class Rows:
    """A set of rows: `ids` int32 [n, length] right-padded with `pad`, `lengths` int32 [n], `labels`, `groups` int64 [n].

    `groups` is what a Dirichlet partition draws over: the topic on the embedded task, the label on text.
    Arrays of other dtypes or shapes raise DataError; arrays are made read-only.
    """

    ids: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    pad: int

    def __post_init__(self) -> None:
        rows = self.ids.shape[0] if self.ids.ndim else 0
        for name, dtype, shape in (
            ("ids", np.int32, (rows, *self.ids.shape[1:2])),
            ("lengths", np.int32, (rows,)),
            ("labels", np.int64, (rows,)),
            ("groups", np.int64, (rows,)),
        ):
            array = getattr(self, name)
            if array.dtype != dtype or array.shape != shape or (name == "ids" and array.ndim != 2):
                wanted = "[n, length]" if name == "ids" else f"[{rows}]"
                found = f"{array.dtype} {list(array.shape)}"
                raise DataError(f"rows: {name} is {found}; allowed is {np.dtype(dtype)} {wanted}.")
            array = array.view()
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def take(self, index: np.ndarray) -> Rows:
        """Return the rows at `index` (integers [m], or bool [n]) in that order."""
        return Rows(self.ids[index], self.lengths[index], self.labels[index], self.groups[index], self.pad)

    def batch(self, index: np.ndarray) -> Batch:
        """Return the rows at `index` as torch tensors, cut to the longest of them."""
        lengths = self.lengths[index].astype(np.int64)
        longest = int(lengths.max(initial=1))
        ids = self.ids[index][:, :longest].astype(np.int64)
        mask = np.arange(longest)[None, :] < lengths[:, None]
        labels = self.labels[index].copy()
        tensors = (torch.from_numpy(array) for array in (ids, mask, labels, lengths))
        return Batch(*tensors)

    def sha256(self) -> str:
        """Return the hash of all arrays with their names, dtypes and shapes, and of the pad id."""
        digest = hashlib.sha256(f"pad {self.pad}".encode())
        for name in ("ids", "lengths", "labels", "groups"):
            array = np.ascontiguousarray(getattr(self, name))
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Splits:
    """One task: `train` holds the private rows (public ones removed), `source` names and hashes of what was read.

    `label_words` are the verbaliser's token ids, one a class, where the task has them, and `mask_word` is the id
    whose place an encoder's verbaliser reads.
    """

    train: Rows
    public: Rows
    dev: Rows
    test: Rows
    label_names: tuple[str, ...]
    label_words: tuple[int, ...] | None
    source: dict[str, str]
    mask_word: int | None = None
