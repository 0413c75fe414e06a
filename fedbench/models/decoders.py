"""Cuts of causal models: OPT, GPT-2, Llama, Qwen2 and the embedded one.

Padding is on the right, where a causal mask keeps it from every real token, so no padding is ever masked. Positions
are looked up for every row, since both streams of a probe go through as one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedbench.data.rows import Batch
from fedbench.models.cut import Cut, Head, State
from fedbench.models.folded import EmbeddedLayer, Gpt2Layer, OptLayer, RotaryLayer


def places(ids: Tensor) -> Tensor:
    """Return the position of every token, int64 [b, t]."""
    return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)


class EmbeddedCut(Cut):
    """The embedded causal model."""

    folding = EmbeddedLayer

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


class DecoderCut(Cut):
    """A causal model of transformers; `backbone` is the whole model or its body without an output layer."""

    def __init__(self, backbone: Any, head: Head) -> None:
        super().__init__(backbone, head)
        self.width = backbone.config.hidden_size

    @property
    def base(self) -> Any:
        """The body of the model, without an output layer."""
        return self.backbone.base_model

    @staticmethod
    def tail(base: Any) -> nn.Module:
        """Return what a body runs after its last layer."""
        return base.norm

    def mask(self, batch: Batch) -> Tensor | None:
        """Return None where the fused attention is causal by itself, else the additive mask [b, 1, t, t]."""
        if self.backbone.config._attn_implementation != "eager":
            return None
        b, t = batch.ids.shape
        lowest = torch.finfo(torch.float32).min
        return torch.full((t, t), lowest, device=batch.ids.device).triu(1).expand(b, 1, t, t)


class OptCut(DecoderCut):
    """OPT: learned positions from an offset of 2; opt-350m norms after its layers and projects in and out."""

    folding = OptLayer

    def __init__(self, backbone: Any, head: Head) -> None:
        super().__init__(backbone, head)
        table = self.base.decoder.embed_positions
        self._offset = table.offset
        self.positions = nn.Embedding(table.num_embeddings, table.embedding_dim, _weight=table.weight)
        self.positions.weight = table.weight  # the same parameter, in a plain lookup

    @staticmethod
    def tail(base: Any) -> nn.Module:
        """Return the final norm and the projection to the embeddings' width, where they exist."""
        found = (base.decoder.final_layer_norm, base.decoder.project_out)
        return nn.Sequential(*(module for module in found if module is not None))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The decoder layers."""
        return list(self.base.decoder.layers)

    @property
    def embed_modules(self) -> Sequence[nn.Module]:
        """Token embeddings, their projection where there is one, and position embeddings."""
        project = self.base.decoder.project_in
        return [self.base.decoder.embed_tokens, *([] if project is None else [project]), self.positions]

    def embed(self, batch: Batch) -> State:
        """Return token plus position embeddings."""
        h = self.base.decoder.embed_tokens(batch.ids)
        if self.base.decoder.project_in is not None:
            h = self.base.decoder.project_in(h)
        return State(h + self.positions(places(batch.ids) + self._offset), self.mask(batch), batch)

    def block(self, index: int, state: State) -> State:
        """Return the states after one decoder layer."""
        return state._replace(h=self.base.decoder.layers[index](state.h, attention_mask=state.mask))


class Gpt2Cut(DecoderCut):
    """GPT-2: learned positions; its matrices are stored input by output."""

    folding = Gpt2Layer

    @staticmethod
    def tail(base: Any) -> nn.Module:
        """Return the final norm."""
        return base.ln_f

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The decoder layers."""
        return list(self.base.h)

    @property
    def embed_modules(self) -> Sequence[nn.Module]:
        """Token and position embeddings."""
        return [self.base.wte, self.base.wpe]

    def embed(self, batch: Batch) -> State:
        """Return token plus position embeddings."""
        h = self.base.drop(self.base.wte(batch.ids) + self.base.wpe(places(batch.ids)))
        return State(h, self.mask(batch), batch)

    def block(self, index: int, state: State) -> State:
        """Return the states after one decoder layer."""
        return state._replace(h=self.base.h[index](state.h, attention_mask=state.mask))


class RotaryCut(DecoderCut):
    """Llama and Qwen2: positions turn queries and keys inside attention."""

    folding = RotaryLayer

    def __init__(self, backbone: Any, head: Head) -> None:
        super().__init__(backbone, head)
        self._angles: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def attention_width(self) -> int:
        """Entries of all heads' queries; keys and values may have fewer heads."""
        config = self.backbone.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(config.num_attention_heads * head)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The decoder layers."""
        return list(self.base.layers)

    @property
    def embed_modules(self) -> Sequence[nn.Module]:
        """Token embeddings."""
        return [self.base.embed_tokens]

    def embed(self, batch: Batch) -> State:
        """Return token embeddings."""
        return State(self.base.embed_tokens(batch.ids), self.mask(batch), batch)

    def block(self, index: int, state: State) -> State:
        """Return the states after one decoder layer."""
        turns = self.turns(state)
        h = self.base.layers[index](state.h, attention_mask=state.mask, position_embeddings=turns)
        return state._replace(h=h)

    def turns(self, state: State) -> tuple[Tensor, ...]:
        """Return cosine and sine of every position, [1, t, head width], kept for the last length asked for."""
        length = state.h.shape[1]
        if length not in self._angles or self._angles[length][0].device != state.h.device:
            with torch.inference_mode(False), torch.no_grad():  # kept for a backward pass as well
                self._angles = {length: self.base.rotary_emb(state.h, places(state.batch.ids[:1]))}
        return self._angles[length]
