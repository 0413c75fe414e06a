"""A projection applied head by head: each head's rows of the matrix to that head's own vectors, forwards or transposed.

It is what a folded attention (`folded.py`) needs instead of keys and values of every token. It holds no weight of its
own, and LoRA's term is applied beside the matrix, never added to it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, bmm, nn

from fedbench.base.errors import ModelError
from fedbench.models.cut import wide


class PerHead(nn.Module):
    """Part `part` of `parts` of a Linear or Conv1D, cut into `heads` matrices [size, inputs].

    Vectors [b, heads, n, inputs] become [b, heads, n, size], with the bias; with `back` the transposed matrices turn
    [b, heads, n, size] into [b, heads, n, inputs], and there is no bias.
    """

    def __init__(self, linear: Any, heads: int, *, part: int = 0, parts: int = 1, back: bool = False) -> None:
        super().__init__()
        self.inputs_first = type(linear).__name__ == "Conv1D"  # stored input by output
        if not self.inputs_first and type(linear) is not nn.Linear:
            kind = type(linear).__name__
            raise ModelError(f"A projection of the last layer is a {kind}; allowed: Linear, Conv1D, LoRA beside them.")
        self.linear = linear
        self.heads, self.part, self.parts, self.back = heads, part, parts, back
        self.inputs = linear.nx if self.inputs_first else linear.in_features
        self.size = (linear.nf if self.inputs_first else linear.out_features) // parts // heads

    def forward(self, x: Tensor) -> Tensor:
        """Return the products of the plain weights."""
        out = self.times(x, self.matrices(wide(self.linear.weight)))
        bias = self.linear.bias
        return out if self.back or bias is None else out + self.offsets(bias)

    def matrices(self, weight: Tensor) -> Tensor:
        """Return the heads' matrices [heads, size, inputs] as a view of the whole weight."""
        if self.inputs_first:
            return weight.view(self.inputs, self.parts, self.heads, self.size)[:, self.part].permute(1, 2, 0)
        return weight.view(self.parts, self.heads, self.size, self.inputs)[self.part]

    def offsets(self, bias: Tensor) -> Tensor:
        """Return the heads' biases [heads, 1, size] as a view of the whole bias."""
        return bias.view(self.parts, self.heads, 1, self.size)[self.part]

    def times(self, x: Tensor, matrices: Tensor) -> Tensor:
        """Return vectors [b, heads, n, ...] times the matrices of some heads, or times the transposed ones."""
        b, heads, n, width = x.shape
        rows = x.transpose(0, 1).reshape(heads, b * n, width)
        out = bmm(rows, matrices if self.back else matrices.transpose(1, 2))
        return out.view(heads, b, n, -1).transpose(0, 1)

    def products(self, n: int) -> int:
        """Return the multiply-adds for one text with `n` vectors a head."""
        return self.heads * n * self.size * self.inputs


class LoraPerHead(nn.Module):
    """The same of a projection with LoRA beside it: (W + scale B A) of each head, as products with W, A and B."""

    def __init__(self, layer: Any, heads: int, *, part: int = 0, parts: int = 1, back: bool = False) -> None:
        super().__init__()
        (name,) = layer.active_adapters
        self.scale = float(layer.scaling[name])
        self.base = PerHead(layer.base_layer, heads, part=part, parts=parts, back=back)
        self.up = PerHead(layer.lora_B[name], heads, part=part, parts=parts, back=back)
        self.down = PerHead(layer.lora_A[name], 1, back=back)
        self.back = back

    def forward(self, x: Tensor) -> Tensor:
        """Return the products of the plain weights and LoRA's."""
        added = self._shared(self.up(x)) if self.back else self.up(self._shared(x))
        return self.base(x) + self.scale * added

    def _shared(self, x: Tensor) -> Tensor:
        """Return the vectors of all heads through LoRA's narrow side, which all heads share."""
        b, heads, n, width = x.shape
        out: Tensor = self.down(x.reshape(b, 1, heads * n, width))
        return out.view(b, heads, n, -1)

    def products(self, n: int) -> int:
        """Return the multiply-adds for one text with `n` vectors a head."""
        return self.base.products(n) + self.up.products(n) + self.down.products(self.base.heads * n)


def per_head(layer: Any, heads: int, *, part: int = 0, parts: int = 1, back: bool = False) -> PerHead | LoraPerHead:
    """Return a projection head by head, with LoRA's term where peft has put one beside it."""
    made = LoraPerHead if hasattr(layer, "lora_A") else PerHead
    return made(layer, heads, part=part, parts=parts, back=back)
