"""Cuts of bidirectional models: BERT, RoBERTa and DistilBERT. Padding is masked out of attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedbench.data.rows import Batch
from fedbench.models.cut import Cut, Head, State
from fedbench.models.decoders import places


class EncoderCut(Cut):
    """A bidirectional model of transformers; `backbone` is the whole model or its body without an output layer."""

    def __init__(self, backbone: Any, head: Head) -> None:
        super().__init__(backbone, head)
        self.width = backbone.config.hidden_size

    @property
    def base(self) -> Any:
        """The body of the model, without an output layer."""
        return self.backbone.base_model

    @property
    def embed_modules(self) -> Sequence[nn.Module]:
        """Embeddings with their norm."""
        return [self.base.embeddings]

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The encoder layers."""
        return list(self.base.encoder.layer)

    def block(self, index: int, state: State) -> State:
        """Return the states after one encoder layer."""
        return state._replace(h=self.blocks[index](state.h, state.mask))

    def mask(self, batch: Batch) -> Tensor | None:
        """Return the mask [b, 1, 1, t] of real tokens as the attention wants it, or None where nothing is padded."""
        if bool(batch.mask.all()):
            return None
        mask = batch.mask[:, None, None, :]
        if self.backbone.config._attn_implementation != "eager":
            return mask
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.float32).min)


class BertCut(EncoderCut):
    """BERT, one segment."""

    def embed(self, batch: Batch) -> State:
        """Return the embeddings of token, segment (all 0) and position, normed."""
        parts = self.base.embeddings
        h = parts.word_embeddings(batch.ids) + parts.token_type_embeddings(torch.zeros_like(batch.ids))
        h = parts.dropout(parts.LayerNorm(h + parts.position_embeddings(self.positions(batch))))
        return State(h, self.mask(batch), batch)

    def positions(self, batch: Batch) -> Tensor:
        """Return the position of every token, int64 [b, t]."""
        return places(batch.ids)


class RobertaCut(BertCut):
    """RoBERTa: BERT whose positions start behind the padding's id, which all padding has as its position."""

    def positions(self, batch: Batch) -> Tensor:
        """Return the position of every token, int64 [b, t]."""
        return (places(batch.ids) + 1) * batch.mask + int(self.base.embeddings.padding_idx)


class DistilBertCut(EncoderCut):
    """DistilBERT: no segments."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The encoder layers."""
        return list(self.base.transformer.layer)

    def embed(self, batch: Batch) -> State:
        """Return the embeddings of token and position, normed."""
        parts = self.base.embeddings
        h = parts.word_embeddings(batch.ids) + parts.position_embeddings(places(batch.ids))
        return State(parts.dropout(parts.LayerNorm(h)), self.mask(batch), batch)
