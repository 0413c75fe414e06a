"""What a device trains on: its share of the train split, or rows that are written from its key when it is asked.

Shares are cut once for all devices; keyed rows exist only while a device computes, so that a federation may have any
number of devices. Batches depend on their arguments and the seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from fedbench.base import rng
from fedbench.base.errors import ConfigError
from fedbench.base.job import Config
from fedbench.data import embedded
from fedbench.data.partition import batch_rows, partition
from fedbench.data.rows import Batch, Rows

#: Devices whose keyed rows are kept: one computes at a time, and comes again for its next step.
_KEPT = 2


class PrivateRows(Protocol):
    """The private rows of all devices."""

    def batch(self, round_: int, step: int, device: int) -> Batch:
        """Return the batch of a device's step in a round."""


class Shares:
    """Rows of the train split, shared out between the devices: `parts` has the row numbers of each."""

    def __init__(self, train: Rows, parts: Sequence[np.ndarray], seed: int, batch_size: int) -> None:
        self._train, self._parts, self._seed, self._size = train, parts, seed, batch_size

    def batch(self, round_: int, step: int, device: int) -> Batch:
        """Return rows of the device's share."""
        return self._train.batch(batch_rows(self._seed, round_, step, device, self._parts[device], self._size))


class Keyed:
    """Rows of the embedded task written for each device: topics from Dir(alpha), then texts, all from its key."""

    def __init__(self, seed: int, alpha: float, rows: int, batch_size: int) -> None:
        self._seed, self._alpha, self._count, self._size = seed, alpha, rows, batch_size
        self.rows = lru_cache(_KEPT)(self._written)

    def batch(self, round_: int, step: int, device: int) -> Batch:
        """Return rows of the device."""
        own = self.rows(device)
        return own.batch(batch_rows(self._seed, round_, step, device, np.arange(len(own)), self._size))

    def _written(self, device: int) -> Rows:
        stream = rng.generator(self._seed, "private rows", device)
        share = stream.dirichlet(np.full(embedded.TOPICS, self._alpha))
        return embedded.rows_of(stream, stream.choice(embedded.TOPICS, self._count, p=share))


def private_rows(config: Config, train: Rows) -> PrivateRows:
    """Return the devices' rows as `[federation]` says; ConfigError where the data set can't be written from keys."""
    own, seed = config.federation, config.run.seed
    if own.partition != "keyed":
        parts = partition(train, own.devices, own.partition, own.alpha, seed)
        return Shares(train, parts, seed, own.batch_size)
    if config.data.private != "embedded":
        raise ConfigError(
            f"federation.partition: found 'keyed' with data.private = {config.data.private!r}, which can't be written "
            "from a key; allowed with it: 'iid', 'dirichlet', 'shards'."
        )
    return Keyed(seed, own.alpha, own.rows, own.batch_size)
