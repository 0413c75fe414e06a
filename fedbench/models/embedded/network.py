"""The embedded model: a small pre-LN causal transformer in plain torch, and its shipped weights.

All weights sit in Linear, LayerNorm and Embedding leaves, no tensor is used twice, and no
operation mixes the rows of a batch.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedbench.base.errors import ModelError

VOCABULARY = 256
POSITIONS = 32
WIDTH = 64
LAYERS = 6
HEADS = 4
FFN = 256

WEIGHTS = Path(__file__).with_name("weights.safetensors")


class Attention(nn.Module):
    """Causal self-attention with separate query, key, value and output projections."""

    heads = HEADS
    scale = (WIDTH // HEADS) ** -0.5

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        """Return the mixed values, [b, t, WIDTH]."""
        b, t, _ = h.shape
        q, k, v = (f(h).view(b, t, HEADS, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(mixed.transpose(1, 2).reshape(b, t, WIDTH))


class Block(nn.Module):
    """One layer: h + attention(norm(h)), then h + feed-forward(norm(h))."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.ffn_norm = nn.LayerNorm(WIDTH)
        self.ffn_in = nn.Linear(WIDTH, FFN)
        self.ffn_out = nn.Linear(FFN, WIDTH)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        """Return the next states, [b, t, WIDTH]; right padding is harmless under a causal mask, so `mask` is not read."""
        return self.feed(h + self.attention(self.attention_norm(h)))

    def feed(self, h: Tensor) -> Tensor:
        """Return h + feed-forward(norm(h))."""
        out: Tensor = h + self.ffn_out(F.relu(self.ffn_in(self.ffn_norm(h))))
        return out


class TinyCausal(nn.Module):
    """The whole model, in the pieces that a layer-streamed forward visits: embed, blocks, final_norm, lm_head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(POSITIONS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.final_norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the first states, float32 [b, t, WIDTH], of `ids` int64 [b, t] with t <= POSITIONS."""
        b, t = ids.shape
        places = torch.arange(t, device=ids.device).expand(b, t)
        return self.tokens(ids) + self.positions(places)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return next-token logits, float32 [b, t, VOCABULARY]; those at padded positions mean nothing."""
        h = self.embed(ids, mask)
        for block in self.blocks:
            h = block(h, mask)
        return self.lm_head(self.final_norm(h))


def shapes() -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight by its name, in the order of the model."""
    return {name: tuple(tensor.shape) for name, tensor in _skeleton().state_dict().items()}


def with_weights(weights: dict[str, Tensor], source: str) -> TinyCausal:
    """Return the model holding `weights` as float32 copies; other names or shapes are a ModelError that names `source`."""
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wanted = shapes()
    wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if wrong:
        name = wrong[0]
        raise ModelError(
            f"{source}: weight {name} has shape {found.get(name, 'none')}; the embedded model has "
            f"{wanted.get(name, 'no such weight')} ({len(wrong)} of {len(wanted)} weights differ)."
        )
    model = _skeleton()
    model.load_state_dict({name: weights[name].to(torch.float32, copy=True) for name in wanted}, assign=True)
    return model.requires_grad_(True)


def load_pretrained(path: Path = WEIGHTS) -> TinyCausal:
    """Return the model with the weights of a file, float32 in memory; the shipped ones are float16 on disk."""
    if not path.is_file():
        shipped = "; install fedbench again" if path == WEIGHTS else ""
        raise ModelError(f"{path}: the embedded model's weights are missing{shipped}.")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path}: no safetensors file: {error}.") from None
    return with_weights(weights, str(path))


def _skeleton() -> TinyCausal:
    """Return the model with weights that are to be replaced; torch's global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        return TinyCausal()
