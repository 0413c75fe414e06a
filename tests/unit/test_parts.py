"""LoRA and adapters: what they add, that they start as the identity, and that they can be perturbed and trained."""

from __future__ import annotations

import pytest
import torch
from tinycuts import batch_for, bert_cut, embedded_cut

from fedbench.base.account import Meter
from fedbench.base.job import ModelSection
from fedbench.models import parts
from fedbench.models.cut import Cut
from fedbench.models.trainable import Trainable, select
from fedbench.zo.direction import Direction, Terms, as_keys, direction_key
from fedbench.zo.stream import Stream
from fedbench.zo.update import subtract

SECTION = ModelSection(lora_rank=4, adapter_reduction=8)
CUTS = {"embedded": embedded_cut, "bert": bert_cut}
ADDED = pytest.mark.parametrize("part", ["lora", "adapter"])
MODELS = pytest.mark.parametrize("model", CUTS)


def with_part(model: str, part: str, seed: int = 0) -> tuple[Cut, Trainable]:
    cut = CUTS[model]()
    parts.add(cut, part, SECTION, seed)
    return cut, select(cut, part)


@MODELS
@ADDED
def test_the_start_is_the_model_itself(model: str, part: str) -> None:
    cut, _ = with_part(model, part)
    plain = CUTS[model]()
    batch = batch_for(cut)
    with torch.inference_mode():
        assert torch.equal(cut(batch), plain(batch))


@MODELS
@ADDED
def test_weights_come_from_seed_and_name_alone(model: str, part: str) -> None:
    first = {t.name: t.flat.copy() for t in with_part(model, part)[1]}
    cut, state = CUTS[model](), torch.random.get_rng_state()
    parts.add(cut, part, SECTION, 0)
    assert torch.equal(torch.random.get_rng_state(), state)
    second = {t.name: t.flat for t in select(cut, part)}
    other = {t.name: t.flat for t in with_part(model, part, seed=1)[1]}
    assert all((first[name] == second[name]).all() for name in first)
    assert any((first[name] != other[name]).any() for name in first)


def test_lora_has_two_matrices_beside_each_query_and_value() -> None:
    cut, trainable = with_part("embedded", "lora")
    names = [t.name for t in trainable]
    assert len(names) == 2 * 2 * len(cut.blocks)
    assert names[0].endswith("query.lora_A.default.weight")
    assert trainable.size == len(cut.blocks) * 2 * 2 * 4 * cut.width
    assert {t.stage for t in trainable} == set(range(1, len(cut.blocks) + 1))


def test_an_adapter_has_the_published_size() -> None:
    """DistilBERT's width with a reduction of 16: 74,544 weights a layer (methods.md 2.15)."""
    assert sum(p.numel() for p in parts.Bottleneck(768, 768 // 16).parameters()) == 74_544


def test_adapters_and_a_new_head_are_trained_together() -> None:
    cut, trainable = with_part("bert", "adapter")
    names = {t.name for t in trainable}
    assert {name for name in names if name.startswith("head.")}
    assert {name.split(".adapter.")[1] for name in names if ".adapter." in name} == {
        "down.weight", "down.bias", "up.weight", "up.bias"
    }  # fmt: skip
    assert sum(t.size for t in trainable if ".adapter." in t.name) == len(cut.blocks) * (2 * 4 * 32 + 4 + 32)


@MODELS
@ADDED
def test_what_is_added_is_perturbed_updated_and_differentiated_and_nothing_else_moves(model: str, part: str) -> None:
    cut, trainable = with_part(model, part)
    batch = batch_for(cut)
    keys = as_keys([direction_key(0, 0, 0, 0, 0)])
    subtract(trainable, Terms(keys, torch.tensor([0.05]).numpy()), gaussian=False)  # away from the zeros
    before = {name: p.detach().clone() for name, p in cut.named_parameters()}
    loss = torch.nn.functional.cross_entropy(cut(batch).double(), batch.labels)
    slopes = torch.autograd.grad(loss, trainable.parameters)
    stream = Stream(cut, trainable, Meter(), gaussian=False)
    h = 1e-3
    plus, minus = stream.losses(batch, Direction(keys[0]), h)
    z = {t.name: torch.zeros(t.size) for t in trainable}
    with torch.no_grad():
        for t in trainable:
            t.parameter.zero_()
        subtract(trainable, Terms(keys, torch.tensor([-1.0]).numpy()), gaussian=False)
        for t in trainable:
            z[t.name].copy_(torch.from_numpy(t.flat))
            t.parameter.copy_(before[t.name])
    expected = sum(float(s.reshape(-1).double() @ z[t.name].double()) for t, s in zip(trainable, slopes, strict=True))
    assert (plus - minus) / (2 * h) == pytest.approx(expected, rel=2e-2, abs=2e-3)
    trained = {t.name for t in trainable}
    assert all(torch.equal(p, before[name]) for name, p in cut.named_parameters())
    assert not any(p.requires_grad for name, p in cut.named_parameters() if name not in trained)
