"""Meerkat: which coordinates are chosen, that no other ever moves, and what the estimate is inside and outside."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from test_estimators import DRAWS, a_gradient, g_hat, make_lab, within_three_sigma
from tinyruns import Tiny, drawn, make

from fedbench.algorithms.base import Round
from fedbench.algorithms.meerkat import Meerkat, Settings, largest
from fedbench.base.errors import ConfigError
from fedbench.run.build import Built

HERE = {"method.meerkat.density": 0.01, "model.trainable": "bitfit", "federation.local_steps": 2}


def mask_of(built: Built) -> np.ndarray:
    return built.algorithm.plan(Round(0, 0, (0,), 0.1))["mask"]


def test_the_mask_is_the_top_of_the_squared_public_gradient() -> None:
    for part in ("bitfit", "head"):
        built = make("meerkat", HERE | {"model.trainable": part})
        plain = copy.deepcopy(built.cut)
        batch = built.splits.public.batch(np.arange(len(built.splits.public)))
        torch.nn.functional.cross_entropy(plain(batch), batch.labels).backward()
        parameters = dict(plain.named_parameters())
        squares = []
        for tensor in built.trainable:
            grad = parameters[tensor.name].grad
            squares.append(torch.zeros(tensor.size) if grad is None else grad.reshape(-1).double() ** 2)
        every = torch.cat([square.double() for square in squares])
        count = round(0.01 * built.trainable.size)
        expected = torch.topk(every, count).indices.sort().values
        found = mask_of(built)
        assert found.dtype == np.uint32
        assert np.array_equal(found, expected.numpy()), part


@pytest.mark.parametrize("mask", ["public", "random"])
def test_no_coordinate_outside_the_mask_ever_moves(mask: str) -> None:
    built = make("meerkat", HERE | {"method.meerkat.mask": mask, "method.meerkat.lr": 0.05})
    start = np.concatenate([t.flat.copy() for t in built.trainable])
    chosen = mask_of(built) if mask == "public" else built.algorithm._mask  # type: ignore[attr-defined]
    Tiny(built).play(3)
    end = np.concatenate([t.flat for t in built.trainable])
    assert np.array_equal(np.flatnonzero(end != start), chosen)


def test_the_control_has_other_coordinates_and_costs_no_plan() -> None:
    public, other = make("meerkat", HERE), make("meerkat", HERE | {"method.meerkat.mask": "random"})
    random = other.algorithm._mask  # type: ignore[attr-defined]
    chosen = mask_of(public)
    assert len(random) == len(chosen) == len(set(random.tolist()))
    assert len(set(random.tolist()) & set(chosen.tolist())) < len(chosen) / 2
    (outcome,) = Tiny(other).play(1)
    assert (outcome.plan_bytes, outcome.cloud_flops) == (0, 0)
    seeded = make("meerkat", HERE | {"method.meerkat.mask": "random", "run.seed": 5})
    assert not np.array_equal(random, seeded.algorithm._mask)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("size", "count", "expected"),
    [([3, 1, 2], 1, [0]), ([3, 1, 2], 2, [0, 2]), ([1, 2, 2, 2], 2, [1, 2]), ([0, 0, 0], 2, [0, 1]), ([5], 1, [0])],
)
def test_of_equal_entries_the_first_are_taken(size: list[float], count: int, expected: list[int]) -> None:
    assert largest(np.array(size, np.float32), count).tolist() == expected


def test_a_mask_without_a_coordinate_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.meerkat\.density: found 1e-05, which is none of"):
        make("meerkat", HERE | {"method.meerkat.density": 1e-5})


@pytest.mark.parametrize("gaussian", [False, True], ids=["rademacher", "gaussian"])
def test_the_estimate_is_the_gradient_on_the_mask_and_nothing_elsewhere(gaussian: bool) -> None:
    """E g_hat = g on m;  E|g_hat - g_m|^2 = (q d + 1) |g_m|^2, or (q d - 1) |g_m|^2 for Rademacher directions."""
    d, count = 64, 16
    g = a_gradient(d)
    lab = make_lab(g, count=DRAWS, gaussian=gaussian)
    method = Meerkat(Settings(density=count / d), lab)
    mask = largest(np.abs(g), count).astype(np.uint32)
    mean, a = g_hat(method, {"mask": mask})
    inside = g[mask].astype(np.float64)
    z = np.empty((DRAWS, count))
    for row, key in zip(z, lab.directions(0, 0, range(1), DRAWS), strict=True):
        row[:] = drawn(lab.trainable, key, gaussian=gaussian)["head.linear.weight"][:count]
    np.testing.assert_allclose(a, z @ inside, atol=2e-4)
    each = a[:, None] * z
    np.testing.assert_allclose(mean[mask], each.mean(0), atol=1e-5)
    assert not np.delete(mean, mask).any()
    square = float(inside @ inside)
    assert within_three_sigma(each @ inside, square)
    across = np.random.default_rng(5).standard_normal(count)
    across -= (across @ inside) / square * inside
    assert within_three_sigma(each @ across, 0.0)
    assert within_three_sigma(np.square(each - inside).sum(1), (count + 1 if gaussian else count - 1) * square)
    assert float(np.square(mean[mask] - inside).sum()) < (count + 1) * square / DRAWS * (1 + 3 * math.sqrt(2 / count))


def test_a_local_walk_stands_where_its_steps_led() -> None:
    """With the walk ignored, the second step's scalars would be those at the start."""
    built = make("meerkat", HERE | {"federation.devices": 1})
    plan = built.algorithm.plan(Round(0, 0, (0,), 0.5))
    walked = built.algorithm.local(Round(0, 0, (0,), 0.5), 0, plan).arrays["scalars"]
    stood = built.algorithm.local(Round(0, 0, (0,), 1e-30), 0, plan).arrays["scalars"]
    assert walked[0] == stood[0]
    assert walked[1] != stood[1]


def test_a_replica_that_is_given_the_mask_alone_goes_on_as_before() -> None:
    built, other = make("meerkat", HERE), make("meerkat", HERE)
    Tiny(built).play(1)
    for mine, there in zip(other.trainable, built.trainable, strict=True):
        mine.assign(there.flat)
    other.algorithm.restore(built.algorithm.state())
    at = Round(1, 0, (0, 2), 0.1)
    found, expected = (b.algorithm.local(at, 2, {}).arrays["scalars"] for b in (other, built))
    assert found.tobytes() == expected.tobytes()
    assert np.isfinite(found).all()
