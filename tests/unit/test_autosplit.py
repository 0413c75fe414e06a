"""The rule that cuts a model in two: on second derivatives that are given, and probes on a model that is small."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tinycuts import batch_for, embedded_cut, plain_losses
from tinyruns import drawn, weights

from fedbench.base.account import Meter
from fedbench.models.trainable import select
from fedbench.zo.autosplit import Choice, choose, probe, regions
from fedbench.zo.direction import as_keys, direction_key
from fedbench.zo.stream import Stream

START = Choice(boundary=6, p2=6, ratio=1.0)
CUTS = {0: 6, 1: 7}


def probes(n: list[float], t: list[float], spread: float = 0.1) -> np.ndarray:
    """Return probes [M, 3, Q, 2] of two devices, two directions, with these mean squares and mean curvatures."""
    found = np.empty((2, 3, 2, 2))
    found[..., 0] = np.sqrt(n)[None, :, None]
    found[1, :, :, 0] *= -1
    found[..., 1] = np.array(t)[None, :, None]
    found[:, :, 0, 1] += spread
    found[:, :, 1, 1] -= spread
    return found.astype(np.float32)


def costs(last: float, head: float) -> np.ndarray:
    return np.array([[last, head]] * 2, np.float32)


#: n and T of the regions, cost shares of both cuts -> boundary, P2, ratio.
RULE = [
    # The embedded model's own figures: the head is nearly free and holds most of block 2's gradient.
    (([15.9, 0.4, 11.6], [218, 2, 50], 1 / 6, 1e-4), (7, 64, 64 * 220 / 50)),
    # The last layer holds it: as cheap as the head, or not.
    (([2.0, 11, 0.1], [20, 50, 10], 0.01, 1e-4), (6, 26, 26 * 20 / 60)),
    (([2.0, 11, 0.1], [20, 50, 10], 1 / 6, 1e-4), (6, 6, 6 * 20 / 60)),
    # A head that costs as much as all else has few directions.
    (([1.0, 0.1, 9], [20, 1, 20], 0.9, 0.5), (7, 4, 4 * 21 / 20)),
    # Curvature of the last layer and head together isn't above its error: only the other cut is left.
    (([2.0, 11, 0.1], [20, -20, 10], 1 / 6, 1e-4), None),
    (([2.0, 11, 0.1], [30, -20, 10], 1 / 6, 1e-4), (7, 64, 64 * 10 / 10)),
    (([2.0, 11, 0.1], [20, 3, -1], 1 / 6, 1e-4), (6, 6, 6 * 20 / 2)),
]


@pytest.mark.parametrize(("given", "expected"), RULE)
def test_the_cut_of_most_progress_per_compute_is_taken(
    given: tuple[list[float], list[float], float, float], expected: tuple[int, int, float] | None
) -> None:
    n, t, last, head = given
    found = choose(START, probes(n, t), costs(last, head), 1, CUTS)
    boundary, p2, ratio = expected or (START.boundary, START.p2, START.ratio)
    assert (found.boundary, found.p2) == (boundary, p2)
    assert found.ratio == pytest.approx(ratio, rel=1e-5)
    assert found.n_start == pytest.approx(n[0], rel=1e-5)
    assert found.y_scale == 1.0


def test_a_cut_without_two_blocks_is_never_taken() -> None:
    found = choose(START, probes([15.9, 0.4, 11.6], [218, 2, 50]), costs(1 / 6, 1e-4), 1, {0: 6})
    assert (found.boundary, found.p2) == (6, 6)


#: n and T of the first region at later probes -> factor of its step.
GROWTH = [
    ([2.0, 20.0], 1.0),
    ([8.0, 20.0], 0.5),
    ([2.0, 80.0], 0.25),
    ([8.0, 80.0], 0.25),
    ([1.0, 5.0], 1.0),
    ([8.0, -3.0], 0.5),
]


@pytest.mark.parametrize(("later", "factor"), GROWTH)
def test_block_ones_step_shrinks_with_growth_and_never_grows_above_its_start(later: list[float], factor: float) -> None:
    start = choose(START, probes([2.0, 1, 1], [20, 5, 5]), costs(0.2, 0.1), 1, CUTS)
    found = choose(start, probes([later[0], 1, 1], [later[1], 5, 5]), costs(0.2, 0.1), 1, CUTS)
    assert found.y_scale == pytest.approx(factor, rel=1e-5)
    assert (found.n_start, found.t_start) == (start.n_start, start.t_start)


def test_a_curvature_within_its_error_at_the_start_is_no_reference() -> None:
    first = choose(START, probes([2.0, 1, 1], [20, 5, 5], spread=100.0), costs(0.2, 0.1), 1, CUTS)
    assert math.isnan(first.t_start)
    assert first.y_scale == 1.0
    assert (first.boundary, first.p2, first.ratio) == (6, 6, 1.0)
    second = choose(first, probes([2.0, 1, 1], [40, 5, 5]), costs(0.2, 0.1), 1, CUTS)
    assert second.t_start == pytest.approx(40, rel=1e-5)


def test_a_choice_is_what_its_array_says() -> None:
    choice = Choice(7, 64, 2.5, 0.5, 1.25, 30.0)
    assert Choice.of(choice.array()) == choice
    assert choice.array().dtype == np.float64


def test_probes_are_derivatives_along_one_region_alone() -> None:
    cut, h = embedded_cut(), 2e-3
    trainable = select(cut, "full")
    start, batch = weights(trainable), batch_for(cut)
    keys = as_keys([direction_key(1, 0, 0, 0, p) for p in range(2)])
    found, loss = probe(Stream(cut, trainable, Meter(), gaussian=False), batch, keys, h, {0, 2, 6, 7})
    plain = embedded_cut()
    assert loss == pytest.approx(plain_losses(plain, start, batch), rel=1e-6)
    assert [list(region) for region in regions(cut.stages)] == [[0, 1, 2, 3, 4, 5], [6], [7]]
    for index, region in enumerate(regions(cut.stages)):
        names = [t.name for t in trainable if t.stage in region]
        for q, key in enumerate(keys):
            u = drawn(trainable, key)
            plus, minus = (
                plain_losses(plain, start | {n: start[n] + np.float32(side * h) * u[n] for n in names}, batch)
                for side in (1, -1)
            )
            assert found[index, q, 0] == pytest.approx((plus - minus) / (2 * h), abs=2e-3)
            assert found[index, q, 1] == pytest.approx((plus + minus - 2 * loss) / h**2, abs=2.0)
    assert np.abs(found[:, :, 0]).min() > 0
    untrained, _ = probe(Stream(cut, trainable, Meter(), gaussian=False), batch, keys, h, {0, 7})
    assert not untrained[1].any()
    assert untrained[2].any()
