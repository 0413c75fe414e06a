"""Medians, paired differences, the point of convergence, and the name of a run."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest

from fedbench.base import identity, stats
from fedbench.base.config import as_tree, flatten
from fedbench.base.job import OUTSIDE_HASH, Config

NAN = math.nan


def test_the_median_of_few_samples_has_no_interval() -> None:
    for n in range(1, 6):
        assert stats.median(range(n)) == (n, (n - 1) / 2, None, None, None)


def test_six_samples_give_their_range_at_96_9_per_cent() -> None:
    assert stats.median([5, 1, 4, 2, 6, 3]) == (6, 3.5, 1, 6, 0.96875)


def test_the_interval_is_the_narrowest_symmetric_one_of_at_least_95_per_cent() -> None:
    for n in range(6, 60):
        found = stats.median(np.arange(1, n + 1))
        assert found.low is not None
        assert found.high is not None
        assert found.low + found.high == n + 1
        cover = [_coverage(n, k) for k in range(1, n // 2 + 1)]
        assert found.coverage == pytest.approx(cover[int(found.low) - 1])
        assert found.coverage >= 0.95
        assert int(found.low) == len(cover) or cover[int(found.low)] < 0.95


def test_the_interval_covers_the_true_median_about_as_often_as_it_says() -> None:
    draws = np.random.Generator(np.random.Philox(key=3)).exponential(size=(4000, 11))
    hits = [bool(m.low <= math.log(2) <= m.high) for m in map(stats.median, draws)]  # type: ignore[operator]
    assert np.mean(hits) == pytest.approx(stats.median(draws[0]).coverage, abs=0.012)


@pytest.mark.parametrize("samples", [[], [1.0, NAN]])
def test_no_samples_and_nan_are_refused(samples: list[float]) -> None:
    for function in (stats.median, stats.mean_sd):
        with pytest.raises(ValueError, match="found"):
            function(samples)


def test_mean_and_sample_standard_deviation() -> None:
    assert stats.mean_sd([2, 4, 6]) == (3, 4.0, 2.0)
    assert stats.mean_sd([7]) == (1, 7.0, None)


def test_paired_differences_use_shared_seeds_alone() -> None:
    found = stats.paired_difference({0: 5.0, 1: 7.0, 2: 100.0}, {1: 4.0, 0: 4.0, 9: -100.0})
    assert found == (2, 2.0, pytest.approx(math.sqrt(2)), 2.0, None, None)
    assert stats.paired_difference({0: 1.0}, {1: 1.0}) is None
    many = stats.paired_difference({i: 2.0 * i for i in range(6)}, {i: float(i) for i in range(6)})
    assert many is not None
    assert (many.low, many.high) == (0, 5)


CONVERGENCE = [
    ("flat from the start", range(30), [0.5] * 30, 0),
    ("a rise of exactly one point goes on", range(40), [0.56] * 10 + [0.57] * 30, 10),
    ("steady rise", range(40), list(np.linspace(0.1, 0.9, 40)), None),
    ("run too short for the horizon", range(20), [0.5] * 20, None),
    ("just long enough", range(21), [0.5] * 21, 0),
    ("a peak inside the horizon counts", range(40), [0.5] * 5 + [0.6] + [0.5] * 34, 5),
    ("not evaluated rounds are skipped", range(60), [0.5 if i % 7 == 0 else NAN for i in range(60)], 0),
    ("sparser than the horizon: the next evaluation counts", [0, 50, 100, 150], [0.5, 0.7, 0.705, 0.706], 50),
    ("starts before training", range(-1, 40), [0.3] + [0.9] * 40, 0),
]


@pytest.mark.parametrize(
    ("rounds", "accuracy", "expected"), [c[1:] for c in CONVERGENCE], ids=[c[0] for c in CONVERGENCE]
)
def test_convergence(rounds: Any, accuracy: list[float], expected: int | None) -> None:
    assert stats.convergence_round(list(rounds), accuracy) == expected


def test_convergence_without_any_evaluation_is_none() -> None:
    assert stats.convergence_round([0, 1], [NAN, NAN]) is None


def _tree() -> dict[str, Any]:
    tree = as_tree(Config(method={"name": "fedmezo"}))
    tree["method"] = {"name": "fedmezo", "settings": {"lr": 0.01, "schedule": "constant", "momentum": None}}
    return tree


def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return [*value, "more"] if isinstance(value, list) else f"{value}-other"


def _with(tree: dict[str, Any], dotted: str) -> dict[str, Any]:
    changed = copy.deepcopy(tree)
    *path, last = dotted.split(".")
    node = changed
    for part in path:
        node = node[part]
    node[last] = _other(node[last])
    return changed


@pytest.mark.parametrize("dotted", sorted(flatten(_tree())))
def test_run_id_depends_on_every_key_but_those_outside_the_hash(dotted: str) -> None:
    before, after = identity.run_id(_tree()), identity.run_id(_with(_tree(), dotted))
    assert (before == after) == (dotted in OUTSIDE_HASH)


def test_every_key_outside_the_hash_exists() -> None:
    assert flatten(_tree()).keys() >= OUTSIDE_HASH


def test_run_id_is_the_method_and_twelve_digits_whatever_the_order_of_keys() -> None:
    tree = _tree()
    name = identity.run_id(tree)
    assert name.startswith("fedmezo-")
    assert len(name) == len("fedmezo-") + 12
    assert int(name[-12:], 16) >= 0
    assert identity.run_id(dict(reversed(tree.items()))) == name


def test_the_hashed_view_drops_keys_and_tables_that_become_empty() -> None:
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": {}, "f": 3}
    assert identity.hashed_view(tree, {"a.c.d", "f"}) == {"a": {"b": 1}, "e": {}}
    assert tree["f"] == 3


def test_a_config_with_nan_has_no_name() -> None:
    with pytest.raises(ValueError, match="JSON"):
        identity.run_id({"method": {"name": "x", "settings": {"lr": NAN}}})


def _coverage(n: int, k: int) -> float:
    """Return P(k <= Binomial(n, 1/2) <= n - k), summed term by term."""
    return sum(math.comb(n, i) for i in range(k, n - k + 1)) / 2**n
