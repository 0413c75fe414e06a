"""The last layer at the read position alone: values, gradients, streamed losses and FLOPs against the whole layer's."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from tinycuts import CAUSAL, KINDS, LABEL_WORDS, architecture, batch_for, embedded_cut, plain_losses
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fedbench.base.account import Meter
from fedbench.base.errors import ModelError
from fedbench.base.job import ModelSection
from fedbench.models import parts
from fedbench.models.cut import Cut
from fedbench.models.decoders import EmbeddedCut
from fedbench.models.embedded.network import load_pretrained
from fedbench.models.families import HeadKind
from fedbench.models.heads import LabelWords, NextToken
from fedbench.models.mapped import Mapped
from fedbench.models.narrow import narrow
from fedbench.models.residency import RESIDENT
from fedbench.models.trainable import Trainable, select
from fedbench.zo import leaves
from fedbench.zo.direction import Direction, Terms, as_keys, direction_key
from fedbench.zo.guide import gradient
from fedbench.zo.kernels import reference
from fedbench.zo.stream import Stream
from fedbench.zo.update import subtract

FOLDED = [("embedded", "verbaliser")] + [(k, h) for k in CAUSAL for h in ("verbaliser", "linear", "prototype")]
WHOLE = [("embedded", "lm"), *((k, "lm") for k in CAUSAL), *((k, "verbaliser") for k in KINDS[len(CAUSAL) :])]
ALL_PARTS = [(kind, "verbaliser", part) for kind in ("embedded", *CAUSAL) for part in ("full", "lora", "adapter")]
EVERY = pytest.mark.parametrize(("kind", "head"), FOLDED)
PARTS = pytest.mark.parametrize(("kind", "head", "part"), ALL_PARTS)
PADDED = pytest.mark.parametrize("padded", [True, False], ids=["padded", "full rows"])
H = 1e-2

#: Cost of the last layer and the head over that of a forward: embedded model, 32 tokens.
WHOLE_SHARE, FOLDED_SHARE = 0.1667, 0.03


def model(kind: str, head: HeadKind, part: str = "full") -> tuple[Cut, Trainable]:
    """Return a cut with a part whose weights are not at their start, and what it trains."""
    if kind != "embedded":
        cut = architecture(kind, head)[0]
    elif head == "lm":
        backbone = load_pretrained()
        cut = EmbeddedCut(backbone, NextToken(backbone.final_norm, backbone.lm_head, 4)).eval()
    else:
        cut = embedded_cut()
    parts.add(cut, part, ModelSection(lora_rank=3, adapter_reduction=8), 0)
    trainable = select(cut, part)
    if part != "full":
        subtract(trainable, terms(), gaussian=False)
    return cut, trainable


def terms() -> Terms:
    """Return a step that takes new weights away from their zeros."""
    return Terms(as_keys([direction_key(7, 0, 0, 0, 0)]), np.array([0.05], np.float32))


def whole(cut: Cut) -> Cut:
    """Return a copy that runs its last layer at all positions."""
    other = copy.deepcopy(cut)
    other.last = None
    return other


@pytest.mark.parametrize(("kind", "head", "folded"), [(*c, True) for c in FOLDED] + [(*c, False) for c in WHOLE])
def test_causal_classifiers_alone_fold_their_last_layer(kind: str, head: HeadKind, folded: bool) -> None:
    cut, _ = model(kind, head)
    assert (cut.last is not None) == folded
    batch = batch_for(cut)
    with torch.inference_mode():
        assert cut.states(batch).h.shape == (5, 1 if folded else 12, cut.width)
        assert whole(cut).states(batch).h.shape == (5, 12, cut.width)


@PARTS
@PADDED
def test_logits_and_gradients_are_those_of_the_whole_layer(kind: str, head: HeadKind, part: str, padded: bool) -> None:
    cut, trainable = model(kind, head, part)
    batch = batch_for(cut, padded=padded)
    other = whole(cut)
    with torch.inference_mode():
        torch.testing.assert_close(cut(batch), other(batch), rtol=0, atol=1e-5)
    loss, grads = gradient(cut, trainable, batch, Meter())
    named = dict(other.named_parameters())
    meant = [named[t.name] for t in trainable]
    expected_loss = other.head.losses(other(batch), batch).mean()
    expected = torch.autograd.grad(expected_loss, meant, allow_unused=True)
    assert loss == pytest.approx(float(expected_loss.detach()), rel=1e-6)
    for tensor, found, want in zip(trainable, grads, expected, strict=True):
        if want is None:
            assert not found.any(), tensor.name
            continue
        scale = float(want.abs().max())
        torch.testing.assert_close(found, want, rtol=2e-4, atol=max(2e-4 * scale, 3e-7), msg=tensor.name)


KEY_BIASES = {
    "embedded": ("backbone.blocks.5.attention.key.bias", slice(None)),
    "opt": ("self_attn.k_proj.bias", slice(None)),
    "gpt2": ("attn.c_attn.bias", "middle third"),
}


@pytest.mark.parametrize("kind", KEY_BIASES)
def test_the_bias_of_folded_keys_has_no_gradient_and_changes_nothing(kind: str) -> None:
    cut, trainable = model(kind, "verbaliser")
    batch = batch_for(cut)
    ending, part = KEY_BIASES[kind]
    number, tensor = [(i, t) for i, t in enumerate(trainable) if t.name.endswith(ending)][-1]
    entries = slice(tensor.size // 3, 2 * tensor.size // 3) if isinstance(part, str) else part
    found = gradient(cut, trainable, batch, Meter())[1][number]
    assert not found[entries].any()
    with torch.inference_mode():
        before, unfolded = cut(batch), whole(cut)(batch)
        tensor.flat[entries] += 0.7
        assert torch.equal(cut(batch), before)
        torch.testing.assert_close(whole(cut)(batch), unfolded, rtol=0, atol=1e-5)


@PARTS
@pytest.mark.parametrize("tile", [leaves.TILE, 700], ids=["wide tiles", "a head a tile"])
def test_streamed_losses_are_those_of_the_whole_layer_at_perturbed_weights(
    kind: str, head: HeadKind, part: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaves, "TILE", tile)
    cut, trainable = model(kind, head, part)
    other = whole(cut)
    batch = batch_for(cut)
    direction = Direction(as_keys([direction_key(0, 1, 2, 3, 5)])[0])
    moved: list[dict[str, np.ndarray]] = [{}, {}]
    for t in trainable:
        z = np.empty(t.size, np.float32)
        reference.draw(reference.stream_keys(direction.key[None], t.key)[0], 0, z, False)
        moved[0][t.name], moved[1][t.name] = t.flat + np.float32(H) * z, t.flat - np.float32(H) * z
    stream = Stream(cut, trainable, Meter(), gaussian=False)
    found = stream.losses(batch, direction, H)
    expected = [plain_losses(other, weights, batch) for weights in moved]
    assert found == pytest.approx(expected, rel=3e-6)
    assert abs(expected[0] - expected[1]) > 1e-4, "the two losses are too close to tell + from -"
    assert stream.loss(batch, direction, H) == pytest.approx(expected[0], rel=3e-6)


@pytest.mark.parametrize(("kind", "part"), [("gpt2", "lora"), ("opt", "lora"), ("qwen2", "lora"), ("opt", "bitfit")])
def test_narrow_weights_fold_as_the_whole_layer_widens_them(kind: str, part: str) -> None:
    cut, _ = model(kind, "verbaliser", part)
    batch = batch_for(cut)
    with torch.inference_mode():
        plain = cut(batch)
        assert narrow(cut) > 0
        found = cut(batch)
        torch.testing.assert_close(found, whole(cut)(batch), rtol=0, atol=1e-5)
    assert float((found - plain).abs().max()) > 1e-4, "narrow weights must differ or nothing was widened"


@pytest.mark.parametrize("kind", ["opt", "gpt2", "llama"])
def test_mapped_weights_fold_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    found = []
    for place in (RESIDENT, Mapped(tmp_path)):
        cut = architecture(kind, "verbaliser")[0]
        place.place(cut)
        stream = Stream(cut, select(cut, "full"), Meter(), gaussian=False)
        batch = batch_for(cut)
        with torch.inference_mode():
            logits = cut(batch)
        found.append((logits, stream.losses(batch, Direction(as_keys([direction_key(0, 1, 2, 3, 5)])[0]), H)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert found[0][1][0] != found[0][1][1]


@PARTS
@pytest.mark.parametrize(("rows", "length"), [(3, 8), (2, 1)])
def test_flops_are_what_torch_counts_with_parts(kind: str, head: HeadKind, part: str, rows: int, length: int) -> None:
    cut, _ = model(kind, head, part)
    batch = batch_for(cut, rows, length, padded=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        cut(batch)
    assert cut.forward_flops(rows, length) == counter.get_total_flops()


def share(cut: Cut) -> float:
    """Return the cost of the last layer and the head over that of a forward."""
    ends = range(cut.stages - 2, cut.stages)
    return sum(cut.stage_flops(stage, 8, 32) for stage in ends) / cut.forward_flops(8, 32)


def test_the_last_layer_and_the_head_are_a_small_share_of_the_embedded_model() -> None:
    cut = embedded_cut()
    assert share(cut) < FOLDED_SHARE
    cut.last = None
    assert share(cut) == pytest.approx(WHOLE_SHARE, abs=5e-4)


def test_a_projection_with_a_forward_of_its_own_is_not_folded() -> None:
    class Odd(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2.0 * super().forward(x)

    backbone = load_pretrained()
    backbone.blocks[-1].attention.value = Odd(64, 64)
    with pytest.raises(ModelError, match="is a Odd; allowed: Linear, Conv1D"):
        EmbeddedCut(backbone, LabelWords(backbone.final_norm, backbone.lm_head, LABEL_WORDS))
