"""What is special about FedKSeed and FedKSeed-Pro: A alone is the model, and candidates are drawn as the history says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tinyruns import Tiny, drawn, flat, make, same, weights

from fedbench.algorithms.base import Round
from fedbench.algorithms.fedkseed import FedKSeed
from fedbench.algorithms.fedkseed_pro import CLIP
from fedbench.base.errors import ConfigError
from fedbench.base.rng import generator, key

BOTH = pytest.mark.parametrize("method", ["fedkseed", "fedkseed_pro"])
CHANGES = {
    "run.rounds": 6,
    "federation.devices": 3,
    "federation.local_steps": 2,
    "federation.batch_size": 2,
    "zo.perturbations": 2,
    "model.trainable": "bitfit",
}


def start(method: str, candidates: int, **changes: Any) -> Tiny:
    return Tiny(
        make(method, CHANGES | changes | {f"method.{method}.candidates": candidates, f"method.{method}.lr": 0.01})
    )


def rebuilt(tiny: Tiny, w0: dict[str, np.ndarray], a: np.ndarray) -> np.ndarray:
    """Return w0 - lr sum_k A_k z_k in float64, by the kernels' specification."""
    built = tiny.built
    gaussian = built.lab.gaussian
    w = flat(w0)
    for k in np.flatnonzero(a):
        z = drawn(built.trainable, np.array(key(built.lab.seed, "candidate", int(k)), np.uint64), gaussian=gaussian)
        w = w - built.job.settings.lr * float(a[k]) * flat(z)
    return w


@BOTH
@pytest.mark.parametrize("candidates", [3, 4096])
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_a_alone_rebuilds_the_replica_that_walked(method: str, candidates: int, distribution: str) -> None:
    tiny = start(method, candidates, **{"zo.distribution": distribution})
    w0 = weights(tiny.built.trainable)
    tiny.play(6)
    walked = flat(weights(tiny.built.trainable))
    moved = np.linalg.norm(walked - flat(w0))
    found = rebuilt(tiny, w0, tiny.built.algorithm.state()["a"])
    assert np.linalg.norm(found - walked) < 1e-6 * np.linalg.norm(walked)
    assert np.linalg.norm(found - walked) < 1e-3 * moved


@BOTH
def test_a_late_device_that_is_given_a_goes_on_as_if_it_had_been_there(method: str) -> None:
    there, late = start(method, 64), start(method, 64)
    w0 = weights(late.built.trainable)
    assert same(w0, weights(there.built.trainable))
    there.play(4)
    newest = np.array(there.built.algorithm.state()["a"])
    late.built.algorithm.apply(Round(3, 0, (), there.built.job.settings.lr), {}, {"a": newest})
    np.testing.assert_allclose(
        flat(weights(late.built.trainable)), flat(weights(there.built.trainable)), rtol=0, atol=1e-6
    )
    assert not same(w0, weights(late.built.trainable))


@pytest.mark.parametrize(
    ("candidates", "sent"), [(5, {"sums": (5, "<f4")}), (6, {"index": (4, "<u2"), "scalars": (4, "<f4")})]
)
def test_what_is_less_travels(candidates: int, sent: dict[str, tuple[int, str]]) -> None:
    """tau = 4 pairs are 24 bytes: as much as 6 numbers, and more than 5."""
    tiny = start("fedkseed", candidates)
    algorithm, round_ = tiny.built.algorithm, Round(0, 0, (0, 1, 2), 0.01)
    assert {unit.name: (unit.shape[0], unit.dtype) for unit in algorithm.upload_units(round_, 0)} == sent
    arrays = algorithm.local(round_, 0, {}).arrays
    assert {name: (array.size, array.dtype.str) for name, array in arrays.items()} == sent
    assert (tiny.play(1)[0].up_bytes) == [min(4 * (4 + 2), 4 * candidates)] * 3


def test_sums_and_pairs_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for pairs in (True, False):
        monkeypatch.setattr(FedKSeed, "_sends_pairs", pairs)
        algorithm, round_ = start("fedkseed", 6).built.algorithm, Round(0, 0, (0, 1), 0.01)
        sent = {device: algorithm.local(round_, device, {}).arrays for device in (0, 1)}
        assert ("index" in sent[0], "sums" in sent[0]) == (pairs, not pairs)
        found.append(algorithm.combine(round_, sent).arrays["a"])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
    assert 1 < np.count_nonzero(found[0]) <= 6


@BOTH
def test_a_step_size_that_changes_is_refused_with_the_reason(method: str) -> None:
    with pytest.raises(ConfigError, match=rf"method\.{method}\.schedule: found 'linear'; allowed: 'constant', since"):
        make(method, {f"method.{method}.schedule": "linear"})


def p_of(tiny: Tiny) -> np.ndarray:
    return tiny.built.algorithm.plan(Round(0, 0, (0,), 0.1))["probabilities"].astype(np.float64)


def told(tiny: Tiny, index: list[int], scalars: list[float]) -> None:
    """Let the cloud hear of some scalars."""
    sent = {"index": np.array(index, np.uint16), "scalars": np.array(scalars, np.float32)}
    tiny.built.algorithm.combine(Round(0, 0, (0,), 0.1), {0: sent})


def test_a_flat_history_is_uniform_and_so_is_none() -> None:
    tiny = start("fedkseed_pro", 8)
    np.testing.assert_allclose(p_of(tiny), 1 / 8)
    told(tiny, list(range(8)), [2.0, -2.0] * 4)
    np.testing.assert_allclose(p_of(tiny), 1 / 8)


def test_probabilities_are_the_softmax_of_the_normalised_mean_sizes() -> None:
    tiny = start("fedkseed_pro", 4)
    told(tiny, [0, 0, 1, 2], [3.0, -3.0, -1.0, 1e9])
    m = np.array([6 / 3, 1 / 2, CLIP / 2, 0.0])  # a 0 counts in every history
    e = np.exp((m - m.min()) / (m.max() - m.min()))
    np.testing.assert_allclose(p_of(tiny), e / e.sum(), rtol=1e-6)
    assert p_of(tiny).max() / p_of(tiny).min() == pytest.approx(np.e, rel=1e-6)


def test_no_candidate_is_more_than_e_times_as_likely_as_another() -> None:
    tiny = start("fedkseed_pro", 16)
    ratios = []
    for _ in range(6):
        p = p_of(tiny)
        assert p.sum() == pytest.approx(1.0, abs=1e-6)
        ratios.append(p.max() / p.min())
        tiny.play(1)
    assert ratios[0] == 1.0
    assert all(1.5 < ratio <= np.e * (1 + 1e-6) for ratio in ratios[1:])


def test_devices_draw_by_the_probabilities_that_they_were_sent() -> None:
    tiny = start("fedkseed_pro", 4, **{"zo.perturbations": 40, "federation.local_steps": 1})
    only = {"probabilities": np.array([0, 0, 1, 0], np.float32)}
    round_ = Round(0, 0, (0,), 0.01)
    assert set(tiny.built.algorithm.local(round_, 0, only).arrays["index"]) == {2}
    even = {"probabilities": np.full(4, 0.25, np.float32)}
    assert set(tiny.built.algorithm.local(round_, 0, even).arrays["index"]) == {0, 1, 2, 3}


def test_plain_draws_are_uniform_and_differ_between_devices_and_steps() -> None:
    tiny = start("fedkseed", 4096)
    sent = [tiny.built.algorithm.local(Round(0, 0, (0, 1), 0.01), device, {}).arrays["index"] for device in (0, 1)]
    for device, index in enumerate(sent):
        expected = [generator(tiny.built.lab.seed, "kseed", 0, step, device).choice(4096, 2) for step in (0, 1)]
        np.testing.assert_array_equal(index, np.concatenate(expected))
    assert len(set(np.concatenate(sent))) == 8


def test_the_history_survives_a_stop() -> None:
    tiny, other = start("fedkseed_pro", 16), start("fedkseed_pro", 16)
    tiny.play(2)
    other.built.algorithm.restore({name: array.copy() for name, array in tiny.built.algorithm.state().items()})
    np.testing.assert_array_equal(p_of(other), p_of(tiny))
    assert np.ptp(p_of(tiny)) > 0
