"""The last layer of a causal classifier, run for the one position of each text that its head reads.

Only that position has a query, so its score with token t is x_t . (Wk' q) and what it mixes is Wv (sum_t a_t x_t) + b_v:
keys and values of the other tokens are never made. Weights are the layer's own; nothing here trains or moves them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from fedbench.models.cut import products, read_at
from fedbench.models.parts import Adapted
from fedbench.models.perhead import LoraPerHead, PerHead, per_head


class Attention(nn.Module):
    """Attention of one position a text, keys and values folded.

    A bias of the keys adds the same number to all scores of a text, which the softmax drops: it is left out, and its
    gradient is zero. Attention weights sum to 1, so the values' bias comes through as it is.
    """

    def __init__(self, query: nn.Module, key: nn.Module, value: Any, output: nn.Module, heads: int, scale: float):
        super().__init__()
        self.query, self.key, self.value, self.output = query, key, value, output
        self.heads, self.scale = heads, scale

    def forward(self, x: Tensor, places: Tensor, *turns: Tensor) -> Tensor:
        """Return the mixed values [b, width] of positions `places` among inputs x [b, t, width]."""
        b, t, width = x.shape
        later = torch.arange(t, device=x.device) > places[:, None, None]
        scores = self.scores(x, places, *turns)
        mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ x
        kinds = self.value_heads
        values = self.value(mixed.view(b, kinds, self.heads // kinds, width))
        return self.output(values.reshape(b, -1))

    def queries(self, x: Tensor, places: Tensor) -> Tensor:
        """Return the scaled queries [b, heads, 1, head width]."""
        read = read_at(x, places)
        if isinstance(self.query, PerHead | LoraPerHead):
            q = self.query(read[:, None, None].expand(-1, self.heads, -1, -1))
        else:
            q = self.query(read).view(len(x), self.heads, 1, -1)
        return q * self.scale

    def scores(self, x: Tensor, places: Tensor, *turns: Tensor) -> Tensor:
        """Return every head's scores with all tokens, [b, heads, t]."""
        probes = self.key(self.queries(x, places))[:, :, 0]
        return probes @ x.transpose(1, 2)

    @property
    def value_heads(self) -> int:
        """Heads that have values of their own."""
        base = self.value if isinstance(self.value, PerHead) else self.value.base
        return int(base.heads)

    def flops(self, rows: int, length: int, width: int) -> float:
        """Return the FLOPs of `forward`."""
        grouped = self.heads // self.value_heads
        fixed = _products(self.query) + products(self.output) + self.value.products(grouped)
        return 2.0 * rows * (fixed + self.scoring(length, width) + length * self.heads * width)

    def scoring(self, length: int, width: int) -> int:
        """Return the multiply-adds of one text's scores, queries aside."""
        return _products(self.key) + length * self.heads * width


class RotaryAttention(Attention):
    """Keys turn with their position, so they are made for all tokens; values are folded."""

    def scores(self, x: Tensor, places: Tensor, *turns: Tensor) -> Tensor:
        """Return every head's scores with all tokens, [b, heads, t]; `turns` are cosine and sine [1, t, head width]."""
        b, t, _ = x.shape
        q = _turned(self.queries(x, places), *(turn[0, places][:, None, None] for turn in turns))
        k = self.key(x).view(b, t, -1, q.shape[-1]).transpose(1, 2)
        k = _turned(k, *(turn[:, None] for turn in turns))
        return (q.view(b, k.shape[1], -1, q.shape[-1]) @ k.transpose(2, 3)).view(b, self.heads, t)

    def scoring(self, length: int, width: int) -> int:
        """Return the multiply-adds of one text's scores, queries aside."""
        head = self.value.size if isinstance(self.value, PerHead) else self.value.base.size
        return length * (products(self.key) + self.heads * head)


class Layer(nn.Module, ABC):
    """A layer at the read position, with the adapter behind it where there is one."""

    layer: Any
    adapter: Any

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.layer, self.adapter = (block.block, block.adapter) if isinstance(block, Adapted) else (block, None)
        own, self.attention = self.attend(self.layer)
        self._beside = products(block) - products(own)

    @abstractmethod
    def attend(self, layer: Any) -> tuple[nn.Module, Attention]:
        """Return a layer's attention and its folded form."""

    @abstractmethod
    def before(self, h: Tensor) -> Tensor:
        """Return what attention sees of the states."""

    @abstractmethod
    def after(self, h: Tensor) -> Tensor:
        """Return the layer's states [b, width] from those with attention's output added."""

    def forward(self, h: Tensor, places: Tensor, *turns: Tensor) -> Tensor:
        """Return the states [b, 1, width] behind the layer at positions `places` of states h [b, t, width]."""
        out = self.after(read_at(h, places) + self.attention(self.before(h), places, *turns))
        return (out if self.adapter is None else self.adapter(out))[:, None]

    def flops(self, rows: int, length: int, width: int) -> float:
        """Return the FLOPs of `forward`."""
        return 2.0 * rows * self._beside + self.attention.flops(rows, length, width)


class EmbeddedLayer(Layer):
    """Of the embedded model."""

    def attend(self, layer: Any) -> tuple[nn.Module, Attention]:
        """Return a layer's attention and its folded form."""
        own, heads = layer.attention, layer.attention.heads
        key, value = per_head(own.key, heads, back=True), per_head(own.value, heads)
        return own, Attention(own.query, key, value, own.output, heads, own.scale)

    def before(self, h: Tensor) -> Tensor:
        """Return the normed states."""
        return self.layer.attention_norm(h)

    def after(self, h: Tensor) -> Tensor:
        """Return the feed-forward layer's output added to its input."""
        return self.layer.feed(h)


class OptLayer(Layer):
    """Of OPT, norms before or, in opt-350m, after."""

    def attend(self, layer: Any) -> tuple[nn.Module, Attention]:
        """Return a layer's attention and its folded form."""
        own, heads = layer.self_attn, layer.self_attn.num_heads
        key, value = per_head(own.k_proj, heads, back=True), per_head(own.v_proj, heads)
        return own, Attention(own.q_proj, key, value, own.out_proj, heads, own.scaling)

    def before(self, h: Tensor) -> Tensor:
        """Return the states, normed where the norm comes first."""
        return self.layer.self_attn_layer_norm(h) if self.layer.do_layer_norm_before else h

    def after(self, h: Tensor) -> Tensor:
        """Return the feed-forward layer's output added to its input, with the norms that are left."""
        layer = self.layer
        if layer.do_layer_norm_before:
            return h + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(h))))
        h = layer.self_attn_layer_norm(h)
        return layer.final_layer_norm(h + layer.fc2(layer.activation_fn(layer.fc1(h))))


class Gpt2Layer(Layer):
    """Of GPT-2, whose queries, keys and values are parts of one matrix."""

    def attend(self, layer: Any) -> tuple[nn.Module, Attention]:
        """Return a layer's attention and its folded form."""
        own, heads = layer.attn, layer.attn.num_heads
        query, key, value = (per_head(own.c_attn, heads, part=i, parts=3, back=i == 1) for i in range(3))
        return own, Attention(query, key, value, own.c_proj, heads, own.scaling)

    def before(self, h: Tensor) -> Tensor:
        """Return the normed states."""
        return self.layer.ln_1(h)

    def after(self, h: Tensor) -> Tensor:
        """Return the feed-forward layer's output added to its input."""
        return h + self.layer.mlp(self.layer.ln_2(h))


class RotaryLayer(Layer):
    """Of Llama and Qwen2."""

    def attend(self, layer: Any) -> tuple[nn.Module, Attention]:
        """Return a layer's attention and its folded form."""
        own = layer.self_attn
        heads, kinds = own.config.num_attention_heads, own.config.num_key_value_heads
        value = per_head(own.v_proj, kinds)
        return own, RotaryAttention(own.q_proj, own.k_proj, value, own.o_proj, heads, own.scaling)

    def before(self, h: Tensor) -> Tensor:
        """Return the normed states."""
        return self.layer.input_layernorm(h)

    def after(self, h: Tensor) -> Tensor:
        """Return the feed-forward layer's output added to its input."""
        return h + self.layer.mlp(self.layer.post_attention_layernorm(h))


def _products(module: Any) -> int:
    """Return the multiply-adds of a projection for one text's read position."""
    return int(module.products(1)) if isinstance(module, PerHead | LoraPerHead) else products(module)


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Return vectors turned by their position's angles, the first half of the entries with the second."""
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat((-second, first), -1) * sine
