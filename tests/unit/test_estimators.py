"""The estimators' moments on losses of known form, by the real stream and the real updates (methods.md 1.2, 2.15, 4.1).

Every draw is keyed, so each test is one fixed experiment; bounds are three standard deviations of what is averaged.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from tinycuts import ScoreCut, TwoBlockCut, score_batch
from tinyruns import drawn, never

from fedbench.algorithms.base import Algorithm, Lab, Round
from fedbench.algorithms.cooperllm import CooperLLM
from fedbench.algorithms.cooperllm import Settings as CooperSettings
from fedbench.algorithms.fedmezo import FedMeZO
from fedbench.algorithms.fedmezo import Settings as MezoSettings
from fedbench.algorithms.fedspzo import FedSPZO
from fedbench.algorithms.fedspzo import Settings as SplitSettings
from fedbench.base.account import Meter
from fedbench.base.arrays import Arrays
from fedbench.base.errors import NumericsError
from fedbench.models.cut import Cut
from fedbench.models.trainable import select
from fedbench.zo.direction import AT_WEIGHTS, Direction, Terms
from fedbench.zo.estimate import central
from fedbench.zo.kernels import cpu
from fedbench.zo.layout import Cutting, Layout
from fedbench.zo.span import Mix, Span
from fedbench.zo.stream import Stream
from fedbench.zo.twoblock import Estimator, derivatives, picks
from fedbench.zo.update import subtract

DRAWS = 10_000
DISTRIBUTIONS = pytest.mark.parametrize("gaussian", [False, True], ids=["rademacher", "gaussian"])
NAME = "head.linear.weight"


def make_lab(gradient: np.ndarray, *, count: int = 1, gaussian: bool = False, square: bool = False) -> Lab:
    """Return a lab whose loss is a constant plus gradient . w (minus the square of that over 2), on every device."""
    return lab_of(ScoreCut(-gradient, square=square), count=count, gaussian=gaussian)


def lab_of(cut: Cut, *, count: int = 1, gaussian: bool = False) -> Lab:
    """Return a lab whose devices all have the same loss, that of a cut."""
    trainable, meter = select(cut, "full"), Meter()
    return Lab(
        seed=11,
        rounds=1,
        devices=1,
        sampled=1,
        local_steps=1,
        perturbations=count,
        epsilon=0.5,  # a linear loss has no bias, so a large step costs nothing and resolves best
        cut=cut,
        trainable=trainable,
        stream=Stream(cut, trainable, meter, gaussian=gaussian),
        meter=meter,
        private=lambda *_: score_batch(),
        public=never,
        public_rows=never,
    )


def g_hat(algorithm: Algorithm, plan: Arrays, devices: int = 1, number: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the method's own mean estimate (from its update of w = 0 at a step size of 1) and its scalars."""
    algorithm.lab.trainable.tensors[0].flat[:] = 0
    round_ = Round(number, 0, tuple(range(devices)), 1.0)
    uploads = {device: algorithm.local(round_, device, plan).arrays for device in round_.devices}
    reply = algorithm.combine(round_, uploads).arrays
    algorithm.apply(round_, plan, reply)
    estimate = -algorithm.lab.trainable.tensors[0].flat.astype(np.float64)
    algorithm.lab.trainable.tensors[0].flat[:] = 0
    return estimate, reply["scalars"].reshape(-1).astype(np.float64)


def directions(lab: Lab, count: int, devices: int = 1) -> np.ndarray:
    """Return the z of round 0 in device order, float64 [devices * count, d]."""
    keys = np.concatenate([lab.directions(0, device, range(1), count) for device in range(devices)])
    z = np.empty((len(keys), lab.trainable.size), np.float32)
    for row, stream in zip(z, cpu.stream_keys(keys, lab.trainable.tensors[0].key), strict=True):
        cpu.draw(stream, 0, row, lab.gaussian)
    return z.astype(np.float64)


def a_gradient(d: int, seed: int = 0, length: float = 2.0) -> np.ndarray:
    g = np.random.default_rng(seed).standard_normal(d).astype(np.float32)
    return (g * np.float32(length / np.linalg.norm(g))).astype(np.float32)


def within_three_sigma(samples: np.ndarray, expected: float) -> bool:
    return abs(float(samples.mean()) - expected) < 3 * float(samples.std()) / math.sqrt(len(samples))


@DISTRIBUTIONS
def test_the_isotropic_estimate_is_unbiased_with_the_known_variance(gaussian: bool) -> None:
    """E g_hat = g;  E|g_hat - g|^2 = (d + 1) |g|^2 for Gaussian and (d - 1) |g|^2 for Rademacher directions."""
    d = 64
    g = a_gradient(d)
    lab = make_lab(g, count=DRAWS, gaussian=gaussian)
    mean, a = g_hat(FedMeZO(MezoSettings(), lab), {})
    z = directions(lab, DRAWS)
    np.testing.assert_allclose(a, z @ g.astype(np.float64), atol=2e-4)  # the scalars are directional derivatives
    np.testing.assert_allclose(mean, (a[:, None] * z).mean(0), atol=1e-5)  # and the update is their mean
    each = a[:, None] * z
    g64 = g.astype(np.float64)
    square = float(g64 @ g64)
    assert within_three_sigma(each @ g64, square)  # kappa = 1 along g
    across = np.random.default_rng(5).standard_normal(d)
    across -= (across @ g64) / square * g64
    assert within_three_sigma(each @ across, 0.0)  # and nothing across it
    assert float(np.square(mean - g64).sum()) < (d + 1) * square / DRAWS * (1 + 3 * math.sqrt(2 / d))
    errors = np.square(each - g64).sum(1)
    assert within_three_sigma(errors, (d + 1 if gaussian else d - 1) * square)


DY, DZ, P1, P2 = 7, 5, 2, 3
G_Y, G_Z = a_gradient(DY, 1, 2.0), a_gradient(DZ, 2, 1.0)


def two_block_estimates(
    estimator: Estimator, g_y: np.ndarray, estimates: int, *, gaussian: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return independent estimates of g_y and G_Z, float64 [estimates, d]; their mean is the method's own update."""
    lab = lab_of(TwoBlockCut(-g_y, -G_Z), gaussian=gaussian)
    method = FedSPZO(SplitSettings(estimator=estimator, split=0, p1=P1, p2=P2, lr=1.0, lr_ratio=1.0), lab)
    round_ = Round(0, 0, tuple(range(estimates)), 1.0)
    uploads = {device: method.local(round_, device, {}).arrays for device in round_.devices}
    scalars = method.combine(round_, uploads).arrays["scalars"]
    found: list[np.ndarray] = []
    count = P1 * P2 if estimator in ("A", "Ac", "D") else max(P1, P2)
    for block, tensor in enumerate(lab.trainable):
        weights = derivatives(estimator, scalars, P1, P2)[block].astype(np.float64)
        each = []
        for device, row in enumerate(weights):
            keys = picks(estimator, lab.directions(0, device, range(1), count), P1, P2)[block]
            z = np.empty((len(keys), tensor.size), np.float32)
            for out, stream in zip(z, cpu.stream_keys(np.ascontiguousarray(keys), tensor.key), strict=True):
                cpu.draw(stream, 0, out, gaussian)
            each.append(row @ z.astype(np.float64) / len(z))
        found.append(np.array(each))
    method.apply(round_, {}, {"scalars": scalars})
    for tensor, each in zip(lab.trainable, found, strict=True):
        np.testing.assert_allclose(-tensor.flat, np.mean(each, axis=0), atol=1e-4)
    return found[0], found[1]


def two_block_errors(estimator: str, *, gaussian: bool) -> tuple[float, float]:
    """Return E|error|^2 of g_y and of g_z on a linear loss (methods.md 2.14; D + 1 for Gaussian, D - 1 for Rademacher)."""
    y2, z2 = (float(np.square(g.astype(np.float64)).sum()) for g in (G_Y, G_Z))
    own_y, own_z = ((d + (1 if gaussian else -1)) * square for d, square in ((DY, y2), (DZ, z2)))
    if estimator in ("A", "Ac"):
        error_y = (own_y + DY * z2 / P2) / P1
        if estimator == "A":
            return error_y, (own_z + DZ * y2) / (P1 * P2)
        centred = 0.0 if gaussian else 2 / P2  # of E v^4 - 1 where the mean of P2 entries is taken off
        return error_y, (own_z + centred * z2) / (P1 * (P2 - 1))
    return own_y / P1, own_z / (P1 * P2 if estimator == "D" else P2)


@DISTRIBUTIONS
@pytest.mark.parametrize("estimator", ["A", "Ac", "B", "B1", "D"])
def test_every_split_estimate_is_unbiased_with_the_known_second_moment(estimator: Estimator, gaussian: bool) -> None:
    estimates = two_block_estimates(estimator, G_Y, 500, gaussian=gaussian)
    expected = two_block_errors(estimator, gaussian=gaussian)
    for each, g, error in zip(estimates, (G_Y, G_Z), expected, strict=True):
        for direction in (g.astype(np.float64), np.random.default_rng(5).standard_normal(len(g))):
            assert within_three_sigma(each @ direction, float(g @ direction))
        assert within_three_sigma(np.square(each - g).sum(1), error)


@pytest.mark.parametrize(("estimator", "free"), [("A", False), ("Ac", True), ("B", True), ("B1", True), ("D", True)])
def test_block_ones_noise_is_absent_from_block_two_but_in_the_plain_chain(estimator: Estimator, free: bool) -> None:
    plain, steep = (two_block_estimates(estimator, scale * G_Y, 20, gaussian=False)[1] for scale in (0.0, 5.0))
    assert (float(np.abs(plain - steep).max()) < 1e-3) == free


@pytest.mark.parametrize(("alpha", "beta", "gaussian"), [(0.5, 1.0, False), (0.9, 2.0, True)])
def test_the_guided_estimate_has_the_mean_and_the_second_moment_of_its_covariance(
    alpha: float, beta: float, gaussian: bool
) -> None:
    """E g_hat = Sigma g with Sigma = beta^2 (alpha/n I + (1-alpha) V V'), and E a^2 = g' Sigma g.

    With one direction z and the guide's sign fixed, a u has terms odd in z beside those of Sigma; they vanish in the
    mean. Its second moment: u = x + y V with x = s z, y^2 = beta^2 (1-alpha).
    """
    n = 64
    g, v = a_gradient(n).astype(np.float64), a_gradient(n, 3, 1.0).astype(np.float64)
    v += 0.8 * g / np.linalg.norm(g)
    v /= np.linalg.norm(v)
    lab = make_lab(g.astype(np.float32), count=DRAWS, gaussian=gaussian)
    settings = CooperSettings(alpha=alpha, beta=beta, h=0.5)
    plan = {NAME: v.astype(np.float32).reshape(1, n)}
    method = CooperLLM(settings, lab)
    mean, a = g_hat(method, plan)
    u = beta * (math.sqrt(alpha / n) * directions(lab, DRAWS) + math.sqrt(1 - alpha) * v)
    np.testing.assert_allclose(a, u @ g, atol=5e-4)
    each = a[:, None] * u
    np.testing.assert_allclose(mean, each.mean(0), atol=1e-5)
    kappa, along = beta**2 * alpha / n, beta**2 * (1 - alpha)
    expected = kappa * g + along * float(v @ g) * v
    for direction in (g, v, np.random.default_rng(7).standard_normal(n)):
        assert within_three_sigma(each @ direction, float(expected @ direction))
    assert within_three_sigma(a**2, float(expected @ g))
    # |u|^2: n kappa + along in the mean, so u is about beta long whatever alpha and n.
    assert within_three_sigma(np.square(u).sum(1), beta**2)
    square, vg = float(g @ g), float(v @ g)
    fourth = (n + 2 if gaussian else n) * kappa**2 * square  # E[(x.g)^2 |x|^2] beyond Rademacher's exact |x|^2 = n s^2
    second = fourth + kappa * along * (square + n * vg**2 + 4 * vg**2) + along**2 * vg**2
    assert within_three_sigma(np.square(each).sum(1), second)


@pytest.mark.parametrize("queries", [1, 4, 16])
@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_more_queries_bring_the_guided_estimate_up_to_the_guides_own_angle(queries: int, alpha: float) -> None:
    """cos(g_hat, g) ~ rho / sqrt(1 + alpha / ((1 - alpha) Q)), where the isotropic signal alpha/n is small."""
    n, rho, repeats = 3000, 0.6, 40
    g = a_gradient(n, length=1.0).astype(np.float64)
    across = a_gradient(n, 1, 1.0).astype(np.float64)
    across -= float(across @ g) * g
    v = rho * g + math.sqrt(1 - rho**2) * across / np.linalg.norm(across)
    lab = make_lab(g.astype(np.float32))
    method = CooperLLM(CooperSettings(alpha=alpha, h=0.5), lab)
    plan = {NAME: v.astype(np.float32).reshape(1, n)}
    cosines = []
    for number in range(repeats):
        estimate, _ = g_hat(method, plan, devices=queries, number=number)
        cosines.append(float(estimate @ g) / float(np.linalg.norm(estimate) * np.linalg.norm(g)))
    expected = rho / math.sqrt(1 + alpha / ((1 - alpha) * queries))
    assert np.mean(cosines) == pytest.approx(expected, rel=0.02)
    assert max(cosines) < rho + 0.03


def test_alpha_one_is_the_isotropic_estimate_scaled_by_beta_squared_over_n() -> None:
    """The scale trap of methods.md 4: kappa = beta^2 / n."""
    n, count = 64, 500
    g = a_gradient(n)
    plain, _ = g_hat(FedMeZO(MezoSettings(), make_lab(g, count=count)), {})
    settings = CooperSettings(alpha=1.0, beta=3.0, h=0.5)
    guide = {NAME: a_gradient(n, 3, 1.0).reshape(1, n)}
    scaled, _ = g_hat(CooperLLM(settings, make_lab(g, count=count)), guide)
    np.testing.assert_allclose(scaled, plain * 9.0 / n, atol=2e-4 * 9.0 / n * float(np.linalg.norm(g)) * 10)


@DISTRIBUTIONS
def test_two_sided_differences_have_no_bias_on_a_quadratic(gaussian: bool) -> None:
    """a = z . grad f(w) whatever the step, since the even part cancels (methods.md 4.1)."""
    d = 40
    x = a_gradient(d)
    lab = make_lab(-x, square=True, gaussian=gaussian)
    point = a_gradient(d, 9, 1.5)
    lab.trainable.tensors[0].flat[:] = point
    gradient = -float(x.astype(np.float64) @ point) * x.astype(np.float64)  # of OFFSET - (x . w)^2 / 2
    for h in (1e-2, 0.1, 1.0):
        for key in lab.directions(0, 0, range(1), 50):
            a = central(*lab.stream.losses(score_batch(), Direction(key), h), h)
            z = drawn(lab.trainable, key, gaussian=gaussian)[NAME].astype(np.float64)
            assert a == pytest.approx(float(z @ gradient), abs=1e-4 / h**0.5)


def test_a_mean_over_directions_is_a_mean_and_not_a_sum() -> None:
    g = a_gradient(32)
    for count, devices in ((1, 1), (8, 1), (4, 3)):
        lab = make_lab(g, count=count)
        estimate, a = g_hat(FedMeZO(MezoSettings(), lab), {}, devices)
        z = directions(lab, count, devices)
        np.testing.assert_allclose(estimate, a @ z / (count * devices), atol=1e-6)


def test_an_update_subtracts_terms_and_counts_the_entries_that_it_rebuilt() -> None:
    lab = make_lab(a_gradient(50))
    tensor = lab.trainable.tensors[0]
    tensor.flat[:] = 1.0
    guide = Mix(Span(Cutting(Layout(lab.trainable, 1)), {NAME: np.full(50, 2.0, np.float32)}), {0: None})
    keys = lab.directions(0, 0, range(1), 3)
    rebuilt = subtract(lab.trainable, Terms(keys, np.array([0.5, -1, 2], np.float32), guide, 0.25), gaussian=False)
    z = [drawn(lab.trainable, key)[NAME] for key in keys]
    assert np.array_equal(tensor.flat, 1.0 - 0.5 * z[0] + z[1] - 2 * z[2] - 0.5)
    assert rebuilt == 3 * 50
    before = tensor.flat.copy()
    assert subtract(lab.trainable, AT_WEIGHTS, gaussian=False) == 0
    assert np.array_equal(tensor.flat, before)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("losses", [(math.nan, 1.0), (1.0, math.inf), (1e300, -1e300)])
def test_a_difference_that_is_no_number_is_an_error(losses: tuple[float, float]) -> None:
    with pytest.raises(NumericsError, match="is not a finite number"):
        central(*losses, 1e-3)


def test_the_central_difference_is_scaled_once() -> None:
    value: Any = central(1.25, 1.0, 0.05)
    assert value == np.float32(2.5)
    assert value.dtype == np.float32
