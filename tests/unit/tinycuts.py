"""Small cuts for the tests of the engine: the embedded model, a random BERT without download, and losses of known form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fedbench.data.rows import Batch, Rows
from fedbench.models.cut import Cut, State
from fedbench.models.decoders import EmbeddedCut
from fedbench.models.encoders import BertCut
from fedbench.models.heads import LabelWords, MeanPooled
from fedbench.models.embedded.network import load_pretrained

LABEL_WORDS = (2, 4, 6, 8)


def fill(module: nn.Module, seed: int, scale: float = 0.08) -> None:
    """Give every weight of a module keyed random values around its initial ones' size."""
    draw = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = draw.standard_normal(parameter.shape).astype(np.float32) * scale
            centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.copy_(torch.from_numpy(values + np.float32(centre)))


def embedded_cut() -> EmbeddedCut:
    """Return the embedded model with its label words."""
    backbone = load_pretrained()
    return EmbeddedCut(backbone, LabelWords(backbone.final_norm, backbone.lm_head, LABEL_WORDS)).eval()


def bert_cut(attention: str = "sdpa") -> BertCut:
    """Return a BERT of two layers of width 32 with random weights and 3 classes."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=24,
        attn_implementation=attention,
    )
    cut = BertCut(transformers.BertModel(config, add_pooling_layer=False), MeanPooled(32, 3))
    fill(cut, 1)
    return cut.eval()


def batch_for(cut: Cut, rows: int = 5, length: int = 12, seed: int = 0, *, padded: bool = True) -> Batch:
    """Return rows of random ids; padded ones have lengths from 3 to `length`."""
    draw = np.random.default_rng(seed)
    words = 256 if isinstance(cut, EmbeddedCut) else 97
    lengths = draw.integers(3, length + 1, rows) if padded else np.full(rows, length)
    lengths[0] = length
    ids = draw.integers(1, words, (rows, length))
    ids[np.arange(length)[None, :] >= lengths[:, None]] = 0
    labels = draw.integers(0, cut.classes, rows)
    table = Rows(ids.astype(np.int32), lengths.astype(np.int32), labels, labels.copy(), 0)
    return table.batch(np.arange(rows))


def plain_losses(cut: Cut, moved: dict[str, np.ndarray], batch: Batch) -> float:
    """Return the mean loss by the plain forward of a cut without a stream, with `moved` weights (flat, by name)."""
    shapes = {name: tuple(parameter.shape) for name, parameter in cut.named_parameters()}
    placed = {name: torch.from_numpy(values.reshape(shapes[name])) for name, values in moved.items()}
    with torch.no_grad():
        return float(F.cross_entropy(functional_call(cut, placed, (batch,)).double(), batch.labels))


class ScoreCut(Cut):
    """One linear score of a fixed feature vector, with loss OFFSET - score (or - score**2 / 2) to the last bit of float64.

    Two logits, the score and a constant far above it: cross-entropy of label 0 is then log(1 + exp(c - score)),
    which is c - score wherever c - score > 40.
    """

    OFFSET = 1000.0

    def __init__(self, features: np.ndarray, *, square: bool = False) -> None:
        super().__init__()
        self.width, self.classes, self.square = len(features), 2, square
        self.head = nn.Linear(self.width, 1, bias=False)
        self.point = torch.from_numpy(features.astype(np.float32))
        with torch.no_grad():
            self.head.weight.zero_()

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return []

    @property
    def embed_modules(self) -> Sequence[nn.Module]:
        return []

    @property
    def head_modules(self) -> Sequence[nn.Module]:
        return [self.head]

    def embed(self, batch: Batch) -> State:
        return State(self.point.expand(len(batch.ids), 1, -1), None, batch)

    def block(self, index: int, state: State) -> State:
        raise AssertionError("there are no blocks")

    def features(self, state: State) -> Tensor:
        return state.h[:, 0].contiguous()

    def classify(self, features: Tensor) -> Tensor:
        score = self.head(features)
        if self.square:
            score = score.double() ** 2 / 2
        return torch.cat([score, torch.full_like(score, self.OFFSET)], 1)


def score_batch() -> Batch:
    """Return two rows of label 0, the fewest that a batch may have."""
    ids = torch.zeros(2, 1, dtype=torch.int64)
    return Batch(ids, ids == 0, torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64))


class OddLinear(nn.Linear):
    """A Linear with a forward of its own, which no engine may take for a plain one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2.0


def odd_cut() -> Any:
    """Return the embedded cut with one layer that can't be perturbed."""
    cut = embedded_cut()
    block = cut.backbone.blocks[1]
    odd = OddLinear(block.ffn_in.in_features, block.ffn_in.out_features)
    block.ffn_in = odd
    return cut
