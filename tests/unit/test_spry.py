"""SPRY: forward-mode derivatives against differences and backpropagation, who owns what, and the cloud's two rules."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from test_estimators import DRAWS, NAME, a_gradient, make_lab, within_three_sigma
from tinycuts import KINDS, architecture, batch_for, bert_cut, embedded_cut
from tinyruns import drawn, flat, make, same, weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedbench.algorithms.base import Round
from fedbench.algorithms.spry import Settings, Spry, groups
from fedbench.base.account import Meter
from fedbench.base.errors import ConfigError, ModelError
from fedbench.base.job import ModelSection
from fedbench.models import parts
from fedbench.models.cut import Cut
from fedbench.models.trainable import select
from fedbench.zo.guide import gradient
from fedbench.zo.tangent import JVP_FORWARDS, jvp

SMALL = {"federation.devices": 3, "federation.local_steps": 2, "zo.perturbations": 2}


def cut_of(kind: str) -> Cut:
    if kind == "embedded":
        return embedded_cut()
    if kind.startswith("bert "):
        return bert_cut(kind.removeprefix("bert "))
    return architecture(kind, "linear")[0]


def tangents_of(cut: Cut, names: set[str]) -> dict[int, torch.Tensor]:
    draw = np.random.default_rng(4)
    found = {}
    for name, parameter in cut.named_parameters():
        if name in names:
            found[id(parameter)] = torch.from_numpy(draw.standard_normal(tuple(parameter.shape)).astype(np.float32))
    return found


@pytest.mark.parametrize("part", ["full", "lora"])
@pytest.mark.parametrize("kind", ["embedded", "bert sdpa", "bert eager", *KINDS])
def test_the_forward_derivative_is_the_gradient_along_the_direction(kind: str, part: str) -> None:
    if (kind, part) == ("opt-350m", "lora"):
        kind = "opt"
    cut = cut_of(kind)
    parts.add(cut, part, ModelSection(lora_rank=2), 0)
    trainable = select(cut, part)
    batch = batch_for(cut, rows=3, length=6)
    before = {name: tensor.clone() for name, tensor in cut.state_dict().items()}
    kinds = {name: type(parameter) for name, parameter in cut.named_parameters()}
    tangents = tangents_of(cut, {t.name for t in trainable})
    loss, slope = jvp(cut, batch, tangents)
    assert all(torch.equal(tensor, before[name]) for name, tensor in cut.state_dict().items())
    assert {name: type(p) for name, p in cut.named_parameters()} == kinds
    value, grads = gradient(cut, trainable, batch, Meter())
    pairs = zip(trainable, grads, strict=True)
    expected = sum(float((g.double() * tangents[id(t.parameter)].double()).sum()) for t, g in pairs)
    assert loss == pytest.approx(value, rel=1e-5)
    assert abs(expected) > 1e-3
    assert slope == pytest.approx(expected, rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("part", ["full", "bitfit", "lora"])
def test_forward_mode_and_central_differences_agree(part: str) -> None:
    changes = SMALL | {"model.trainable": part, "zo.epsilon": 2e-3, "federation.local_steps": 1}
    sent = []
    for derivative in ("jvp", "central"):
        built = make("spry", changes | {"method.spry.derivative": derivative})
        at = Round(0, 0, (0, 1, 2), 0.1)
        sent.append(flat(built.algorithm.local(at, 1, {}).arrays))
    assert np.linalg.norm(sent[0] - sent[1]) < 0.02 * np.linalg.norm(sent[0])


class Products(TorchDispatchMode):
    """Counts the FLOPs of matrix products, apart from those with nothing but zeros on one side."""

    SIDES: ClassVar[dict[str, tuple[int, int]]] = {"aten.mm": (0, 1), "aten.bmm": (0, 1), "aten.addmm": (1, 2)}

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sides = self.SIDES.get(str(func.overloadpacket))
        if sides is not None:
            left, right = (args[place] for place in sides)
            if bool(left.any()) and bool(right.any()):
                self.flops += 2.0 * left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


def test_a_device_of_eight_needs_about_two_forwards() -> None:
    """A tangent costs a second forward from the first own tensor on, and one more product with each own matrix.

    torch spends up to a third one on the tangents of the other matrices, which are zero.
    """
    built = make("spry", {"federation.devices": 8})
    algorithm: Any = built.algorithm
    cut, batch = built.cut, built.lab.private(0, 0, 0)

    def flops(names: set[str]) -> float:
        with Products() as counted:
            jvp(cut, batch, tangents_of(cut, names))
        return counted.flops

    plain = flops(set())
    assert plain == pytest.approx(cut.forward_flops(*batch.ids.shape), rel=0.03)
    at = Round(0, 0, tuple(range(8)), 0.1)
    costs = [flops({t.name for t in algorithm.owned(at, device)}) / plain for device in at.devices]
    assert np.mean(costs) == pytest.approx(JVP_FORWARDS, rel=0.1)
    assert 2.7 < flops({t.name for t in built.trainable}) / plain < 3.05


class Odd(torch.autograd.Function):
    """An operation without a forward derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * 2


class OddLayer(nn.Module):
    """A layer that doubles what the block gives, by that operation."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return Odd.apply(self.block(*inputs))


def test_an_operation_without_a_forward_derivative_is_one_clear_error() -> None:
    cut = embedded_cut()
    cut.backbone.blocks[0] = OddLayer(cut.backbone.blocks[0])
    with pytest.raises(ModelError, match=r"no forward derivative .*; allowed here: 'central'"):
        jvp(cut, batch_for(cut), tangents_of(cut, {"backbone.tokens.weight"}))


@pytest.mark.parametrize("devices", [1, 3, 7, 200])
def test_every_tensor_has_an_owner_in_every_round(devices: int) -> None:
    algorithm: Any = make("spry").algorithm
    every = {t.name for t in algorithm.lab.trainable}
    assert len(every) < 200
    seen: dict[int, set[str]] = {}
    for number in range(3):
        at = Round(number, 0, tuple(range(5, 5 + devices)), 0.1)
        owned = {device: [t.name for t in algorithm.owned(at, device)] for device in at.devices}
        assert set().union(*owned.values()) == every
        sizes = {len(names) for names in owned.values()}
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) == -(-len(every) // devices)
        for device, names in owned.items():
            assert len(set(names)) == len(names)
            seen.setdefault(device, set()).update(names)
    if devices == 3:
        assert all(names == every for names in seen.values()), "a device must get at all tensors in time"


def test_lora_pairs_stay_together_and_too_few_tensors_a_device_are_refused() -> None:
    built = make("spry", SMALL | {"model.trainable": "lora"})
    for group in groups(built.trainable.tensors):
        kinds = [t.name.rpartition(".lora_")[2][:1] for t in group]
        assert kinds in (["A", "B"], [""]) or all("head" in t.name for t in group)
        assert len({t.name.replace("lora_B", "lora_A") for t in group}) == 1
    with pytest.raises(ConfigError, match=r"tensors_per_device: found 2, which leaves \d+ of \d+ groups without any"):
        make("spry", SMALL | {"method.spry.tensors_per_device": 2})


def test_a_device_moves_its_own_tensors_alone() -> None:
    built = make("spry", SMALL)
    algorithm: Any = built.algorithm
    at = Round(0, 0, (0, 1, 2), 0.1)
    moved: list[set[str]] = []
    slope = algorithm._slope

    def watched(batch: Any, mine: Any, key: np.ndarray) -> Any:
        now = weights(built.trainable)
        moved.append({name for name in now if not np.array_equal(now[name], start[name])})
        return slope(batch, mine, key)

    algorithm._slope = watched
    start = weights(built.trainable)
    for device in at.devices:
        own = {t.name for t in algorithm.owned(at, device)}
        moved.clear()
        upload = algorithm.local(at, device, {})
        assert set(upload.arrays) == own
        assert moved[:2] == [set(), set()]  # two directions of the first step
        assert moved[2]
        assert moved[2] <= own
        assert same(weights(built.trainable), start)


@pytest.mark.parametrize("gaussian", [False, True], ids=["rademacher", "gaussian"])
def test_the_estimate_is_unbiased_with_the_known_variance(gaussian: bool) -> None:
    """E g_hat = g;  E|g_hat - g|^2 = (d - 1) |g|^2 for Rademacher and (d + 1) for Gaussian directions, with own d."""
    d = 64
    g = a_gradient(d).astype(np.float64)
    lab = make_lab(g.astype(np.float32), count=DRAWS, gaussian=gaussian)
    method = Spry(Settings(lr=1.0), lab)
    at = Round(0, 0, (0,), 1.0)
    change = method.local(at, 0, {}).arrays[NAME].astype(np.float64)
    keys = lab.directions(0, 0, range(1), DRAWS)
    z = np.stack([drawn(lab.trainable, key, gaussian=gaussian)[NAME] for key in keys]).astype(np.float64)
    each = (z @ g)[:, None] * z
    np.testing.assert_allclose(-change, each.mean(0), atol=1e-4)
    square = float(g @ g)
    assert within_three_sigma(each @ g, square)
    assert within_three_sigma(np.square(each - g).sum(1), (d + 1 if gaussian else d - 1) * square)


def test_the_cloud_averages_over_owners() -> None:
    algorithm: Any = make("spry", SMALL).algorithm
    names = [t.name for t in algorithm.lab.trainable]
    sizes = {t.name: t.size for t in algorithm.lab.trainable}
    uploads = {d: {n: np.full(sizes[n], d + 1, np.float32) for n in names} for d in (0, 1)}
    uploads[2] = {names[0]: np.full(sizes[names[0]], 9, np.float32)}
    change = algorithm.combine(Round(0, 0, (0, 1, 2), 0.1), uploads).arrays
    assert set(change[names[0]]) == {4.0}
    assert set(change[names[1]]) == {1.5}


def test_yogi_is_the_published_rule_and_its_state_survives_a_stop() -> None:
    changes = SMALL | {"method.spry.server": "yogi", "model.trainable": "head"}
    built = make("spry", changes)
    algorithm: Any = built.algorithm
    names = {t.name: t.size for t in built.trainable}
    at = Round(0, 0, (0,), 0.1)
    m, v = 0.0, 0.0
    for number, delta in enumerate((0.2, -0.1, 0.3)):
        if number == 2:
            other = make("spry", changes)
            other.algorithm.restore(algorithm.state())
            algorithm = other.algorithm
        uploads = {0: {n: np.full(size, delta, np.float32) for n, size in names.items()}}
        found = algorithm.combine(at, uploads).arrays
        m = 0.9 * m + 0.1 * delta
        v = v - 0.01 * delta**2 * np.sign(v - delta**2)
        for array in found.values():
            np.testing.assert_allclose(array, 0.01 * m / (np.sqrt(v) + 1e-3), rtol=1e-4)


def test_a_mapped_model_asks_for_differences() -> None:
    with pytest.raises(ConfigError, match=r"method\.spry\.derivative: found 'jvp' with model\.mapped = true"):
        make("spry", {"model.mapped": True, "results.dir": "."})
