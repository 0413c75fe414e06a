"""Cuts of causal models. Padding is on the right, where a causal mask keeps it from every real token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedbench.data.rows import Batch
from fedbench.models.cut import Cut, Head, State


def places(ids: Tensor) -> Tensor:
    """Return the position of every token, int64 [b, t]."""
    return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)


class EmbeddedCut(Cut):
    """The embedded causal model."""

    def __init__(self, backbone: Any, head: Head) -> None:
        super().__init__(backbone, head)
        self.width = backbone.lm_head.in_features

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer layers."""
        return list(self.backbone.blocks)

    @property
    def embed_modules(self) -> Sequence[nn.Module]:
        """Token and position embeddings."""
        return [self.backbone.tokens, self.backbone.positions]

    def embed(self, batch: Batch) -> State:
        """Return token plus position embeddings."""
        return State(self.backbone.embed(batch.ids, batch.mask), None, batch)

    def block(self, index: int, state: State) -> State:
        """Return the states after one layer."""
        return state._replace(h=self.backbone.blocks[index](state.h, state.batch.mask))


class OptCut(Cut):
    """OPT: learned positions from an offset of 2; the output layer is the token embedding."""

    def __init__(self, backbone: Any, head: Head) -> None:
        super().__init__(backbone, head)
        self._decoder = backbone.model.decoder
        self.width = backbone.config.hidden_size
        table = self._decoder.embed_positions
        self._offset = table.offset
        self.positions = nn.Embedding(*table.weight.shape, _weight=table.weight)
        self.positions.weight = table.weight  # the same parameter, in a plain lookup

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The decoder layers."""
        return list(self._decoder.layers)

    @property
    def embed_modules(self) -> Sequence[nn.Module]:
        """Token and position embeddings."""
        return [self._decoder.embed_tokens, self.positions]

    def embed(self, batch: Batch) -> State:
        """Return token plus position embeddings."""
        h = self._decoder.embed_tokens(batch.ids) + self.positions(places(batch.ids) + self._offset)
        return State(h, None, batch)

    def block(self, index: int, state: State) -> State:
        """Return the states after one decoder layer."""
        return state._replace(h=self._decoder.layers[index](state.h))
