"""What is special about DeComFL: late devices replay to the bit, and mean scalars are mean models."""

from __future__ import annotations

import numpy as np
import pytest
from test_methods import FEDERATIONS, Log
from tinyruns import Tiny, flat, make, same, weights

from fedbench.algorithms.base import Round
from fedbench.zo.direction import shared_keys
from fedbench.zo.draw import entries

CHANGES = {"federation.local_steps": 2, "zo.perturbations": 3, "federation.batch_size": 2, "model.trainable": "bitfit"}


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_a_late_device_replays_the_history_to_the_bit(distribution: str) -> None:
    """It holds the weights of its last participation; seeds and mean scalars of the rounds since are all that it gets."""
    changes = CHANGES | {"run.rounds": 7, "zo.distribution": distribution, "method.decomfl.schedule": "linear"}
    there, late = (make("decomfl", changes) for _ in range(2))
    log, tiny = Log(there), Tiny(there)
    tiny.play(2)
    for tensor, copied in zip(late.trainable, there.trainable, strict=True):
        tensor.assign(copied.values().copy())
    tiny.play(5)
    history = [(round_.number, plan["seeds"], reply["scalars"]) for round_, plan, reply in log.entries[2:]]
    assert not same(weights(late.trainable), weights(there.trainable))
    for number, seeds, scalars in history:
        assert (seeds.dtype, seeds.shape, scalars.dtype, scalars.shape) == (np.uint64, (2,), np.float32, (2, 3))
        round_ = Round(number, 0, (), late.job.settings.lr_at(number, 7))
        late.algorithm.apply(round_, {"seeds": seeds}, {"scalars": scalars})
    assert same(weights(late.trainable), weights(there.trainable))


@pytest.mark.parametrize("one_sided", [False, True])
def test_the_mean_of_scalars_is_the_mean_of_models(one_sided: bool) -> None:
    changes = CHANGES | FEDERATIONS["all"] | {"method.decomfl.one_sided": one_sided, "method.decomfl.lr": 0.02}
    built = make("decomfl", changes)
    lab, start = built.lab, weights(built.trainable)
    round_ = Round(0, 0, built.sampled(0), 0.02)
    plan = built.algorithm.plan(round_)
    keys = shared_keys(plan["seeds"], lab.perturbations)
    uploads = {device: built.algorithm.local(round_, device, plan).arrays for device in round_.devices}
    models = []
    for sent in uploads.values():
        model = {name: w.astype(np.float64) for name, w in start.items()}
        for a, key in zip(sent["scalars"], keys, strict=True):
            for tensor in lab.trainable:
                step = 0.02 / lab.perturbations * float(a)
                model[tensor.name] -= step * entries(tensor, key, gaussian=False).astype(np.float64)
        models.append(flat(model))
    built.algorithm.apply(round_, plan, built.algorithm.combine(round_, uploads).arrays)
    moved = flat(weights(built.trainable)) - flat(start)
    expected = np.mean(models, 0) - flat(start)
    assert len({model.tobytes() for model in models}) == len(models)
    assert np.linalg.norm(moved - expected) < 2e-6 * np.linalg.norm(flat(start))
    assert np.linalg.norm(moved - expected) < 1e-3 * np.linalg.norm(expected)


def test_all_devices_probe_the_same_directions_and_no_two_rounds_or_steps_share_one() -> None:
    built = make("decomfl", CHANGES)
    keys = [shared_keys(built.algorithm.plan(Round(n, 0, (), 1.0))["seeds"], 3) for n in range(3)]
    assert len({tuple(key) for key in np.concatenate(keys)}) == 3 * 2 * 3
    other = make("decomfl", CHANGES | {"run.seed": 1})
    assert (
        other.algorithm.plan(Round(0, 0, (), 1.0))["seeds"][0] != built.algorithm.plan(Round(0, 0, (), 1.0))["seeds"][0]
    )


def test_one_side_costs_one_forward_more_than_there_are_directions() -> None:
    flops = {}
    for one_sided in (False, True):
        built = make("decomfl", CHANGES | {"method.decomfl.one_sided": one_sided})
        (outcome,) = Tiny(built).play(1)
        flops[one_sided] = outcome.flops[0] / built.cut.forward_flops(2, built.lab.private(0, 0, 0).ids.shape[1])
    assert flops == {False: 2 * 2 * 3, True: 2 * (3 + 1)}
