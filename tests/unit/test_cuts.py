"""Cuts of real architectures: logits are the model's own, streamed losses those of plain forwards, FLOPs torch's count."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from tinycuts import CAUSAL, KINDS, MASK, architecture, batch_for, plain_losses
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fedbench.base.account import Meter
from fedbench.base.errors import ModelError
from fedbench.data.rows import Batch
from fedbench.models import vocab
from fedbench.models.cut import Cut
from fedbench.models.families import FAMILIES, HeadKind
from fedbench.models.trainable import select
from fedbench.zo.direction import AT_WEIGHTS, Direction, as_keys, direction_key
from fedbench.zo.kernels import reference
from fedbench.zo.stream import Probe, Stream

HEADS: tuple[HeadKind, ...] = ("verbaliser", "linear", "prototype", "lm")
CASES = [(kind, head) for kind in KINDS for head in HEADS if head != "lm" or kind in CAUSAL]
EVERY = pytest.mark.parametrize(("kind", "head"), CASES)
ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])
H = 3e-3


@functools.cache
def original(kind: str, head: HeadKind, attention: str = "sdpa") -> tuple[Cut, Any]:
    return architecture(kind, head, attention)


def rows_for(cut: Cut, *, rows: int = 5, length: int = 12, padded: bool = True) -> Batch:
    """Return rows without special ids but the mask token, which stands once in each."""
    batch = batch_for(cut, rows, length, seed=4, padded=padded)
    pad = getattr(cut.backbone.config, "pad_token_id", None) or 0
    batch.ids[(batch.ids < 6) & batch.mask] += 6
    batch.ids[~batch.mask] = pad
    batch.ids[torch.arange(rows), batch.lengths // 2] = MASK
    return batch


def own_output(model: Any, head: HeadKind, batch: Batch) -> torch.Tensor:
    """Return what the model of transformers gives by its own forward and its own attention mask."""
    with torch.no_grad():
        out = model(input_ids=batch.ids, attention_mask=batch.mask.long())
    return out.last_hidden_state if head == "prototype" else out.logits


@EVERY
@ATTENTION
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full rows"])
def test_logits_are_the_models_own(kind: str, head: HeadKind, attention: str, padded: bool) -> None:
    cut, model = original(kind, head, attention)
    batch = rows_for(cut, padded=padded)
    own = own_output(model, head, batch)
    with torch.inference_mode():
        out = cut(batch)
    rows = torch.arange(len(own))
    if head == "verbaliser":
        places = batch.lengths - 1 if kind in CAUSAL else batch.lengths // 2
        expected = own[rows, places][:, [11, 5, 70]]
    elif head == "linear":
        expected = own
    elif head == "prototype":
        if kind in CAUSAL:
            pooled = own[rows, batch.lengths - 1]
        else:
            pooled = (own * batch.mask[:, :, None]).sum(1) / batch.lengths[:, None]
        expected = cut.head.linear(pooled).detach()
    else:
        nll = torch.nn.functional.cross_entropy(own[:, :-1].transpose(1, 2), batch.ids[:, 1:], reduction="none")
        hit = own[:, :-1].argmax(2) == batch.ids[:, 1:]
        counted = batch.mask[:, 1:]
        expected = torch.stack([(v * counted).sum(1) / counted.sum(1) for v in (nll, hit)], 1)
    assert float(expected.std()) > 1e-3, "outputs that hardly differ can't tell positions apart"
    torch.testing.assert_close(out.double(), expected.double(), rtol=0, atol=1e-5)


@EVERY
@ATTENTION
def test_streamed_losses_are_those_of_plain_forwards(kind: str, head: HeadKind, attention: str) -> None:
    plain, _ = original(kind, head, attention)
    cut = copy.deepcopy(plain)
    trainable, meter = select(cut, "full"), Meter()
    stream = Stream(cut, trainable, meter, gaussian=False)
    batch = rows_for(cut)
    direction = Direction(as_keys([direction_key(0, 1, 2, 3, 5)])[0])
    same = stream.losses(batch, direction, 0.0)
    assert same[0] == same[1] == pytest.approx(plain_losses(plain, {}, batch), rel=2e-6)
    assert meter.take() == 2 * cut.forward_flops(*batch.ids.shape)
    moved: list[dict[str, np.ndarray]] = [{}, {}]
    for t in trainable:
        key = reference.stream_keys(direction.key[None], t.key)[0]
        z = np.empty(t.size, np.float32)
        reference.draw(key, 0, z, False)
        moved[0][t.name], moved[1][t.name] = t.flat + np.float32(H) * z, t.flat - np.float32(H) * z
    found = stream.losses(batch, direction, H)
    expected = [plain_losses(plain, weights, batch) for weights in moved]
    assert found == pytest.approx(expected, rel=2e-6)
    assert abs(expected[0] - expected[1]) > 1e-4, "the two losses are too close to tell + from -"


@EVERY
@pytest.mark.parametrize("part", ["bitfit", "head"])
def test_frozen_tensors_serve_both_streams(kind: str, head: HeadKind, part: str) -> None:
    plain, _ = original(kind, head)
    cut = copy.deepcopy(plain)
    for parameter in cut.parameters():
        parameter.requires_grad_(True)
    if part == "bitfit" and kind == "llama" and head in ("verbaliser", "lm"):
        with pytest.raises(ModelError, match="leaves nothing to train"):  # no bias at all, and no new head
            select(cut, part)
        return
    stream = Stream(cut, select(cut, part), Meter(), gaussian=False)
    batch = rows_for(cut)
    direction = Direction(as_keys([direction_key(0, 1, 2, 3, 5)])[0])
    plus, minus = stream.losses(batch, direction, 0.0)
    assert plus == minus == pytest.approx(plain_losses(plain, {}, batch), rel=2e-6)
    plus, minus = stream.losses(batch, direction, H)
    assert plus != minus


@EVERY
def test_micro_batches_give_the_same_losses(kind: str, head: HeadKind) -> None:
    plain, _ = original(kind, head, "eager")
    batch = rows_for(plain)
    direction = Direction(as_keys([direction_key(0, 1, 2, 3, 5)])[0])
    found = []
    for micro_batch in (0, 2):
        cut = copy.deepcopy(plain)
        stream = Stream(cut, select(cut, "full"), Meter(), gaussian=False, micro_batch=micro_batch)
        found.append(stream.losses(batch, direction, H))
    assert found[1] == pytest.approx(found[0], rel=2e-6)


@EVERY
def test_neither_order_nor_padding_nor_company_changes_a_text(kind: str, head: HeadKind) -> None:
    cut, _ = original(kind, head)
    batch = rows_for(cut)
    with torch.inference_mode():
        whole = cut(batch)
        order = torch.tensor([3, 0, 4, 2, 1])
        shuffled = cut(Batch(batch.ids[order], batch.mask[order], batch.labels[order], batch.lengths[order]))
        torch.testing.assert_close(shuffled, whole[order], rtol=0, atol=1e-5)
        longest = int(batch.lengths[1:].max())
        short = cut(Batch(batch.ids[1:, :longest], batch.mask[1:, :longest], batch.labels[1:], batch.lengths[1:]))
        torch.testing.assert_close(short, whole[1:], rtol=0, atol=1e-5)
        ids = batch.ids.clone()
        ids[~batch.mask] = 40
        other = cut(Batch(ids, batch.mask, batch.labels, batch.lengths))
        torch.testing.assert_close(other, whole, rtol=0, atol=1e-5)


@EVERY
@ATTENTION
@pytest.mark.parametrize(("rows", "length"), [(3, 8), (2, 1)])
def test_counted_flops_are_what_torch_counts(kind: str, head: HeadKind, attention: str, rows: int, length: int) -> None:
    cut, _ = original(kind, head, attention)
    batch = batch_for(cut, rows, length, padded=length > 3)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        cut(batch)
    assert cut.forward_flops(rows, length) == counter.get_total_flops()


@EVERY
def test_every_trainable_tensor_has_one_stage_and_every_weight_is_trainable(kind: str, head: HeadKind) -> None:
    cut = copy.deepcopy(original(kind, head)[0])
    tensors = select(cut, "full").tensors
    assert len({id(t.parameter) for t in tensors}) == len(tensors)
    assert {t.stage for t in tensors} <= set(range(cut.stages))
    assert [t.stage for t in tensors] == sorted(t.stage for t in tensors)
    unused = {name for name, p in cut.named_parameters() if p.requires_grad} - {t.name for t in tensors}
    assert unused <= {"backbone.cls.predictions.bias", "backbone.lm_head.bias"}


TIED = [(kind, head) for kind, head in CASES if head in ("verbaliser", "lm") and kind != "llama"]


@pytest.mark.parametrize(("kind", "head"), TIED)
def test_a_tied_matrix_is_of_the_first_stage_and_moves_alike_in_both(kind: str, head: HeadKind) -> None:
    """The lookup's rows and the head's rows of one token are one weight, whichever stage perturbs it."""
    cut = copy.deepcopy(original(kind, head)[0])
    table: Any = cut.backbone.get_input_embeddings()
    output: Any = cut.backbone.get_output_embeddings()
    assert table.weight is output.weight
    trainable = select(cut, "full")
    (tied,) = [t for t in trainable if t.parameter is table.weight]
    assert tied.stage == 0
    stream = Stream(cut, trainable, Meter(), gaussian=False)
    direction = Direction(as_keys([direction_key(0, 1, 2, 3, 5)])[0])
    words = torch.tensor([11, 5, 70])
    seen: dict[str, torch.Tensor] = {}
    state = stream.run(stream.begin(rows_for(cut)), range(cut.stages - 1), Probe(direction, H, AT_WEIGHTS))
    stream._probe = Probe(direction, H, AT_WEIGHTS)  # as within a visit
    with torch.inference_mode():
        seen["lookup"] = table(torch.cat((words[None], words[None])))
        width = output.in_features
        if head == "verbaliser":
            one_hot = torch.eye(width).repeat(2, 1)
            seen["head"] = cut.head.output(one_hot).view(2, width, 3).transpose(1, 2)
            bias = stream._tensors.get(id(output.bias))
            if bias is not None:
                plus, minus = stream.pair_rows(bias, words, "test")
                seen["head"] = seen["head"] - torch.stack((plus[:, 0], minus[:, 0]))[:, :, None]
        else:
            losses = cut.head.vocabulary(table(torch.cat((words[None], words[None]))).view(6, width), words.repeat(2))
            copies = [tied.flat.reshape(-1, width) for _ in range(2)]
            z = np.empty(tied.size, np.float32)
            reference.draw(reference.stream_keys(direction.key[None], tied.key)[0], 0, z, False)
            for sign, matrix, found in zip((1, -1), copies, losses.view(2, 3, 2), strict=True):
                moved = torch.from_numpy(matrix + np.float32(sign * H) * z.reshape(matrix.shape))
                logits = moved[words] @ moved.T
                expected = torch.nn.functional.cross_entropy(logits.double(), words, reduction="none")
                torch.testing.assert_close(found[:, 0], expected, rtol=0, atol=1e-5)
    stream._probe = None
    assert state is not None
    if "head" in seen:
        torch.testing.assert_close(seen["head"], seen["lookup"], rtol=0, atol=1e-7)
        assert not torch.equal(seen["lookup"][0], seen["lookup"][1])


@pytest.mark.parametrize("kind", CAUSAL)
def test_the_gradient_of_next_tokens_is_that_of_all_logits_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut, model = (copy.deepcopy(part) for part in original(kind, "lm"))
    monkeypatch.setattr(vocab, "PIECE", 5 * 512)  # five tokens at a time
    batch = rows_for(cut)
    shapes: list[tuple[int, ...]] = []
    plain = vocab.summary
    monkeypatch.setattr(vocab, "summary", lambda logits: shapes.append(tuple(logits.shape)) or plain(logits))
    cut.head.losses(cut(batch), batch).mean().backward()
    assert max(rows for rows, _ in shapes) == 5
    logits = model(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch.ids[:, 1:], reduction="none")
    counted = batch.mask[:, 1:]
    ((nll * counted).sum(1) / counted.sum(1)).mean().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in cut.backbone.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_every_architecture_is_tested() -> None:
    assert {kind.partition("-")[0] for kind in KINDS} == set(FAMILIES)
