"""Cuts of bidirectional models: padding is masked out of attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fedbench.data.rows import Batch
from fedbench.models.cut import Cut, Head, State
from fedbench.models.decoders import places


def attention_mask(batch: Batch) -> torch.Tensor | None:
    """Return the mask [b, 1, 1, t] of real tokens, or None where nothing is padded."""
    return None if bool(batch.mask.all()) else batch.mask[:, None, None, :]


class BertCut(Cut):
    """BERT, one segment."""

    def __init__(self, backbone: Any, head: Head) -> None:
        super().__init__(backbone, head)
        self.width = backbone.config.hidden_size

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The encoder layers."""
        return list(self.backbone.encoder.layer)

    @property
    def embed_modules(self) -> Sequence[nn.Module]:
        """Embeddings with their norm."""
        return [self.backbone.embeddings]

    def embed(self, batch: Batch) -> State:
        """Return the embeddings of token, segment (all 0) and position, normed."""
        parts = self.backbone.embeddings
        h = parts.word_embeddings(batch.ids) + parts.token_type_embeddings(torch.zeros_like(batch.ids))
        h = parts.dropout(parts.LayerNorm(h + parts.position_embeddings(places(batch.ids))))
        return State(h, attention_mask(batch), batch)

    def block(self, index: int, state: State) -> State:
        """Return the states after one encoder layer."""
        return state._replace(h=self.backbone.encoder.layer[index](state.h, state.mask))
