"""The dual forward of every leaf that can hold trained tensors: both streams of the batch, each with its own weights.

A leaf gets both perturbed copies of what it needs from the stream, tile by tile where a matrix is large; frozen
tensors serve both streams in one product. A one-sided visit has the + stream alone and ignores the other copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from fedbench.models.cut import RowHead, wide
from fedbench.models.perhead import PerHead
from fedbench.models.trainable import Tensor
from fedbench.models.vocab import VocabLoss, losses, summary

#: Entries of one scratch tile. A matrix product packs its whole input again for each tile, so tiles are wide: from
#: 1 Mi entries on, products are as fast as those of the whole matrix (docs/engine.md).
TILE = 3 * 512 * 1024

#: Rows of a tile come in multiples of this, which the products' inner kernels divide without a rest.
GRAIN = 64

Pair = tuple[torch.Tensor, torch.Tensor]
Vectors = tuple[torch.Tensor | None, torch.Tensor | None]


class Source(Protocol):
    """Where a leaf gets perturbed copies from: the stream during a visit."""

    def tensor_of(self, parameter: torch.Tensor | None) -> Tensor | None:
        """Return the trainable tensor of a parameter, or None where it is frozen or absent."""

    def streams(self, rows: int) -> tuple[slice, ...]:
        """Return where the rows of each stream lie among `rows`: the + rows first, alone where there is one stream."""

    def pair(self, tensor: Tensor, first: int, count: int, use: str) -> Pair:
        """Return both perturbed copies of a range, flat, in the scratch `use`."""

    def pair_rows(self, tensor: Tensor, rows: torch.Tensor, use: str, columns: int = 0) -> Pair:
        """Return both perturbed copies of some rows of a matrix, in scratch; with `columns`, of one that wide."""


Dual = Callable[..., torch.Tensor]


def _vector(stream: Source, parameter: torch.Tensor | None, use: str) -> Vectors:
    """Return both copies of a bias or a norm's weight; a frozen one stands for both."""
    tensor = stream.tensor_of(parameter)
    return (parameter, parameter) if tensor is None else stream.pair(tensor, 0, tensor.size, use)


def _tile_rows(rows: int, columns: int) -> int:
    """Return the rows of equal tiles of a matrix, each of about TILE entries at most."""
    tiles = -(-rows * columns // TILE)
    return -(-rows // tiles // GRAIN) * GRAIN


def _linear(stream: Source, module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(-1, module.in_features)
    biases = _vector(stream, module.bias, "bias")
    out = torch.empty(flat.shape[0], module.out_features, device=x.device)
    streams = stream.streams(flat.shape[0])
    weight = stream.tensor_of(module.weight)
    if weight is None:
        torch.mm(flat, wide(module.weight).t(), out=out)
        for rows, bias in zip(streams, biases, strict=False):
            if bias is not None:
                out[rows] += bias
    else:
        step = _tile_rows(module.out_features, module.in_features)
        for top in range(0, module.out_features, step):
            end = min(top + step, module.out_features)
            tiles = stream.pair(weight, top * module.in_features, (end - top) * module.in_features, "tile")
            for rows, tile, bias in zip(streams, tiles, biases, strict=False):
                matrix = tile.view(end - top, module.in_features).t()
                if bias is None:
                    torch.mm(flat[rows], matrix, out=out[rows, top:end])
                else:
                    torch.addmm(bias[top:end], flat[rows], matrix, out=out[rows, top:end])
    return out.view(*x.shape[:-1], module.out_features)


def _layer_norm(stream: Source, module: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    weights, biases = _vector(stream, module.weight, "norm weight"), _vector(stream, module.bias, "bias")
    out = F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    for rows, weight, bias in zip(stream.streams(x.shape[0]), weights, biases, strict=False):
        if weight is not None:
            out[rows].mul_(weight)
        if bias is not None:
            out[rows].add_(bias)
    return out


def _embedding(stream: Source, module: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    streams = stream.streams(ids.shape[0])
    tensor = stream.tensor_of(module.weight)
    assert tensor is not None
    used, where = torch.unique(ids[streams[0]], return_inverse=True)
    plus, minus = stream.pair_rows(tensor, used, "rows")
    out = torch.empty(*ids.shape, module.embedding_dim, device=ids.device)
    flat = out.view(len(streams), -1, module.embedding_dim)
    for rows, copy in zip(flat, (plus, minus), strict=False):
        torch.index_select(copy, 0, where.reshape(-1), out=rows)
    return out


def _row_head(stream: Source, module: RowHead, x: torch.Tensor) -> torch.Tensor:
    linear = module.linear
    out = torch.empty(x.shape[0], len(module.rows), device=x.device)
    streams = stream.streams(x.shape[0])
    for use, parameter in (("rows", linear.weight), ("bias", getattr(linear, "bias", None))):
        if parameter is None:
            continue
        tensor = stream.tensor_of(parameter)
        copies = (wide(parameter[module.rows]),) * 2 if tensor is None else stream.pair_rows(tensor, module.rows, use)
        for rows, copy in zip(streams, copies, strict=False):
            if use == "rows":
                torch.mm(x[rows], copy.t(), out=out[rows])
            else:
                out[rows] += copy.reshape(-1)
    return out


def _per_head(stream: Source, module: PerHead, x: torch.Tensor) -> torch.Tensor:
    """A projection head by head: a tile is some heads' matrices."""
    out = torch.empty(*x.shape[:3], module.inputs if module.back else module.size, device=x.device)
    streams = stream.streams(x.shape[0])
    weight = stream.tensor_of(module.linear.weight)
    if weight is None:
        out.copy_(module.times(x, module.matrices(wide(module.linear.weight))))
    else:
        step = max(1, TILE // (module.size * module.inputs))
        for low in range(0, module.heads, step):
            high = min(low + step, module.heads)
            tiles = _head_tiles(stream, module, weight, low, high)
            for rows, tile in zip(streams, tiles, strict=False):
                out[rows, low:high] = module.times(x[rows, low:high], tile)
    if not module.back and module.linear.bias is not None:
        for rows, bias in zip(streams, _vector(stream, module.linear.bias, "bias"), strict=False):
            assert bias is not None
            out[rows] += module.offsets(bias)
    return out


def _head_tiles(stream: Source, module: PerHead, weight: Tensor, low: int, high: int) -> Pair:
    """Return both copies of the matrices of heads low to high, each [high - low, size, inputs]."""
    size, inputs, count = module.size, module.inputs, high - low
    if not module.inputs_first:
        first = (module.part * module.heads + low) * size * inputs
        plus, minus = stream.pair(weight, first, count * size * inputs, "tile")
        return plus.view(count, size, inputs), minus.view(count, size, inputs)
    numbers = torch.arange(weight.size // size, device=weight.parameter.device)
    wanted = numbers.view(inputs, module.parts, module.heads)[:, module.part, low:high].reshape(-1)
    plus, minus = stream.pair_rows(weight, wanted, "tile", size)
    return plus.view(inputs, count, size).permute(1, 2, 0), minus.view(inputs, count, size).permute(1, 2, 0)


#: Input features of one tile of a Conv1D at least: each tile is a product that is added to the output.
_CONV_ROWS = 256


def _conv1d(stream: Source, module: Any, x: torch.Tensor) -> torch.Tensor:
    """GPT-2's Linear, whose weight is [in, out]: a tile is some input features."""
    flat = x.reshape(-1, module.nx)
    out = torch.empty(flat.shape[0], module.nf, device=x.device)
    streams = stream.streams(flat.shape[0])
    for rows, bias in zip(streams, _vector(stream, module.bias, "bias"), strict=False):
        assert bias is not None
        out[rows] = bias
    weight = stream.tensor_of(module.weight)
    if weight is None:
        out.addmm_(flat, wide(module.weight))
    else:
        step = max(_CONV_ROWS, TILE // module.nf)
        for top in range(0, module.nx, step):
            end = min(top + step, module.nx)
            tiles = stream.pair(weight, top * module.nf, (end - top) * module.nf, "tile")
            for rows, tile in zip(streams, tiles, strict=False):
                out[rows].addmm_(flat[rows, top:end], tile.view(end - top, module.nf))
    return out.view(*x.shape[:-1], module.nf)


def _rms_norm(stream: Source, module: Any, x: torch.Tensor) -> torch.Tensor:
    out = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
    copies = _vector(stream, module.weight, "norm weight")
    for rows, weight in zip(stream.streams(x.shape[0]), copies, strict=False):
        assert weight is not None
        out[rows].mul_(weight)
    return out


def _vocab_loss(stream: Source, module: VocabLoss, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Both streams' losses by tiles of the vocabulary, each perturbed once: largest logit and sum are kept as it goes."""
    linear = module.linear
    n = x.shape[0]
    weight, biases = stream.tensor_of(linear.weight), _vector(stream, linear.bias, "bias")
    top, total = x.new_full((n,), -torch.inf), x.new_zeros(n, dtype=torch.float64)
    wanted = x.new_empty(n)
    step = max(1, TILE // linear.in_features)
    for low in range(0, linear.out_features, step):
        high = min(low + step, linear.out_features)
        if weight is None:
            tiles: Any = (wide(linear.weight[low:high]),) * 2
        else:
            tiles = stream.pair(weight, low * linear.in_features, (high - low) * linear.in_features, "tile")
            weight.residency.release(weight.flat[low * linear.in_features : high * linear.in_features])
        for rows, tile, bias in zip(stream.streams(n), tiles, biases, strict=False):
            logits = x[rows] @ tile.view(high - low, -1).t()
            if bias is not None:
                logits += bias[low:high]
            best, sum_ = summary(logits)
            new = torch.maximum(top[rows], best)
            total[rows] *= (top[rows] - new).double().exp()
            total[rows] += sum_ * (best - new).double().exp()
            top[rows] = new
            here = ((targets[rows] >= low) & (targets[rows] < high)).nonzero()[:, 0]
            wanted[rows][here] = logits[here, targets[rows][here] - low]
    return losses(top, total, wanted)


#: Leaf type -> its dual forward; types of transformers by name, since it is imported where a job needs it alone.
LEAVES: dict[type[nn.Module] | str, Dual] = {
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
    RowHead: _row_head,
    PerHead: _per_head,
    VocabLoss: _vocab_loss,
    "Conv1D": _conv1d,
    "LlamaRMSNorm": _rms_norm,
    "Qwen2RMSNorm": _rms_norm,
}


def kind_of(module: nn.Module) -> type[nn.Module] | str:
    """Return the leaf type of a module: itself or the one it is derived from without a forward of its own."""
    if type(module).__module__.startswith("transformers.") and type(module).__name__ in LEAVES:
        return type(module).__name__
    for kind in LEAVES:
        if isinstance(kind, type) and isinstance(module, kind) and type(module).forward is kind.forward:
            return kind
    return type(module)
