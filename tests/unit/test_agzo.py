"""AGZO: bases that span what enters a matrix, estimates of the projected gradient, and what each variant sends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_estimators import DRAWS, NAME, a_gradient, make_lab, within_three_sigma
from tinycuts import architecture, batch_for, embedded_cut
from tinyruns import Tiny, drawn, make, same, weights

from fedbench.algorithms.agzo import AGZO, Settings, low_rank, power_basis
from fedbench.algorithms.base import CatchUp, Round
from fedbench.base.account import Meter
from fedbench.models.trainable import select
from fedbench.zo.activations import captured, matrices
from fedbench.zo.direction import Direction
from fedbench.zo.stream import Stream

SMALL = {"federation.devices": 2, "federation.local_steps": 2, "zo.perturbations": 2}


def test_the_basis_spans_the_leading_inputs() -> None:
    draw = np.random.default_rng(0)
    left, _ = np.linalg.qr(draw.standard_normal((200, 30)))
    right, _ = np.linalg.qr(draw.standard_normal((30, 30)))
    sizes = np.concatenate([[9, 7, 5], np.full(27, 0.1)])
    inputs = torch.from_numpy((left * sizes @ right.T).astype(np.float32))
    start = draw.standard_normal((30, 3))
    basis = power_basis(inputs, start, 3)
    assert (basis.dtype, basis.shape) == (np.float32, (30, 3))
    np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(basis @ basis.T, right[:, :3] @ right[:, :3].T, atol=1e-4)
    rough = power_basis(inputs, start, 1)
    assert np.abs(rough @ rough.T - right[:, :3] @ right[:, :3].T).max() > 1e-4


@pytest.mark.parametrize("transposed", [False, True])
def test_a_direction_of_a_matrix_has_its_rows_in_the_basis(transposed: bool) -> None:
    draw = np.random.default_rng(1)
    r, basis = draw.standard_normal((7, 3)).astype(np.float32), draw.standard_normal((5, 3)).astype(np.float32)
    found = low_rank(r.reshape(-1), basis, transposed=transposed)
    expected = basis @ r.T if transposed else r @ basis.T
    np.testing.assert_allclose(found, expected.reshape(-1), atol=1e-5)


@pytest.mark.parametrize("kind", ["embedded", "opt", "gpt2", "llama", "bert"])
def test_gradients_lie_in_the_span_of_what_is_captured(kind: str) -> None:
    """With as many columns as inputs have rank, projecting a matrix's gradient on its basis changes nothing."""
    causal = kind not in ("bert",)
    cut = embedded_cut() if kind == "embedded" else architecture(kind, "verbaliser" if causal else "prototype")[0]
    trainable = select(cut, "full")
    stream = Stream(cut, trainable, Meter(), gaussian=False, micro_batch=2)
    batch = batch_for(cut, rows=4, length=5)
    found = matrices(cut, trainable)
    loss = cut.head.losses(cut(batch), batch).mean()
    grads = torch.autograd.grad(loss, [m.tensor.parameter for m in found], allow_unused=True)
    with captured(found) as seen:
        clean = stream.loss(batch, Direction(np.zeros(2, np.uint64)), 0.0)
    assert clean == pytest.approx(float(loss.detach()), rel=1e-5)
    assert len(found) >= 8
    for matrix, grad in zip(found, grads, strict=True):
        assert grad is not None
        g = (grad.t() if matrix.transposed else grad).double()
        assert g.shape == (matrix.outputs, matrix.inputs)
        inputs = torch.cat([part.reshape(-1, matrix.inputs) for part in seen[matrix.tensor.name]]).double()
        span = torch.linalg.svd(inputs, full_matrices=False)
        basis = span.Vh[1e-6 * span.S[0] < span.S].T
        assert torch.linalg.norm(g - g @ basis @ basis.T) <= 1e-4 * torch.linalg.norm(g) + 1e-9, matrix.tensor.name


def test_a_tensor_that_is_also_looked_up_is_no_matrix() -> None:
    cut, _ = architecture("gpt2", "verbaliser")
    trainable = select(cut, "full")
    names = {m.tensor.name for m in matrices(cut, trainable)}
    assert not [name for name in names if "wte" in name or "wpe" in name]
    assert {t.name for t in trainable if t.parameter.dim() == 2} - names == {
        t.name for t in trainable if "wte" in t.name or "wpe" in t.name
    }


@pytest.mark.parametrize(("gaussian", "rank"), [(False, 1), (False, 4), (True, 4)])
def test_the_estimate_has_the_projected_gradient_as_its_mean(gaussian: bool, rank: int) -> None:
    """E g_hat = G A A';  E|g_hat - G A A'|^2 = (out r + 1) |G A|^2, Rademacher (out r - 1), with out = 1 here.

    The loss sees its features alone, so the first column of A is along them and G A A' is G.
    """
    d = 64
    g = a_gradient(d)
    lab = make_lab(g, count=DRAWS, gaussian=gaussian)
    method = AGZO(Settings(rank=rank, basis="private"), lab)
    round_ = Round(0, 0, (0,), 1.0)
    upload = method.local(round_, 0, {})
    basis, a = upload.arrays[NAME].astype(np.float64), upload.arrays["scalars"].astype(np.float64)
    assert basis.shape == (d, rank)
    g64 = g.astype(np.float64)
    np.testing.assert_allclose(basis @ (basis.T @ g64), g64, atol=1e-5)
    keys = lab.directions(0, 0, range(1), DRAWS)
    r = np.stack([drawn(lab.trainable, key, gaussian=gaussian)[NAME][:rank] for key in keys]).astype(np.float64)
    delta = r @ basis.T
    np.testing.assert_allclose(a, delta @ g64, atol=5e-4)
    each = a[:, None] * delta
    reply = method.combine(round_, {0: upload.arrays}).arrays
    np.testing.assert_allclose(-reply[NAME], each.mean(0), atol=1e-4)
    square = float(g64 @ g64)
    assert abs(float((each @ g64).mean()) - square) <= 3 * float((each @ g64).std()) / np.sqrt(DRAWS) + 1e-4 * square
    if rank > 1:
        across = basis[:, 1]
        assert within_three_sigma(each @ across, 0.0)
        errors, expected = np.square(each - g64).sum(1), (rank + 1 if gaussian else rank - 1) * square
        assert abs(float(errors.mean()) - expected) < 3 * float(errors.std()) / np.sqrt(DRAWS) + 1e-5 * expected
    else:
        np.testing.assert_allclose(each, np.tile(g64, (DRAWS, 1)), atol=1e-3)  # r a r' = 1: no noise at all


def test_private_bases_differ_between_devices_and_travel_and_public_ones_do_not() -> None:
    private, public = make("agzo", SMALL), make("agzo", SMALL | {"method.agzo.basis": "public"})
    assert (private.algorithm.catch_up, public.algorithm.catch_up) == (CatchUp.REPLAY, CatchUp.REPLAY_OF_DEVICES)
    at = Round(0, 0, (0, 1), 0.1)
    first, second = (private.algorithm.local(at, device, {}).arrays for device in (0, 1))
    names = set(first) - {"scalars"}
    assert names == {m.tensor.name for m in matrices(private.cut, private.trainable)}
    assert all(not np.array_equal(first[name], second[name]) for name in names)
    assert [unit.name for unit in public.algorithm.upload_units(at, 0)] == ["scalars"]
    plan = public.algorithm.plan(at)
    assert set(plan) == names
    (outcome, *_) = Tiny(public).play(2)
    assert outcome.up_bytes == [4 * 2 * 2] * 2
    assert outcome.plan_bytes == sum(array.nbytes for array in plan.values())
    assert outcome.cloud_flops > 0


@pytest.mark.parametrize("basis", ["private", "public"])
def test_what_all_replicas_do_is_the_mean_over_devices_and_directions(basis: str) -> None:
    built = make("agzo", SMALL | {"method.agzo.basis": basis, "federation.local_steps": 1, "method.agzo.rank": 2})
    algorithm: Any = built.algorithm
    at = Round(0, 0, (0, 1), 0.3)
    start = weights(built.trainable)
    plan = algorithm.plan(at)
    uploads = {device: algorithm.local(at, device, plan).arrays for device in at.devices}
    assert same(weights(built.trainable), start)
    algorithm.apply(at, plan, algorithm.combine(at, uploads).arrays)
    linear = {m.tensor.name: m for m in matrices(built.cut, built.trainable)}
    for tensor in built.trainable:
        step = np.zeros(tensor.size)
        for device, arrays in uploads.items():
            for a, key in zip(arrays["scalars"], built.lab.directions(0, device, range(1), 2), strict=True):
                z = drawn(built.trainable, key)[tensor.name].astype(np.float64)
                if tensor.name in linear:
                    bases = (arrays if basis == "private" else plan)[tensor.name].astype(np.float64)
                    z = (z[: linear[tensor.name].outputs * 2].reshape(-1, 2) @ bases.T).reshape(-1)
                step += 0.3 / 4 * float(a) * z
        np.testing.assert_allclose(tensor.flat, start[tensor.name] - step, atol=1e-6)


def test_the_scalars_are_one_sided_differences() -> None:
    built = make("agzo", {"federation.devices": 1, "zo.epsilon": 1e-2})
    at = Round(0, 0, (0,), 0.1)
    upload = built.algorithm.local(at, 0, {})
    batch = built.lab.private(0, 0, 0)
    with torch.inference_mode():
        clean = float(built.cut.head.losses(built.cut(batch), batch).mean())
    assert upload.loss == pytest.approx(clean, rel=1e-5)
    algorithm: Any = built.algorithm
    delta = algorithm._delta(algorithm._keys(at, 0)[0], upload.arrays)
    for tensor in built.trainable:
        tensor.add(np.float32(1e-2) * delta(tensor.name))
    with torch.inference_mode():
        moved = float(built.cut.head.losses(built.cut(batch), batch).mean())
    assert upload.arrays["scalars"][0] == pytest.approx((moved - clean) / 1e-2, abs=2e-3)
