"""Guided methods beyond the canonical form: where guides come from, how they are weighed, and what regresses them out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from test_estimators import NAME, a_gradient, directions, g_hat, make_lab, within_three_sigma
from tinyruns import Tiny, flat, make, same, weights, written_out

from fedbench.algorithms.base import Round
from fedbench.algorithms.cooperllm import CooperLLM
from fedbench.algorithms.cooperllm import Settings as CooperSettings
from fedbench.algorithms.cooperllm_plus import CooperLLMPlus
from fedbench.algorithms.cooperllm_plus import Settings as PlusSettings
from fedbench.base.errors import ConfigError, NumericsError
from fedbench.run.build import Built
from fedbench.run.callbacks.checkpoint import SaveCheckpoint, take_up
from fedbench.run.ckpt import Checkpoint, Store
from fedbench.zo.estimate import regressed
from fedbench.zo.guide import by_class, gradient, mean_gradient, unit_guides
from fedbench.zo.layout import Cutting, Layout
from fedbench.zo.span import Span

SMALL: dict[str, Any] = {"model.trainable": "bitfit", "data.public_per_class": 20, "zo.perturbations": 2}
KINDS = {"public": 1, "batches": 3, "classes": 4, "layers": 7, "random": 1}
N = 64


def guides_of(built: Built) -> np.ndarray:
    """Return the guides that the cloud would send now, one row each over all trainable entries, float64 [m, n]."""
    method: Any = built.algorithm
    _, plan = method._guides.whole(Round(0, 0, built.sampled(0), 0.1))
    layout = method._guides.layout
    rows = []
    for j in range(layout.count):
        parts = {}
        for t in built.trainable:
            own = j in layout.of(t)
            parts[t.name] = plan[layout.name(j, t)] if own else np.zeros(tuple(t.parameter.shape))
        rows.append(flat(parts))
    return np.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_guides_are_orthonormal_and_as_many_as_said(kind: str) -> None:
    built = make("cooperllm", SMALL | {"method.cooperllm.guide": kind, "method.cooperllm.guides": 3})
    v = guides_of(built)
    assert len(v) == KINDS[kind]
    np.testing.assert_allclose(v @ v.T, np.eye(len(v)), atol=1e-6)


def test_messages_move_after_every_stage_of_the_clouds_passes() -> None:
    lab, polled = make("cooperllm", {"data.public_per_class": 4}).lab, list[int]()
    batch = next(iter(lab.public_rows()))
    loss, grads = gradient(lab.cut, lab.trainable, batch, lab.meter, lambda: polled.append(1))
    forwards = backwards = lab.cut.stages - 1
    assert len(polled) == forwards + backwards
    plain = lab.cut.head.losses(lab.cut(batch), batch).mean()
    assert loss == float(plain.detach())
    expected = torch.autograd.grad(plain, lab.trainable.parameters, allow_unused=True)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True) if b is not None)


@pytest.mark.parametrize(("kind", "inside"), [("public", True), ("classes", True), ("layers", True), ("random", False)])
def test_the_public_gradient_lies_in_the_guides_span(kind: str, inside: bool) -> None:
    built = make("cooperllm", SMALL | {"method.cooperllm.guide": kind})
    v, lab = guides_of(built), built.lab
    _, grads = mean_gradient(lab.cut, lab.trainable, lab.public_rows(), lab.meter)
    g = flat({t.name: grad.numpy() for t, grad in zip(lab.trainable, grads, strict=True)})
    share = float(np.linalg.norm(v @ g) / np.linalg.norm(g))
    assert (share > 0.9999) == inside
    assert inside or share < 0.2


def test_classes_share_out_the_public_rows() -> None:
    built = make("cooperllm", SMALL)
    groups = by_class(built.lab.public_rows(), 4)
    assert [{int(label) for batch in own for label in batch.labels} for own in groups] == [{0}, {1}, {2}, {3}]
    assert sum(len(batch.labels) for own in groups for batch in own) == len(built.splits.public)


def test_guides_that_depend_on_each_other_are_refused() -> None:
    built = make("cooperllm", SMALL)
    layout = Layout(built.trainable, 2)
    grads = [torch.ones_like(p) for p in built.trainable.parameters]
    with pytest.raises(NumericsError, match="Guide 1 lies in the span of the 1 before it"):
        unit_guides(layout, [grads, [2 * g for g in grads]])
    with pytest.raises(NumericsError, match="exactly zero"):
        unit_guides(Layout(built.trainable, 1), [[0 * g for g in grads]])


@pytest.mark.parametrize("method", ["cooperllm", "cooperllm_plus"])
@pytest.mark.parametrize("kind", KINDS)
def test_guides_of_layers_travel_as_one_and_the_others_once_each(kind: str, method: str) -> None:
    changes = {f"method.{method}.guide": kind, f"method.{method}.guides": 3, "run.rounds": 2}
    built = make(method, SMALL | changes)
    outcomes = Tiny(built).play(2)
    travelling = 1 if kind == "layers" else KINDS[kind]
    assert [outcome.plan_bytes for outcome in outcomes] == [4 * built.trainable.size * travelling] * 2
    assert np.isfinite(flat(weights(built.trainable))).all()


def test_a_mix_of_guides_is_their_weighted_sum() -> None:
    for kind, m in KINDS.items():
        built = make("cooperllm", SMALL | {"method.cooperllm.guide": kind, "method.cooperllm.guides": 3})
        method: Any = built.algorithm
        plan = method.plan(Round(0, 0, built.sampled(0), 0.1))
        span = Span(Cutting(method._guides.layout, plan), plan)
        coef = np.random.default_rng(m).standard_normal(m)
        guide, factor = span.mix(coef)
        mixed = factor * flat({t.name: written_out(guide, t) for t in built.trainable})
        np.testing.assert_allclose(mixed, coef @ guides_of(built), atol=1e-6, err_msg=kind)


@pytest.mark.parametrize("every", [0, 1, 2, 3])
def test_a_stale_guide_is_sent_once_and_serves_until_the_next(every: int) -> None:
    built = make("cooperllm", SMALL | {"run.rounds": 6, "method.cooperllm.guide_every": every})
    sent = [outcome.plan_bytes > 0 for outcome in Tiny(built).play(6)]
    assert sent == [number == 0 if every == 0 else number % every == 0 for number in range(6)]
    fresh = make("cooperllm", SMALL | {"run.rounds": 6})
    Tiny(fresh).play(6)
    assert same(weights(built.trainable), weights(fresh.trainable)) == (every == 1)


@pytest.mark.parametrize("kind", ["public", "layers", "classes"])
@pytest.mark.parametrize("method", ["cooperllm", "cooperllm_plus"])
def test_a_stop_between_two_guides_changes_no_bit(method: str, kind: str, tmp_path: Any) -> None:
    changes = SMALL | {"run.rounds": 6, f"method.{method}.guide_every": 3, f"method.{method}.guide": kind}
    straight = Tiny(make(method, changes, evaluated=4))
    straight.run()
    first = Tiny(make(method, changes, evaluated=4))
    store = Store(tmp_path, "config", pytest.fail)
    first.metrics.started()
    for _ in range(4):
        first.metrics.played(*first.play(1))
    SaveCheckpoint(store, first.runner, first.metrics, 0).save()
    second = Tiny(make(method, changes, evaluated=4))
    checkpoint = store.newest()
    assert isinstance(checkpoint, Checkpoint)
    take_up(checkpoint, second.runner, second.metrics)
    second.run()
    assert same(weights(second.built.trainable), weights(straight.built.trainable))
    assert second.runner.trajectory.digest == straight.runner.trajectory.digest


def tilted(g: np.ndarray, rho: float) -> np.ndarray:
    """Return a unit vector at cosine rho to g, float64."""
    across = a_gradient(len(g), 3, 1.0).astype(np.float64)
    unit = g.astype(np.float64) / np.linalg.norm(g)
    across -= float(across @ unit) * unit
    return rho * unit + math.sqrt(1 - rho**2) * across / np.linalg.norm(across)


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 1.0), (0.9, 2.0), (1.0, 1.5)])
def test_the_corrected_estimate_is_the_gradient_itself(alpha: float, beta: float) -> None:
    """E Sigma^-1 a u = g: nothing of g is lost, whatever the guide."""
    g = a_gradient(N)
    v = tilted(g, 0.6)
    count = 4000
    lab = make_lab(g, count=count)
    method = CooperLLM(CooperSettings(alpha=alpha, beta=beta, h=0.5, estimator="corrected"), lab)
    mean, a = g_hat(method, {NAME: v.astype(np.float32).reshape(1, N)})
    u = beta * (math.sqrt(alpha / N) * directions(lab, count) + math.sqrt(1 - alpha) * v)
    outside, along = beta**2 * alpha / N, beta**2 * (1 - alpha)
    inverse = np.eye(N) / outside + (1 / (outside + along) - 1 / outside) * np.outer(v, v)
    each = a[:, None] * (u @ inverse)
    np.testing.assert_allclose(mean, each.mean(0), atol=2e-3)
    for direction in (g.astype(np.float64), v, np.random.default_rng(7).standard_normal(N)):
        assert within_three_sigma(each @ direction, float(g @ direction))


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 1.0), (0.9, 2.0), (1.0, 3.0), (0.0, 1.0)])
def test_the_normalised_scale_is_one_over_the_largest_eigenvalue(alpha: float, beta: float) -> None:
    g = a_gradient(N)
    plan = {NAME: tilted(g, 0.6).astype(np.float32).reshape(1, N)}
    found = [
        g_hat(CooperLLM(CooperSettings(alpha=alpha, beta=beta, h=0.5, scale=scale), make_lab(g, count=50)), plan)[0]
        for scale in ("legacy", "normalised")
    ]
    largest = beta**2 * (alpha / N + 1 - alpha)
    np.testing.assert_allclose(found[1] * largest, found[0], rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_mixing_adds_the_public_gradient_to_plain_directions(mix: float) -> None:
    g, public = a_gradient(N), a_gradient(N, 5, 3.0)
    lab = make_lab(g, count=40)
    method = CooperLLM(CooperSettings(estimator="mixing", mix=mix), lab)
    mean, a = g_hat(method, {NAME: public.reshape(1, N)})
    isotropic = (a[:, None] * directions(lab, 40)).mean(0)
    np.testing.assert_allclose(mean, mix * public + (1 - mix) * isotropic, atol=2e-5)


def test_settings_that_mean_nothing_are_refused() -> None:
    for changes, words in (
        ({"estimator": "corrected", "alpha": 0.0}, "estimator: 'corrected'"),
        ({"estimator": "mixing", "guide": "layers"}, "guide: found 'layers' with estimator = 'mixing'"),
    ):
        with pytest.raises(ConfigError, match=words):
            make("cooperllm", SMALL | {f"method.cooperllm.{key}": value for key, value in changes.items()})
    with pytest.raises(ConfigError, match=r"cooperllm_plus\.split: found 9; allowed: -6 \.\. 6"):
        make("cooperllm_plus", {"method.cooperllm_plus.split": 9})


@pytest.mark.parametrize("guides", [1, 3])
def test_coefficients_and_residuals_come_apart(guides: int) -> None:
    """d_i = g . e_i + b sum_j s_ij V_j . g:  E c = V . g, and E r_i e_i = g across the guides as without any."""
    queries, b, repeats = 16, 2.0, 600
    draw = np.random.default_rng(guides)
    g = a_gradient(N).astype(np.float64)
    v = np.linalg.qr(np.column_stack([tilted(g, 0.6), draw.standard_normal((N, 2))]))[0][:, :guides].T
    coefficients, isotropic = [], []
    for _ in range(repeats):
        e = 1.0 - 2.0 * draw.integers(0, 2, (queries, N))
        signs = 1.0 - 2.0 * draw.integers(0, 2, (queries, guides))
        c, shrunk, r = regressed((e + b * signs @ v) @ g, signs, b)
        assert ((np.abs(shrunk) <= np.abs(c)) & (shrunk * c >= 0)).all()
        coefficients.append(c)
        isotropic.append((r[:, None] * e).mean(0))
    for j in range(guides):
        assert within_three_sigma(np.array(coefficients)[:, j], float(v[j] @ g))
    for direction in (g, v[0], draw.standard_normal(N)):
        assert within_three_sigma(np.array(isotropic) @ direction, float(g @ direction))


def test_a_guide_without_signal_is_closed_and_a_sure_one_stays() -> None:
    draw = np.random.default_rng(0)
    signs = 1.0 - 2.0 * draw.integers(0, 2, (32, 1))
    noise = draw.standard_normal(32)
    nothing, sure = (regressed(signal * signs[:, 0] + noise, signs, 1.0) for signal in (0.0, 20.0))
    assert abs(nothing[1][0]) < 0.5 * abs(nothing[0][0])
    assert sure[1][0] == pytest.approx(sure[0][0], rel=0.01)


def test_a_lone_query_keeps_its_difference() -> None:
    c, shrunk, r = regressed(np.array([3.0]), np.array([[-1.0]]), 2.0)
    assert (c[0], shrunk[0], r[0]) == (-1.5, -1.5, 3.0)


@pytest.mark.parametrize("p2", [0, 5])
def test_plus_without_a_guide_is_one_sided_split_perturbation(p2: int) -> None:
    """guide_ratio = 0 is FedSPZO's B1 with the same directions; p2 = 0 has one block and no cheap directions."""
    common = {"run.rounds": 3, "zo.perturbations": 2, "model.trainable": "full"}
    own = {"method.cooperllm_plus.guide_ratio": 0.0, "method.cooperllm_plus.p2": p2}
    plus = Tiny(make("cooperllm_plus", common | own))
    outcomes = plus.play(3)
    assert [outcome.plan_bytes for outcome in outcomes] == [0, 0, 0]
    assert [outcome.cloud_flops for outcome in outcomes] == [0.0, 0.0, 0.0]
    if p2:
        settings = {"p1": 2, "p2": p2, "lr": 3e-4, "lr_ratio": 60.0}
        split = Tiny(make("fedspzo", common | {f"method.fedspzo.{key}": value for key, value in settings.items()}))
        assert next(o.losses for o in split.play(3)) == outcomes[0].losses
        np.testing.assert_allclose(
            flat(weights(plus.built.trainable)), flat(weights(split.built.trainable)), rtol=1e-3, atol=2e-6
        )
    else:
        assert plus.built.lab.stream.block_runs == [3 * 3 * 3] * plus.built.cut.stages


def test_plus_moves_along_the_gradient_in_the_mean() -> None:
    """The whole step at b = 2 and 30 devices, without block 2: its mean is g plus the guide's share of it."""
    g = a_gradient(N)
    v = tilted(g, 0.7)
    method = CooperLLMPlus(PlusSettings(lr=1.0, p2=0, guide_ratio=0.5, shrink=False), make_lab(g))
    plan = {NAME: v.astype(np.float32).reshape(1, N)}
    each = np.stack([g_hat(method, plan, devices=30, number=number)[0] for number in range(150)])
    expected = g.astype(np.float64) + 0.5 * float(v @ g) * v
    for direction in (g.astype(np.float64), v, np.random.default_rng(7).standard_normal(N)):
        assert within_three_sigma(each @ direction, float(expected @ direction))


def played(changes: dict[str, Any], method: str = "cooperllm") -> tuple[Tiny, list[dict[str, np.ndarray]], list[float]]:
    """Return a run of four rounds, the weights before each of them and after the last, and each round's cloud loss."""
    tiny = Tiny(make(method, SMALL | {"run.rounds": 4} | changes, evaluated=4))
    before, losses = [weights(tiny.built.trainable)], []
    for _ in range(4):
        losses.append(tiny.play(1)[0].cloud_loss)
        before.append(weights(tiny.built.trainable))
    return tiny, before, losses


@pytest.mark.parametrize("kind", ["public", "layers", "classes"])
@pytest.mark.parametrize("method", ["cooperllm", "cooperllm_plus"])
def test_a_guide_with_a_lag_is_that_of_the_weights_a_round_before(method: str, kind: str) -> None:
    """Round t's guide is made from what round t - 1 started with; the first two are of the start weights."""
    changes = {"comm.guide_lag": 1, f"method.{method}.guide": kind, "method.cooperllm_plus.p2": 2}
    sent: list[dict[str, np.ndarray]] = []
    tiny = Tiny(make(method, SMALL | {"run.rounds": 4} | changes, evaluated=4))
    algorithm: Any = tiny.built.algorithm
    plan = algorithm.plan

    def noted(round_: Round) -> Any:
        made = plan(round_)
        sent.append({name: np.array(array) for name, array in made.items()})
        return made

    algorithm.plan = noted
    before = [weights(tiny.built.trainable)]
    for _ in range(4):
        tiny.play(1)
        before.append(weights(tiny.built.trainable))
    fresh: Any = make(method, SMALL | {"run.rounds": 4} | changes, evaluated=4)
    for number, units in enumerate(sent):
        for tensor in fresh.trainable:
            tensor.assign(before[max(0, number - 1)][tensor.name])
        _, expected = fresh.algorithm._guides.make(Round(number, 0, (0,), 0.1))
        assert same(units, dict(expected)), number
    assert len(sent) == 4
    assert not same(before[1], before[2]), "the weights moved"


def test_a_lag_charges_every_guide_once_and_none_beyond_the_last_round() -> None:
    plain, _, losses = played({"comm.guide_lag": 0})
    lagging, _, late = played({"comm.guide_lag": 1})
    assert late[0] == late[1] == losses[0], "both are of the start weights"
    assert plain.built.lab.meter.take() == lagging.built.lab.meter.take() == 0.0
    flops = [outcome.cloud_flops for outcome in Tiny(make("cooperllm", SMALL | {"comm.guide_lag": 1})).play(3)]
    assert flops[0] == 2 * flops[1] > 0
    assert flops[2] == 0.0


@pytest.mark.parametrize(("kind", "every"), [("public", 1), ("classes", 1), ("layers", 2)])
@pytest.mark.parametrize("method", ["cooperllm", "cooperllm_plus"])
def test_a_stop_loses_no_guide_that_was_made_ahead(method: str, kind: str, every: int, tmp_path: Any) -> None:
    changes = SMALL | {"run.rounds": 4, "comm.guide_lag": 1, f"method.{method}.guide": kind}
    changes |= {f"method.{method}.guide_every": every, "comm.lz4": True}
    straight = Tiny(make(method, changes, evaluated=4))
    straight.run()
    first = Tiny(make(method, changes, evaluated=4))
    store = Store(tmp_path, "config", pytest.fail)
    first.metrics.started()
    for _ in range(2):
        first.metrics.played(*first.play(1))
    SaveCheckpoint(store, first.runner, first.metrics, 0).save()
    second = Tiny(make(method, changes, evaluated=4))
    checkpoint = store.newest()
    assert isinstance(checkpoint, Checkpoint)
    take_up(checkpoint, second.runner, second.metrics)
    second.run()
    assert same(weights(second.built.trainable), weights(straight.built.trainable))
    assert second.runner.trajectory.digest == straight.runner.trajectory.digest
