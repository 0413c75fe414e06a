"""What is special about FwdLLM: directions chosen towards the last estimate, and a verdict on the spread of the present one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from tinyruns import Tiny, drawn, flat, make, same, weights

from fedbench.algorithms.base import Round
from fedbench.algorithms.fwdllm import CANDIDATES, Answers, FwdLLM
from fedbench.base.errors import ConfigError
from fedbench.data.embedded import LENGTH
from fedbench.run.build import Built
from fedbench.zo.direction import Direction
from fedbench.zo.ranges import OnDemand

CHANGES = {
    "run.rounds": 6,
    "federation.devices": 3,
    "federation.batch_size": 2,
    "model.trainable": "bitfit",
    "method.fwdllm.lr": 0.02,
}
NO_CHECK = {"method.fwdllm.variance_threshold": 0}


def start(changes: Mapping[str, Any]) -> tuple[Tiny, FwdLLM]:
    tiny = Tiny(make("fwdllm", CHANGES | dict(changes)))
    assert isinstance(tiny.built.algorithm, FwdLLM)
    return tiny, tiny.built.algorithm


def candidates(
    built: Built, number: int, device: int, k: int = 0, *, gaussian: bool = False
) -> list[dict[str, np.ndarray]]:
    """Return the draws among which v_k of a device is chosen."""
    keys = built.lab.directions(number, device, range(1), CANDIDATES * (k + 1))[CANDIDATES * k :]
    return [drawn(built.trainable, key, gaussian=gaussian) for key in keys]


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    left, right = left.astype(np.float64), right.astype(np.float64)
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_odd_rounds_probe_along_the_draws_nearest_to_the_last_estimate(distribution: str) -> None:
    gaussian = distribution == "gaussian"
    tiny, algorithm = start(NO_CHECK | {"zo.distribution": distribution})
    tiny.play(1)
    last, built = algorithm.state(), tiny.built
    for device in (0, 2):
        among = candidates(built, 1, device, gaussian=gaussian)
        v, better = {}, []
        for name in last:
            cosines = [cosine(z[name], last[name]) for z in among]
            v[name] = among[int(np.argmax(cosines))][name]
            better.append(max(cosines) - np.mean(cosines))
        assert min(better) > 0
        assert cosine(flat(v), flat(last)) > max(cosine(flat(z), flat(last)) for z in among)
        batch, h = built.lab.private(1, 0, device), built.lab.epsilon
        guide = OnDemand(v.__getitem__)
        plus, minus = built.lab.stream.losses(batch, Direction(np.zeros(2, np.uint64), 0.0, guide, 1.0), h)
        found = algorithm.local(Round(1, 0, (0, 1, 2), 0.02), device, {}).arrays["scalars"]
        assert found[0] == np.float32((plus - minus) / (2 * h))


def test_even_rounds_probe_along_plain_draws() -> None:
    tiny, algorithm = start(NO_CHECK | {"zo.perturbations": 2})
    tiny.play(2)
    lab = tiny.built.lab
    found = algorithm.local(Round(2, 0, (0, 1, 2), 0.02), 1, {}).arrays["scalars"]
    batch = lab.private(2, 0, 1)
    for a, key in zip(found, lab.directions(2, 1, range(1), 2), strict=True):
        plus, minus = lab.stream.losses(batch, Direction(key), lab.epsilon)
        assert a == np.float32((plus - minus) / (2 * lab.epsilon))


def test_the_last_estimate_is_what_the_weights_moved_by() -> None:
    tiny, algorithm = start(NO_CHECK | {"federation.local_steps": 2})
    for number in range(3):
        before = weights(tiny.built.trainable)
        (outcome,) = tiny.play(1)
        assert outcome.exchanges == 2
        moved = flat(weights(tiny.built.trainable)) - flat(before)
        assert cosine(moved, -flat(algorithm.state())) > 0.1, number  # two steps, of which this is the second
    once, alone = start(NO_CHECK)
    before = weights(once.built.trainable)
    once.play(1)
    moved = flat(weights(once.built.trainable)) - flat(before)
    np.testing.assert_allclose(moved, -0.02 * flat(alone.state()), atol=1e-7)


VERDICTS = {
    "never content": ({"method.fwdllm.variance_threshold": 1e-30, "method.fwdllm.max_directions": 3}, 1 + 3),
    "no retries allowed": ({"method.fwdllm.variance_threshold": 1e-30, "method.fwdllm.max_directions": 0}, 1),
    "content at once": ({"method.fwdllm.variance_threshold": 1e30}, 1),
    "no check": (NO_CHECK, 1),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_the_threshold_says_how_often_devices_are_asked(case: str) -> None:
    changes, exchanges = VERDICTS[case]
    tiny, _ = start(changes | {"federation.local_steps": 2, "zo.perturbations": 2})
    for outcome in tiny.play(3):
        assert outcome.exchanges == 2 * exchanges
        directions = 2 * (2 + exchanges - 1)
        assert outcome.up_bytes == [4 * directions] * 3
        assert outcome.flops == [directions * 2 * tiny.built.cut.forward_flops(2, LENGTH)] * 3


def by_hand(built: Built, checked: str, scalars: list[np.ndarray]) -> float:
    """Return the variance of round 0 in one tensor, in float64, from contributions written out."""
    contributions, done = [], 0
    for sent in scalars:
        for device, row in enumerate(sent):
            keys = built.lab.directions(0, device, range(1), done + len(row))[done:]
            contributions += [
                float(a) * drawn(built.trainable, key)[checked].astype(np.float64)
                for a, key in zip(row, keys, strict=True)
            ]
        done += sent.shape[1]
    half = len(contributions) // 2
    x, y = np.mean(contributions[:half], 0), np.mean(contributions[half:], 0)
    return float(np.mean([np.var([p, q], ddof=1) for p, q in zip(x, y, strict=True)]))


@pytest.mark.parametrize("index", [-1, 0, 3])
def test_the_variance_is_that_of_two_halves_in_one_tensor(index: int) -> None:
    tiny, algorithm = start({"method.fwdllm.variance_tensor": index, "zo.perturbations": 2})
    tensors = tiny.built.trainable.tensors
    checked = tensors[index if index >= 0 else len(tensors) // 2].name
    stream = np.random.default_rng(0)
    scalars = [stream.standard_normal((3, n)).astype(np.float32) for n in (2, 1, 1)]
    round_ = Round(0, 0, (0, 1, 2), 0.1)
    for asked in (1, 2, 3):
        found = algorithm.variance(round_, [Answers(round_.devices, sent) for sent in scalars[:asked]])
        assert found == pytest.approx(by_hand(tiny.built, checked, scalars[:asked]), rel=1e-5)


def test_devices_are_asked_until_the_variance_falls_below_the_threshold() -> None:
    """Between the extremes: the exchange after which a step is made is the first one below the threshold."""
    tiny, algorithm = start({"method.fwdllm.variance_threshold": 0.05, "method.fwdllm.max_directions": 10})
    round_, seen = Round(0, 0, (0, 1, 2), 0.02), []
    again = True
    while again:
        uploads = {device: algorithm.local(round_, device, {}).arrays for device in round_.devices}
        reply = algorithm.combine(round_, uploads)
        seen.append(Answers(round_.devices, reply.arrays["scalars"]))
        before = weights(tiny.built.trainable)
        algorithm.apply(round_, {}, reply.arrays)
        again = reply.again
        assert same(before, weights(tiny.built.trainable)) == again
    variances = [algorithm.variance(round_, seen[: n + 1]) for n in range(len(seen))]
    below = [variance <= 0.05 for variance in variances]
    assert below[:-1] == [False] * (len(seen) - 1)
    assert below[-1] or len(seen) == 11


def test_more_directions_are_new_ones_on_the_same_batch() -> None:
    tiny, algorithm = start({"method.fwdllm.variance_threshold": 1e-30, "method.fwdllm.max_directions": 2})
    lab, round_ = tiny.built.lab, Round(0, 0, (0, 1, 2), 0.02)
    batch = lab.private(0, 0, 1)
    for k, key in enumerate(lab.directions(0, 1, range(1), 3)):
        uploads = {device: algorithm.local(round_, device, {}).arrays for device in round_.devices}
        plus, minus = lab.stream.losses(batch, Direction(key), lab.epsilon)
        assert uploads[1]["scalars"] == [np.float32((plus - minus) / (2 * lab.epsilon))], k
        algorithm.apply(round_, {}, algorithm.combine(round_, uploads).arrays)


def test_a_single_contribution_has_no_spread_to_judge() -> None:
    tiny, algorithm = start({"federation.devices": 1, "method.fwdllm.variance_threshold": 1e-30})
    assert np.isnan(algorithm.variance(Round(0, 0, (0,), 0.1), [Answers((0,), np.ones((1, 1), np.float32))]))
    assert tiny.play(1)[0].exchanges == 1


def test_h_is_epsilon_unless_it_is_given() -> None:
    assert start({"zo.epsilon": 0.003})[1].query_radius == 0.003
    assert start({"zo.epsilon": 0.003, "method.fwdllm.h": 0.01})[1].query_radius == 0.01


def test_a_tensor_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.fwdllm\.variance_tensor: found 999; allowed: -1 \.\. \d+\."):
        start({"method.fwdllm.variance_tensor": 999})
