"""Moments of the estimators behind methods that travel as scalars, each by its own plan, probes and update (methods.md 4.1).

Every draw is a round 0 of another seed, so that shared directions, pools of candidates and retries all come out anew.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_estimators import DISTRIBUTIONS, a_gradient, make_lab, within_three_sigma

from fedbench.algorithms.base import Lab, Round
from fedbench.run.build import METHODS

DRAWS, D = 1500, 24

#: Method and settings, devices, directions of one estimate in all, and whether Gaussian draws lie on a sphere.
CASES: dict[str, tuple[str, dict[str, Any], int, int, bool]] = {
    "decomfl": ("decomfl", {}, 1, 1, False),
    "decomfl, one-sided": ("decomfl", {"one_sided": True}, 1, 1, False),
    "decomfl, devices share directions": ("decomfl", {}, 3, 1, False),
    "baffle": ("baffle", {"k": 3}, 1, 3, False),
    "baffle, central": ("baffle", {"k": 3, "central": True}, 2, 3, False),
    "fedzo": ("fedzo", {}, 1, 1, True),
    "fedzo, three directions on each of two devices": ("fedzo", {"b2": 3}, 2, 6, True),
    "fwdllm, in even rounds": ("fwdllm", {"variance_threshold": 0.0}, 1, 1, False),
    "fwdllm, asked twice for more": ("fwdllm", {"variance_threshold": 1e-30, "max_directions": 2}, 2, 6, False),
    "fedkseed, of 3": ("fedkseed", {"candidates": 3}, 1, 1, False),
    "fedkseed_pro, of 4096": ("fedkseed_pro", {}, 1, 1, False),
}


def estimate(name: str, settings: dict[str, Any], lab: Lab, devices: int) -> np.ndarray:
    """Return g_hat: what the method's first round subtracts from w = 0 at a step size of 1."""
    w = lab.trainable.tensors[0].flat
    w[:] = 0
    method = METHODS[name](METHODS[name].settings_type.model_validate(settings), lab)
    exchange, again = 0, True
    while again:
        round_ = Round(0, exchange, tuple(range(devices)), 1.0)
        plan = method.plan(round_)
        uploads = {device: method.local(round_, device, plan).arrays for device in round_.devices}
        assert not w.any()
        reply = method.combine(round_, uploads)
        method.apply(round_, plan, reply.arrays)
        exchange, again = exchange + 1, reply.again
    return -w.astype(np.float64)


@DISTRIBUTIONS
@pytest.mark.parametrize("case", CASES)
def test_the_estimate_has_mean_g_and_the_known_variance(case: str, gaussian: bool) -> None:
    """E g_hat = g (kappa = 1);  E|g_hat - g|^2 = (d + 1) |g|^2 / n, d - 1 for directions that all have the length sqrt(d)."""
    name, settings, devices, directions, sphere = CASES[case]
    g = a_gradient(D)
    lab = make_lab(g, gaussian=gaussian)
    found = np.array([estimate(name, settings, replace(lab, seed=seed), devices) for seed in range(DRAWS)])
    g64 = g.astype(np.float64)
    square = float(g64 @ g64)
    assert within_three_sigma(found @ g64, square)
    across = np.random.default_rng(5).standard_normal(D)
    across -= (across @ g64) / square * g64
    assert within_three_sigma(found @ across, 0.0)
    mean_error = float(np.square(found.mean(0) - g64).sum())
    expected = (D + 1 if gaussian and not sphere else D - 1) * square / directions
    assert mean_error < expected / DRAWS * (1 + 5 * math.sqrt(2 / D))  # many cases, so five sigma
    assert within_three_sigma(np.square(found - g64).sum(1), expected)
