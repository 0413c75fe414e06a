"""What is special about FedZO: directions of length sqrt(d), and a walk that comes back as a change of the model."""

from __future__ import annotations

import numpy as np
import pytest
from tinyruns import drawn, flat, make

from fedbench.algorithms.base import Round
from fedbench.data.embedded import LENGTH
from fedbench.zo.direction import Direction

CHANGES = {"federation.batch_size": 2, "model.trainable": "bitfit"}


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_a_step_is_the_papers_formula_on_the_unit_sphere(distribution: str) -> None:
    """g = d / b2 sum [f(w + mu v) - f(w)] / mu v with |v| = 1 and mu = eps sqrt(d)."""
    gaussian, b2, lr = distribution == "gaussian", 3, 0.05
    built = make("fedzo", CHANGES | {"zo.distribution": distribution, "method.fedzo.b2": b2})
    lab, d = built.lab, built.trainable.size
    mu = lab.epsilon * np.sqrt(d)
    batch = lab.private(4, 0, 2)
    centre = lab.stream.loss(batch, Direction(lab.directions(4, 2, range(1), 1)[0]), 0.0)
    g = np.zeros(d)
    for key in lab.directions(4, 2, range(1), b2):
        z = drawn(built.trainable, key, gaussian=gaussian)
        v = flat(z) / np.linalg.norm(flat(z))
        length = mu / np.linalg.norm(flat(z))  # mu v as a multiple of z
        g += d / b2 * (lab.stream.loss(batch, Direction(key), length) - centre) / mu * v
    sent = built.algorithm.local(Round(4, 0, (0, 2), lr), 2, {}).arrays
    assert np.linalg.norm(flat(sent) + lr * g) < 1e-3 * lr * np.linalg.norm(g)


def test_local_steps_go_on_from_each_other_and_cost_one_forward_for_the_centre() -> None:
    changes = CHANGES | {"zo.perturbations": 2, "federation.local_steps": 3}
    built = make("fedzo", changes)
    longer = built.algorithm.local(Round(0, 0, (0,), 0.05), 0, {}).arrays
    assert built.lab.meter.take() == 3 * (2 + 1) * built.cut.forward_flops(2, LENGTH)
    once = make("fedzo", changes | {"federation.local_steps": 1}).algorithm
    stood = [once.local(Round(0, 0, (0,), 0.05), 0, {}).arrays]
    assert np.linalg.norm(flat(longer)) > 1.2 * np.linalg.norm(flat(stood[0]))
    shorter = make("fedzo", changes | {"federation.local_steps": 2}).algorithm.local(Round(0, 0, (0,), 0.05), 0, {})
    last = flat(longer) - flat(shorter.arrays)
    assert np.linalg.norm(last) > 0
    still = make("fedzo", changes).algorithm
    tiny = 1e-12
    unmoved = {k: v / tiny * 0.05 for k, v in still.local(Round(0, 0, (0,), tiny), 0, {}).arrays.items()}
    assert np.linalg.norm(flat(unmoved) - flat(longer)) > 0.01 * np.linalg.norm(flat(longer)), "the walk was ignored"


def test_as_many_directions_as_perturbations_unless_b2_says_otherwise() -> None:
    flops = []
    for b2 in (0, 5):
        built = make("fedzo", CHANGES | {"zo.perturbations": 2, "method.fedzo.b2": b2})
        built.algorithm.local(Round(0, 0, (0,), 0.05), 0, {})
        flops.append(built.lab.meter.take() / built.cut.forward_flops(2, LENGTH))
    assert flops == [2 + 1, 5 + 1]
