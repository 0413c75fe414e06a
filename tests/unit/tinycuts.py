"""Small cuts for the tests of the engine: the embedded model, a random BERT without download, and losses of known form."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedbench.data.rows import Batch, Rows
from fedbench.models import shapes
from fedbench.models.cut import Cut, Head, State
from fedbench.models.decoders import EmbeddedCut
from fedbench.models.embedded.network import load_pretrained
from fedbench.models.encoders import BertCut
from fedbench.models.families import FAMILIES, HeadKind, auto_class, cut_of
from fedbench.models.heads import LabelWords, MeanPooled

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


#: Every architecture, with opt-350m's layout as one of its own.
KINDS = ("opt", "opt-350m", "gpt2", "llama", "qwen2", "bert", "roberta", "distilbert")
CAUSAL = KINDS[:5]
MASK = 3


def architecture(kind: str, head: HeadKind, attention: str = "sdpa") -> tuple[Cut, Any]:
    """Return the cut of a small model with random weights, and a copy of the model for its own forward.

    It has 3 classes; the copy is the whole model of transformers, or its body for a prototype head.
    """
    import transformers

    family = FAMILIES[kind.partition("-")[0]]
    config = shapes.config_of(f"{kind.partition('-')[0]}-tiny")
    config.num_labels, config.pad_token_id = 3, 0 if kind != "roberta" else 1
    if kind == "opt-350m":
        config.do_layer_norm_before, config.word_embed_proj_dim = False, 24
    with torch.random.fork_rng(devices=[]):
        model = getattr(transformers, auto_class(family, head)).from_config(config, attn_implementation=attention)
        cut = cut_of(family, head, model, 3, (11, 5, 70), MASK)
    fill(cut, 2)
    return cut.eval(), copy.deepcopy(model).eval()


def batch_for(cut: Cut, rows: int = 5, length: int = 12, seed: int = 0, *, padded: bool = True) -> Batch:
    """Return rows of random ids; padded ones have lengths from 3 to `length`."""
    draw = np.random.default_rng(seed)
    words = 256 if isinstance(cut, EmbeddedCut) else min(97, getattr(cut.backbone.config, "vocab_size", 97))
    lengths = draw.integers(3, length + 1, rows) if padded else np.full(rows, length)
    lengths[0] = length
    ids = draw.integers(1, words, (rows, length))
    ids[np.arange(length)[None, :] >= lengths[:, None]] = 0
    labels = draw.integers(0, cut.classes, rows)
    table = Rows(ids.astype(np.int32), lengths.astype(np.int32), labels, labels.copy(), 0)
    return table.batch(np.arange(rows))


def plain_losses(cut: Cut, moved: dict[str, np.ndarray], batch: Batch) -> float:
    """Return the mean loss by the plain forward of a cut without a stream, with `moved` weights (flat, by name).

    It is computed on a copy, since `torch.func.functional_call` leaves tied weights untied.
    """
    cut = copy.deepcopy(cut)
    with torch.no_grad():
        for name, parameter in cut.named_parameters():
            if name in moved:
                parameter.copy_(torch.from_numpy(moved[name]).view_as(parameter))
        return float(cut.head.losses(cut(batch), batch).mean())


class Score(Head):
    """The loss is OFFSET - score, or OFFSET - score**2 / 2, to the last bit of float64."""

    OFFSET = 1000.0

    def __init__(self, width: int, *, square: bool) -> None:
        super().__init__()
        self.classes, self.square = 2, square
        self.linear = nn.Linear(width, 1, bias=False)
        with torch.no_grad():
            self.linear.weight.zero_()

    def features(self, h: Tensor, batch: Batch) -> Tensor:
        return h[:, 0].contiguous()

    def classify(self, features: Tensor) -> Tensor:
        return self.linear(features)

    def losses(self, out: Tensor, batch: Batch) -> Tensor:
        score = out[:, 0].double()
        return self.OFFSET - (score**2 / 2 if self.square else score)


class ScoreCut(Cut):
    """One linear score of a fixed feature vector."""

    OFFSET = Score.OFFSET

    def __init__(self, features: np.ndarray, *, square: bool = False) -> None:
        super().__init__(nn.Module(), Score(len(features), square=square))
        self.width = len(features)
        self.point = torch.from_numpy(features.astype(np.float32))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return []

    @property
    def embed_modules(self) -> Sequence[nn.Module]:
        return []

    def embed(self, batch: Batch) -> State:
        return State(self.point.expand(len(batch.ids), 1, -1), None, batch)

    def block(self, index: int, state: State) -> State:
        raise AssertionError("there are no blocks")


class SumHead(Score):
    """The score is what stage 0 found, plus one of its own."""

    def classify(self, features: Tensor) -> Tensor:
        return features[:, :1] + self.linear(features[:, 1:])


class TwoBlockCut(Cut):
    """The score is y . front in stage 0 plus z . behind in the head: all weights are 0, so the gradient is exact."""

    def __init__(self, front: np.ndarray, behind: np.ndarray) -> None:
        super().__init__(nn.Module(), SumHead(len(behind), square=False))
        self.width = 1 + len(behind)
        self.linear = nn.Linear(len(front), 1, bias=False)
        with torch.no_grad():
            self.linear.weight.zero_()
        self.front, self.behind = (torch.from_numpy(x.astype(np.float32)) for x in (front, behind))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return []

    @property
    def embed_modules(self) -> Sequence[nn.Module]:
        return [self.linear]

    def embed(self, batch: Batch) -> State:
        rows = len(batch.ids)
        score = self.linear(self.front.expand(rows, -1))
        return State(torch.cat((score, self.behind.expand(rows, -1)), 1)[:, None], None, batch)

    def block(self, index: int, state: State) -> State:
        raise AssertionError("there are no blocks")


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
