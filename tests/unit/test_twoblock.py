"""From losses of two blocks to scalars, and from scalars to what directions weigh: arithmetic alone."""

from __future__ import annotations

import numpy as np
import pytest

from fedbench.zo.twoblock import Estimator, crossed, derivatives, picks, scalar_count

#: Estimator, P1, P2 -> scalars, indices of the keys of u, number of v.
COUNTS: list[tuple[Estimator, int, int, int, list[int], int]] = [
    ("A", 2, 3, 6, [0, 3], 6),
    ("Ac", 2, 3, 6, [0, 3], 6),
    ("D", 2, 3, 8, [0, 3], 6),
    ("B", 2, 3, 5, [0, 1], 3),
    ("B1", 2, 3, 5, [0, 1], 3),
    ("B1", 4, 1, 5, [0, 1, 2, 3], 1),
    ("B1", 0, 3, 3, [], 3),
    ("A", 4, 1, 4, [0, 1, 2, 3], 4),
]


@pytest.mark.parametrize(("estimator", "p1", "p2", "scalars", "u", "v"), COUNTS)
def test_scalars_and_keys_are_as_many_as_the_estimator_says(
    estimator: Estimator, p1: int, p2: int, scalars: int, u: list[int], v: int
) -> None:
    assert scalar_count(estimator, p1, p2) == scalars
    keys = np.arange(24, dtype=np.uint64).reshape(12, 2)
    of_y, of_z = picks(estimator, keys, p1, p2)
    assert of_y[:, 0].tolist() == [2 * k for k in u]
    assert of_z.tolist() == keys[:v].tolist()
    a, b = derivatives(estimator, np.ones((2, scalars), np.float32), p1, p2)
    assert (a.shape, b.shape) == ((2, p1), (2, v))


#: Scalars of one device with P1 = 2, P2 = 2 -> what weighs u and v in the means.
WEIGHTS: list[tuple[Estimator, list[float], list[float], list[float]]] = [
    ("A", [1, 3, 5, 9], [2, 7], [1, 3, 5, 9]),
    ("Ac", [1, 3, 5, 9], [2, 7], [-2, 2, -4, 4]),
    ("B", [1, 3, 5, 9], [1, 3], [5, 9]),
    ("B1", [1, 3, 5, 9], [1, 3], [5, 9]),
    ("D", [1, 3, 5, 9, 2, 4], [1, 3], [5, 9, 2, 4]),
]


@pytest.mark.parametrize(("estimator", "scalars", "a", "b"), WEIGHTS)
def test_scalars_weigh_directions(estimator: Estimator, scalars: list[float], a: list[float], b: list[float]) -> None:
    given = np.array([scalars, [-2 * s for s in scalars]], np.float32)
    found = derivatives(estimator, given, 2, 2)
    for weights, expected in zip(found, (a, b), strict=True):
        assert weights.dtype == np.float32
        assert weights.tolist() == [expected, [-2 * x for x in expected]]


def test_four_points_tell_both_derivatives_apart() -> None:
    def f(x: float, y: float) -> float:
        return 11 + 3 * x + 5 * y + 7 * x * y + 2 * x * x - 4 * y * y

    h = 0.25
    assert list(crossed(f(h, h), f(h, -h), f(-h, h), f(-h, -h), h)) == [3.0, 5.0]
