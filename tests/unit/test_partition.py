"""Partitions, device sampling and batches: exact covers, functions of their keys alone."""

from __future__ import annotations

import numpy as np
import pytest

from fedbench.base.errors import ConfigError
from fedbench.data.partition import MIN_ROWS, balance, batch_rows, partition, sampled_devices
from fedbench.data.rows import Rows

KINDS = ("iid", "dirichlet", "shards")


def make_rows(count: int, groups: int = 8, classes: int = 4, seed: int = 0) -> Rows:
    group = np.random.default_rng(seed).integers(0, groups, count)
    return Rows(np.zeros((count, 1), np.int32), np.ones(count, np.int32), group % classes, group, 0)


def assert_cover(parts: list[np.ndarray], count: int) -> None:
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(count))
    assert all(np.array_equal(part, np.sort(part)) and part.dtype == np.int64 for part in parts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "devices", "alpha"), [(100, 8, 0.5), (4096, 8, 0.1), (31, 5, 100.0), (64, 32, 0.01)])
def test_every_row_is_held_once(kind: str, count: int, devices: int, alpha: float) -> None:
    for seed in range(10):
        parts = partition(make_rows(count), devices, kind, alpha, seed)
        assert len(parts) == devices
        assert_cover(parts, count)
        assert min(part.size for part in parts) >= MIN_ROWS


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_alone_decides(kind: str) -> None:
    rows = make_rows(500)
    first, again, other = (partition(rows, 8, kind, 0.5, seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_iid_is_even() -> None:
    sizes = [part.size for part in partition(make_rows(103), 8, "iid", 1.0, 0)]
    assert max(sizes) - min(sizes) <= 1


def test_dirichlet_goes_from_skewed_to_even() -> None:
    rows = make_rows(8000)
    for seed in range(5):
        shares = [balance(partition(rows, 8, "dirichlet", a, seed), rows.groups) for a in (0.01, 0.5, 10_000.0)]
        skew = [share["top_group_share"] for share in shares]
        assert skew[0] > 0.6 > skew[1] > skew[2]
        assert skew[2] < 0.16  # an eighth is even
        assert shares[2]["rows_max"] < 1.1 * shares[2]["rows_min"]
        assert shares[0]["rows_max"] > 2 * shares[0]["rows_min"]


def test_dirichlet_draws_over_groups_and_not_over_labels() -> None:
    rows = make_rows(8000)
    by_label = Rows(rows.ids, rows.lengths, rows.labels, rows.labels.copy(), 0)
    same = [
        np.array_equal(*pair)
        for pair in zip(*(partition(r, 8, "dirichlet", 0.5, 0) for r in (rows, by_label)), strict=True)
    ]
    assert not all(same)


def test_dirichlet_has_the_mean_of_its_law() -> None:
    """Over many seeds each device gets an eighth of a group; the variance is that of Dir(alpha)."""
    rows, alpha, devices = make_rows(800, groups=1, classes=1), 1.0, 8
    share = np.array([[p.size / 800 for p in partition(rows, devices, "dirichlet", alpha, s)] for s in range(300)])
    mean = 1 / devices
    variance = mean * (1 - mean) / (devices * alpha + 1)
    assert np.allclose(share.mean(axis=0), mean, atol=5 * np.sqrt(variance / 300))
    assert share.var() == pytest.approx(variance, rel=0.15)


def test_a_shard_device_has_few_labels() -> None:
    rows = make_rows(4000, groups=10, classes=10)
    for part in partition(rows, 20, "shards", 1.0, 0):
        assert np.unique(rows.labels[part]).size <= 4  # two shards, each over at most one boundary here


@pytest.mark.parametrize(
    ("kind", "count", "devices"), [("iid", 7, 8), ("dirichlet", 7, 8), ("shards", 15, 8), ("iid", 7, 0)]
)
def test_too_many_devices_are_refused(kind: str, count: int, devices: int) -> None:
    with pytest.raises(ConfigError, match=rf"federation.devices: found {devices}; allowed is 1 to 7, as {kind}"):
        partition(make_rows(count), devices, kind, 1.0, 0)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"allowed: iid, dirichlet, shards\. Nearest: dirichlet\."):
        partition(make_rows(10), 2, "dirichlett", 1.0, 0)


def test_as_many_devices_as_rows() -> None:
    for kind in ("iid", "dirichlet"):
        parts = partition(make_rows(9), 9, kind, 0.1, 0)
        assert [part.size for part in parts] == [1] * 9


def test_sampled_devices_depend_on_seed_and_round_alone() -> None:
    for round_number in range(50):
        chosen = sampled_devices(7, round_number, 100, 10)
        assert np.array_equal(chosen, sampled_devices(7, round_number, 100, 10))
        assert np.unique(chosen).size == 10
        assert np.array_equal(chosen, np.sort(chosen))
        assert 0 <= chosen[0] <= chosen[-1] < 100
    assert not np.array_equal(sampled_devices(7, 0, 100, 10), sampled_devices(7, 1, 100, 10))
    assert not np.array_equal(sampled_devices(7, 0, 100, 10), sampled_devices(8, 0, 100, 10))
    assert sampled_devices(7, 3, 5, 5).tolist() == [0, 1, 2, 3, 4]


def test_devices_are_sampled_evenly() -> None:
    counts = np.bincount(np.concatenate([sampled_devices(0, r, 20, 5) for r in range(2000)]), minlength=20)
    assert np.abs(counts / 500 - 1).max() < 0.2  # five standard errors


def test_batches_are_drawn_without_replacement() -> None:
    held = np.arange(100, 140)
    seen = set()
    for step in range(100):
        batch = batch_rows(0, 2, step, 5, held, 16)
        assert batch.size == np.unique(batch).size == 16
        assert np.isin(batch, held).all()
        seen.update(batch.tolist())
    assert seen == set(held.tolist())


def test_each_part_of_a_batch_key_counts() -> None:
    held = np.arange(1000)
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    batches = [tuple(batch_rows(*key, held, 16)) for key in keys]
    assert len(set(batches)) == len(keys)
    assert batches == [tuple(batch_rows(*key, held, 16)) for key in keys]


def test_a_small_device_cycles_through_its_rows() -> None:
    held = np.array([3, 8, 11])
    batch = batch_rows(0, 0, 0, 0, held, 8)
    assert sorted(batch[:3]) == [3, 8, 11]
    assert np.array_equal(batch, np.resize(batch[:3], 8))
