"""What is special about BAFFLE: raw differences travel, one or two sides, a seed for every step."""

from __future__ import annotations

import numpy as np
import pytest
from tinyruns import Tiny, make

from fedbench.algorithms.base import Round
from fedbench.data.embedded import LENGTH
from fedbench.zo.direction import Direction, shared_keys

CHANGES = {"federation.batch_size": 2, "federation.local_steps": 3, "model.trainable": "bitfit", "method.baffle.k": 4}


@pytest.mark.parametrize(("central", "forwards"), [(False, 4 + 1), (True, 2 * 4)])
def test_differences_are_those_of_the_losses_and_cost_what_the_formula_says(central: bool, forwards: int) -> None:
    built = make("baffle", CHANGES | {"method.baffle.central": central})
    lab, round_ = built.lab, Round(2, 1, (0, 1, 2), 0.1)
    plan = built.algorithm.plan(round_)
    sent = built.algorithm.local(round_, 1, plan).arrays["scalars"]
    assert lab.meter.take() == forwards * built.cut.forward_flops(2, LENGTH)
    batch = lab.private(2, 1, 1)
    for d, key in zip(sent, shared_keys(plan["seeds"], 4), strict=True):
        plus, minus = lab.stream.losses(batch, Direction(key), lab.epsilon)
        centre = lab.stream.loss(batch, Direction(key), 0.0)
        assert d == pytest.approx((plus - minus) / 2 if central else plus - centre, abs=2e-7)
    assert np.ptp(sent) > 1e-5


def test_every_step_has_a_seed_of_its_own_that_all_devices_share() -> None:
    built = make("baffle", CHANGES)
    seeds = {int(built.algorithm.plan(Round(n, e, (0,), 1.0))["seeds"][0]) for n in range(4) for e in range(3)}
    assert len(seeds) == 12
    (outcome,) = Tiny(built).play(1)
    assert (outcome.exchanges, outcome.plan_bytes, outcome.reply_bytes) == (3, 3 * 8, 3 * 4 * 4)
