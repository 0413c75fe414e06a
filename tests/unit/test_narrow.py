"""bfloat16 weights: the same bits as float32 weights that were rounded beforehand, in half the bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tinycuts import KINDS, architecture, batch_for, embedded_cut

from fedbench.base.account import Meter
from fedbench.base.errors import ConfigError
from fedbench.base.job import ModelSection
from fedbench.models import parts
from fedbench.models.cut import Cut
from fedbench.models.narrow import narrow
from fedbench.models.trainable import Trainable, select
from fedbench.zo.direction import Direction, as_keys, direction_key
from fedbench.zo.stream import Stream

CASES = [(kind, part) for kind in (*KINDS, "embedded") for part in ("bitfit", "lora")] + [("embedded", "adapter")]


def trained(kind: str, part: str) -> tuple[Cut, Trainable]:
    encoder = kind in {"bert", "roberta", "distilbert"}
    cut = embedded_cut() if kind == "embedded" else architecture(kind, "linear" if encoder else "verbaliser")[0]
    parts.add(cut, part, ModelSection(lora_rank=4), 0)
    if kind == "llama" and part == "bitfit":
        pytest.skip("Llama has no biases and this head has none either")
    return cut, select(cut, part)


def losses(cut: Cut, trainable: Trainable) -> tuple[float, float]:
    stream = Stream(cut, trainable, Meter(), gaussian=False)
    return stream.losses(batch_for(cut), Direction(as_keys([direction_key(0, 0, 0, 0, 0)])[0]), 1e-2)


@pytest.mark.parametrize(("kind", "part"), CASES)
def test_narrow_weights_are_rounded_weights_to_the_last_bit(kind: str, part: str) -> None:
    cut, trainable = trained(kind, part)
    before = {t.name: t.flat.copy() for t in trainable}
    rounded, other = trained(kind, part)
    frozen = [p for p in rounded.parameters() if p.ndim > 1 and not p.requires_grad]
    with torch.no_grad():
        for parameter in frozen:
            parameter.copy_(parameter.to(torch.bfloat16).float())
    assert narrow(cut) == sum(2 * p.numel() for p in frozen) > 0
    assert {p.dtype for p in cut.parameters() if p.ndim > 1 and not p.requires_grad} == {torch.bfloat16}
    batch = batch_for(cut)
    with torch.inference_mode():
        assert torch.equal(cut(batch), rounded(batch))
    found, expected = (
        torch.autograd.grad(c.head.losses(c(batch), batch).mean(), t.parameters, allow_unused=True)
        for c, t in ((cut, trainable), (rounded, other))
    )
    for one, two in zip(found, expected, strict=True):
        assert (one is None) == (two is None)
        assert one is None or (one.dtype == torch.float32 and torch.equal(one, two))
    assert losses(cut, trainable) == losses(rounded, other)
    assert all(np.array_equal(t.flat, before[t.name]) for t in trainable)


def test_rounding_moves_the_losses_or_the_comparison_above_would_prove_nothing() -> None:
    cut, trainable = trained("embedded", "bitfit")
    plain = losses(*trained("embedded", "bitfit"))
    narrow(cut)
    assert losses(cut, trainable) != plain


def test_a_matrix_that_nobody_can_widen_is_an_error() -> None:
    cut, _ = trained("embedded", "bitfit")
    cut.register_parameter("odd", torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False))
    with pytest.raises(ConfigError, match="odd is the weight of no Linear, Embedding, Conv1D"):
        narrow(cut)
