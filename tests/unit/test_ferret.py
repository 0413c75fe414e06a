"""Ferret: how many coordinates a group gets, that they rebuild the change in the mean, clipping, momentum, the answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_estimators import NAME, a_gradient, make_lab, within_three_sigma
from tinyruns import Tiny, drawn, flat, make, same, weights

from fedbench.algorithms.base import Round
from fedbench.algorithms.ferret import Ferret, Settings, groups
from fedbench.base.rng import key

SMALL = {"federation.devices": 2, "method.ferret.candidates": 8}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([10, 10, 10], [[10], [10], [10]]),
        ([1, 1, 10, 10, 10], [[1, 1, 10], [10], [10]]),
        ([10, 4, 4, 1, 10, 10], [[10], [4, 4], [1, 10], [10]]),
        ([10, 10, 3], [[10], [10], [3]]),
        ([5], [[5]]),
    ],
)
def test_groups_are_closed_at_nine_tenths_of_the_median(sizes: list[int], expected: list[list[int]]) -> None:
    tensors: Any = [SimpleNamespace(size=size) for size in sizes]
    assert [[t.size for t in group] for group in groups(tensors)] == expected


def local(built: Any, device: int, lr: float = 0.1) -> tuple[Any, dict[str, np.ndarray]]:
    """Return what a device sends and its change D by FedAvg's own upload."""
    at = Round(0, 0, (0, 1), lr)
    upload = built.algorithm.local(at, device, {}).arrays
    other = make("fedavg", SMALL | {"model.trainable": built.trainable.part})
    change = other.algorithm.local(at, device, {}).arrays
    return upload, {name: -array.reshape(-1).astype(np.float64) for name, array in change.items()}


def test_larger_changes_get_more_coordinates_and_each_is_a_projection() -> None:
    built = make("ferret", SMALL)
    upload, d = local(built, 1)
    parts = groups(built.trainable.tensors)
    norms = [np.sqrt(sum(np.square(d[t.name]).sum() for t in group)) for group in parts]
    expected = [max(2, int(8 * norm / max(norms))) for norm in norms]
    assert len(set(expected)) > 2
    where, k = np.divmod(upload["indices"].astype(int), 8)
    assert np.bincount(where, minlength=len(parts)).tolist() == expected
    assert len(set(upload["indices"].tolist())) == len(upload["indices"]) == len(upload["coords"])
    z = [drawn(built.trainable, np.array(key(built.lab.seed, "ferret candidate", n), np.uint64)) for n in range(8)]
    for group, number, coord in zip(where, k, upload["coords"], strict=True):
        size = sum(t.size for t in parts[group])
        product = sum(float(d[t.name] @ z[number][t.name]) for t in parts[group])
        assert coord == pytest.approx(size / expected[group] * product / np.sqrt(size), rel=1e-4, abs=1e-6)
    again, other = local(built, 1)[0], local(built, 0)[0]
    assert again["indices"].tobytes() == upload["indices"].tobytes()
    assert again["coords"].tobytes() == upload["coords"].tobytes()
    assert not np.array_equal(other["indices"], upload["indices"])


@pytest.mark.parametrize("gaussian", [False, True], ids=["rademacher", "gaussian"])
def test_the_rebuilt_change_is_the_change_in_the_mean(gaussian: bool) -> None:
    """E D_hat = D;  E|D_hat - D|^2 = (d - 1) |D|^2 / K for Rademacher candidates, (d + 1) for Gaussian ones."""
    d, count = 64, 10_000
    g = a_gradient(d)
    lab = make_lab(g, gaussian=gaussian)
    method = Ferret(Settings(candidates=count, lr=1.0, clip=1e9), lab)
    round_ = Round(0, 0, (0,), 1.0)
    lab.trainable.tensors[0].flat[:] = 0
    upload = method.local(round_, 0, {}).arrays
    assert len(upload["coords"]) == count  # the only group has the largest change
    reply = method.combine(round_, {0: upload}).arrays
    assert set(reply) == {NAME}  # K coordinates would be more than the d entries of the change
    method.apply(round_, {}, reply)
    rebuilt = -lab.trainable.tensors[0].flat.astype(np.float64)
    g64 = g.astype(np.float64)  # one step of SGD at a rate of 1 changes w by the gradient
    names = [np.array(key(lab.seed, "ferret candidate", k), np.uint64) for k in range(count)]
    z = np.stack([drawn(lab.trainable, name, gaussian=gaussian)[NAME] for name in names]).astype(np.float64)
    each = (z @ g64)[:, None] * z
    np.testing.assert_allclose(rebuilt, each.mean(0), atol=1e-4)
    assert within_three_sigma(each @ g64, float(g64 @ g64))
    assert within_three_sigma(np.square(each - g64).sum(1), (d + 1 if gaussian else d - 1) * float(g64 @ g64))


def test_pool_or_change_whichever_is_less_and_both_end_alike() -> None:
    ends = []
    for candidates in (8, 4000):
        built = make("ferret", SMALL | {"method.ferret.candidates": candidates, "model.trainable": "bitfit"})
        (unit, *_) = built.algorithm.reply_units(Round(0, 0, (0, 1), 0.1))
        sent = sum(u.raw_bytes for u in built.algorithm.reply_units(Round(0, 0, (0, 1), 0.1)))
        pool = 4 * candidates * len(groups(built.trainable.tensors))
        assert (unit.name == "pool") == (candidates == 8)
        assert sent == min(pool, 4 * built.trainable.size)
        ends.append(built)
    pooled = ends[0]
    other = make("ferret", SMALL | {"model.trainable": "bitfit"})
    other.algorithm._sends_pool = False  # type: ignore[attr-defined]
    for built in (pooled, other):
        Tiny(built).play(2)
    np.testing.assert_allclose(flat(weights(pooled.trainable)), flat(weights(other.trainable)), atol=1e-6)
    assert not same(weights(pooled.trainable), weights(ends[1].trainable))


def test_a_coordinate_moves_the_weights_by_the_clip_at_most() -> None:
    built = make("ferret", SMALL | {"method.ferret.clip": 0.5, "method.ferret.server_lr": 2.0})
    algorithm: Any = built.algorithm
    start = weights(built.trainable)
    pool = np.zeros_like(algorithm._pool)
    pool[0, 3] = -40.0
    algorithm.apply(Round(0, 0, (0, 1), 0.1), {}, {"pool": pool})
    moved = flat(weights(built.trainable)) - flat(start)
    assert np.linalg.norm(moved) == pytest.approx(2.0 * 0.5, rel=1e-5)


def test_the_pool_remembers_and_survives_a_stop() -> None:
    built = make("ferret", SMALL | {"method.ferret.momentum": 0.5})
    algorithm: Any = built.algorithm
    at = Round(0, 0, (0, 1), 0.1)
    one = {"indices": np.array([1, 9], np.uint32), "coords": np.array([4, 8], np.float32)}
    none = {"indices": np.array([1], np.uint32), "coords": np.array([0], np.float32)}
    first = algorithm.combine(at, {0: one, 1: none}).arrays["pool"].reshape(-1)
    assert first[[1, 9]].tolist() == [2, 4]
    other = make("ferret", SMALL | {"method.ferret.momentum": 0.5})
    other.algorithm.restore(algorithm.state())
    for replica in (built, other):
        second = replica.algorithm.combine(at, {0: none, 1: one}).arrays["pool"].reshape(-1)
        assert second[[1, 9]].tolist() == [3, 6]
    assert np.count_nonzero(second) == 2
