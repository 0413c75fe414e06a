"""Which rows a device holds, which devices a round asks, and which rows a batch takes.

All three are pure functions of their arguments: they are the same for every method, on
every rank and in every order of calls. No row is copied or read here.
"""

from __future__ import annotations

import heapq
from typing import Literal

import numpy as np

from fedbench.base import rng
from fedbench.base.errors import ConfigError, nearest
from fedbench.data.rows import Rows

Kind = Literal["iid", "dirichlet", "shards"]

#: Fewest rows of a device in a Dirichlet partition, where there are that many for each.
MIN_ROWS = 2
SHARDS_PER_DEVICE = 2


def partition(rows: Rows, devices: int, kind: str, alpha: float, seed: int) -> list[np.ndarray]:
    """Return for each device the sorted indices (int64) of its rows; every row is in exactly one of them.

    `iid`: a random even cut. `dirichlet`: each group is shared out by proportions from
    Dir(alpha); rows then move from the largest devices until each has min(2, rows //
    devices). `shards`: rows sorted by label, cut in two even shards a device. ConfigError
    where there are fewer rows than devices, or than shards.
    """
    count = len(rows)
    each = SHARDS_PER_DEVICE if kind == "shards" else 1
    if not 1 <= devices <= count // each:
        allowed_devices = f"1 to {count // each}, as {kind} needs {each} of {count:,} private rows for each device"
        raise ConfigError(f"federation.devices: found {devices}; allowed is {allowed_devices}.")
    stream = rng.generator(seed, "partition")
    if kind == "iid":
        return _cut(stream.permutation(count), devices)
    if kind == "dirichlet":
        return _dirichlet(rows.groups, devices, alpha, stream)
    if kind == "shards":
        return _shards(rows.labels, devices, stream)
    allowed = ("iid", "dirichlet", "shards")
    raise ConfigError(f"federation.partition: found {kind!r}; allowed: {', '.join(allowed)}.{nearest(kind, allowed)}")


def sampled_devices(seed: int, round_number: int, devices: int, sampled: int) -> np.ndarray:
    """Return the sorted numbers (int64 [sampled]) of the devices that take part in a round."""
    if sampled == devices:
        return np.arange(devices, dtype=np.int64)
    chosen = rng.generator(seed, "devices", round_number).choice(devices, sampled, replace=False)
    return np.sort(chosen).astype(np.int64)


def batch_rows(
    seed: int, round_number: int, step: int, device: int, rows_index: np.ndarray, batch_size: int
) -> np.ndarray:
    """Return `batch_size` of the device's row indices (int64), drawn without replacement.

    A device with fewer rows than that takes all of them in random order, over and over
    until the batch is full, so that every batch has the same size.
    """
    order = rng.generator(seed, "batch", round_number, step, device)
    if batch_size <= rows_index.size:
        return rows_index[order.choice(rows_index.size, batch_size, replace=False)]
    return np.resize(rows_index[order.permutation(rows_index.size)], batch_size)


def balance(parts: list[np.ndarray], groups: np.ndarray) -> dict[str, float]:
    """Return fewest, median and most rows of a device, and the mean share of a device's most frequent group."""
    sizes = np.array([part.size for part in parts])
    shares = [np.bincount(groups[part]).max() / part.size for part in parts if part.size]
    return {
        "rows_min": float(sizes.min()),
        "rows_median": float(np.median(sizes)),
        "rows_max": float(sizes.max()),
        "top_group_share": float(np.mean(shares)),
    }


def _cut(order: np.ndarray, parts: int) -> list[np.ndarray]:
    return [np.sort(part).astype(np.int64) for part in np.array_split(order, parts)]


def _by_owner(owner: np.ndarray, devices: int) -> list[np.ndarray]:
    order = np.argsort(owner, kind="stable").astype(np.int64)
    return np.split(order, np.cumsum(np.bincount(owner, minlength=devices))[:-1])


def _dirichlet(groups: np.ndarray, devices: int, alpha: float, stream: np.random.Generator) -> list[np.ndarray]:
    owner = np.empty(groups.size, np.int64)
    for group in np.unique(groups):
        members = stream.permutation(np.flatnonzero(groups == group))
        share = stream.dirichlet(np.full(devices, alpha))
        # Row j of n goes to the device whose interval of the cumulated shares holds (j + 1/2) / n.
        places = (np.arange(members.size) + 0.5) / members.size
        owner[members] = np.minimum(np.searchsorted(np.cumsum(share), places, side="right"), devices - 1)
    _fill_up(owner, devices, min(MIN_ROWS, groups.size // devices), stream)
    return _by_owner(owner, devices)


def _fill_up(owner: np.ndarray, devices: int, least: int, stream: np.random.Generator) -> None:
    """Give rows of the largest devices, one at a time, to those that have fewer than `least`."""
    counts = np.bincount(owner, minlength=devices)
    poor = np.flatnonzero(counts < least)
    if not poor.size:
        return
    held = _by_owner(owner, devices)
    rich = {int(d): list(stream.permutation(held[d])) for d in np.flatnonzero(counts > least)}
    heap = [(-len(rows), device) for device, rows in rich.items()]
    heapq.heapify(heap)
    for device in np.repeat(poor, least - counts[poor]):
        size, giver = heapq.heappop(heap)
        owner[rich[giver].pop()] = device
        heapq.heappush(heap, (size + 1, giver))


def _shards(labels: np.ndarray, devices: int, stream: np.random.Generator) -> list[np.ndarray]:
    order = stream.permutation(labels.size)
    order = order[np.argsort(labels[order], kind="stable")]
    shards = np.array_split(order, SHARDS_PER_DEVICE * devices)
    hand = stream.permutation(len(shards)).reshape(devices, SHARDS_PER_DEVICE)
    return [np.sort(np.concatenate([shards[s] for s in own])).astype(np.int64) for own in hand]
