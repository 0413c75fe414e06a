"""The layer-streamed dual forward: f(w + h u) and f(w - h u) in one visit of every tensor.

Two streams run through the model as one batch, + rows first. Where a leaf needs a
trainable tensor, both perturbed copies are written tile by tile into scratch that is
used again at once; the weights are only read. Frozen tensors serve both streams in one
product. A local walk (steps that a device has made and nobody else has) is laid over
the weights in the same pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fedbench.base.account import Meter
from fedbench.base.errors import ModelError
from fedbench.data.rows import Batch
from fedbench.models.cut import Cut, RowHead, State, wide
from fedbench.models.trainable import Tensor, Trainable
from fedbench.models.vocab import VocabLoss, losses, summary
from fedbench.zo import micro
from fedbench.zo.direction import AT_WEIGHTS, Direction, Terms
from fedbench.zo.kernels.device import Kernels, kernels_of

#: Entries of one scratch tile. A matrix product packs its whole input again for each tile, so tiles are wide: from
#: 1 Mi entries on, products are as fast as those of the whole matrix (docs/engine.md).
TILE = 3 * 512 * 1024

#: Rows of a tile come in multiples of this, which the products' inner kernels divide without a rest.
GRAIN = 64

Pair = tuple[torch.Tensor, torch.Tensor]
Visit = Batch | State | torch.Tensor
Vectors = tuple[torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class Probe:
    """What a visit perturbs with: w - walk, plus and minus h times the direction."""

    direction: Direction
    h: float
    walk: Terms


class Stream:
    """Runs a cut on pairs of perturbed weights; between visits the model computes as ever."""

    def __init__(self, cut: Cut, trainable: Trainable, meter: Meter, *, gaussian: bool, micro_batch: int = 0) -> None:
        self.cut = cut
        self.micro_batch = micro_batch
        self.meter = meter
        self.gaussian = gaussian
        self.block_runs = [0] * cut.stages
        self._probe: Probe | None = None
        self._tensors = {id(t.parameter): t for t in trainable}
        self._scratch: dict[str, torch.Tensor] = {}
        self._device = next(cut.parameters()).device
        self._view = cut.residency.view
        owned: set[int] = set()
        for module in cut.modules():
            parameters = [p for p in module.parameters(recurse=False) if id(p) in self._tensors]
            leaf = _LEAVES.get(_kind(module))
            if isinstance(module, RowHead | VocabLoss):
                parameters = [p for p in module.linear.parameters() if id(p) in self._tensors]
            if leaf is None or not parameters:
                continue
            owned.update(map(id, parameters))
            module.forward = _Leaf(self, module, leaf)
        for tensor in trainable:
            if id(tensor.parameter) not in owned:
                kinds = ", ".join(kind if isinstance(kind, str) else kind.__name__ for kind in _LEAVES)
                raise ModelError(f"{tensor.name} is trainable but sits in no leaf that can be perturbed ({kinds}).")

    def losses(self, batch: Batch, direction: Direction, h: float, walk: Terms = AT_WEIGHTS) -> tuple[float, float]:
        """Return the mean losses of a batch at w + h u and at w - h u."""
        return self.end(self.begin(batch), 0, batch.labels, Probe(direction, h, walk))

    def begin(self, batch: Batch) -> Batch:
        """Return the batch twice, as the input of both streams."""
        batch = self.cut.residency.batch(batch)
        return Batch(*(torch.cat((t, t)) for t in (batch.ids, batch.mask, batch.labels, batch.lengths)))

    @torch.inference_mode()
    def run(self, state: Visit, stages: range, probe: Probe) -> Visit:
        """Run both streams through some stages: from a batch, or from the states where the stage before ended."""
        self._probe = probe
        try:
            for stage in stages:
                assert not isinstance(state, torch.Tensor)
                rows, length = (state if isinstance(state, Batch) else state.batch).ids.shape
                self.meter.add(self.cut.stage_flops(stage, rows, length))
                self.block_runs[stage] += 1
                state = micro.run_stage(self.cut, stage, state, self.micro_batch, reuse=stage > stages.start)
        finally:
            self._probe = None
        return state

    def end(self, state: Visit, first: int, labels: torch.Tensor, probe: Probe) -> tuple[float, float]:
        """Run both streams from stage `first` to the end; return each one's mean loss, summed in float64."""
        assert not isinstance(state, torch.Tensor)
        batch = state if isinstance(state, Batch) else state.batch
        out = self.run(state, range(first, self.cut.stages), probe)
        assert isinstance(out, torch.Tensor)
        values, n = self.cut.head.losses(out, batch), len(labels)
        return float(values[:n].mean()), float(values[n:].mean())

    @property
    def active(self) -> bool:
        """Whether a visit is under way."""
        return self._probe is not None

    def tensor_of(self, parameter: torch.Tensor | None) -> Tensor | None:
        """Return the trainable tensor of a parameter, or None where it is frozen or absent."""
        return None if parameter is None else self._tensors.get(id(parameter))

    def pair(self, tensor: Tensor, first: int, count: int, use: str) -> Pair:
        """Return both perturbed copies of a range, flat, in the scratch `use`; the next call with it overwrites them."""
        assert self._probe is not None
        direction, h, walk = self._probe.direction, self._probe.h, self._probe.walk
        plus, minus = self._buffer(use + "+", count), self._buffer(use + "-", count)
        guide = direction.guide_flat(tensor.name)
        self._kernels.pair(
            tensor.flat[first : first + count],
            first,
            self._kernels.stream_keys(walk.keys, tensor.key),
            walk.coef,
            self._kernels.stream_keys(direction.key[None], tensor.key)[0],
            h * direction.z_scale,
            guide[first : first + count],
            h * direction.guide_scale,
            self._view(plus),
            self._view(minus),
            self.gaussian,
        )
        return plus, minus

    def pair_rows(self, tensor: Tensor, rows: torch.Tensor, use: str) -> Pair:
        """Return both perturbed copies of some rows (int64 [r]) of a matrix, each [r, columns], in scratch."""
        assert self._probe is not None
        direction, h, walk = self._probe.direction, self._probe.h, self._probe.walk
        weight = tensor.flat.reshape(tensor.parameter.shape[0], -1)
        columns = weight.shape[1]
        size = len(rows) * columns
        plus = self._buffer(use + "+", size).view(len(rows), columns)
        minus = self._buffer(use + "-", size).view(len(rows), columns)
        index = self._view(rows)
        guide = direction.guide_flat(tensor.name)
        guide2d = guide.reshape(weight.shape) if len(guide) else guide.reshape(0, 0)
        for part in tensor.picks(len(index)):
            self._kernels.pair_rows(
                weight,
                index[part],
                self._kernels.stream_keys(walk.keys, tensor.key),
                walk.coef,
                self._kernels.stream_keys(direction.key[None], tensor.key)[0],
                h * direction.z_scale,
                guide2d[index[part]] if len(guide) else guide2d,
                h * direction.guide_scale,
                self._view(plus)[part],
                self._view(minus)[part],
                self.gaussian,
            )
        return plus, minus

    @property
    def _kernels(self) -> Kernels:
        return kernels_of(self.cut.residency)

    def _buffer(self, use: str, count: int) -> torch.Tensor:
        """Return scratch that starts on a cache line, so that products see the same alignment in every process."""
        buffer = self._scratch.get(use)
        if buffer is None or len(buffer) < count:
            buffer = self._scratch[use] = torch.empty(count, device=self._device)
        return buffer[:count]


Dual = Callable[..., torch.Tensor]


class _Leaf:
    """The forward of a leaf that holds trainable tensors."""

    def __init__(self, stream: Stream, module: nn.Module, dual: Dual) -> None:
        self._stream = stream
        self._module = module
        self._dual = dual
        self._plain = module.forward

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self._dual(self._stream, self._module, *inputs) if self._stream.active else self._plain(*inputs)


def _vector(stream: Stream, parameter: torch.Tensor | None, use: str) -> Vectors:
    """Return both copies of a bias or a norm's weight; a frozen one stands for both."""
    tensor = stream.tensor_of(parameter)
    return (parameter, parameter) if tensor is None else stream.pair(tensor, 0, tensor.size, use)


def _tile_rows(rows: int, columns: int) -> int:
    """Return the rows of equal tiles of a matrix, each of about TILE entries at most."""
    tiles = -(-rows * columns // TILE)
    return -(-rows // tiles // GRAIN) * GRAIN


def _linear(stream: Stream, module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(-1, module.in_features)
    half = flat.shape[0] // 2
    biases = _vector(stream, module.bias, "bias")
    out = torch.empty(flat.shape[0], module.out_features, device=x.device)
    halves = (slice(0, half), slice(half, 2 * half))
    weight = stream.tensor_of(module.weight)
    if weight is None:
        torch.mm(flat, wide(module.weight).t(), out=out)
        for rows, bias in zip(halves, biases, strict=True):
            if bias is not None:
                out[rows] += bias
    else:
        step = _tile_rows(module.out_features, module.in_features)
        for top in range(0, module.out_features, step):
            end = min(top + step, module.out_features)
            tiles = stream.pair(weight, top * module.in_features, (end - top) * module.in_features, "tile")
            for rows, tile, bias in zip(halves, tiles, biases, strict=True):
                matrix = tile.view(end - top, module.in_features).t()
                if bias is None:
                    torch.mm(flat[rows], matrix, out=out[rows, top:end])
                else:
                    torch.addmm(bias[top:end], flat[rows], matrix, out=out[rows, top:end])
    return out.view(*x.shape[:-1], module.out_features)


def _layer_norm(stream: Stream, module: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    weights, biases = _vector(stream, module.weight, "norm weight"), _vector(stream, module.bias, "bias")
    out = F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    half = x.shape[0] // 2
    for rows, weight, bias in zip((out[:half], out[half:]), weights, biases, strict=True):
        if weight is not None:
            rows.mul_(weight)
        if bias is not None:
            rows.add_(bias)
    return out


def _embedding(stream: Stream, module: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    half = ids.shape[0] // 2
    tensor = stream.tensor_of(module.weight)
    assert tensor is not None
    used, where = torch.unique(ids[:half], return_inverse=True)
    plus, minus = stream.pair_rows(tensor, used, "rows")
    out = torch.empty(*ids.shape, module.embedding_dim, device=ids.device)
    flat = out.view(2, -1, module.embedding_dim)
    for stream_, copy in enumerate((plus, minus)):
        torch.index_select(copy, 0, where.reshape(-1), out=flat[stream_])
    return out


def _row_head(stream: Stream, module: RowHead, x: torch.Tensor) -> torch.Tensor:
    half = x.shape[0] // 2
    linear = module.linear
    out = torch.empty(x.shape[0], len(module.rows), device=x.device)
    halves = (slice(0, half), slice(half, 2 * half))
    for use, parameter in (("rows", linear.weight), ("bias", getattr(linear, "bias", None))):
        if parameter is None:
            continue
        tensor = stream.tensor_of(parameter)
        copies = (wide(parameter[module.rows]),) * 2 if tensor is None else stream.pair_rows(tensor, module.rows, use)
        for rows, copy in zip(halves, copies, strict=True):
            if use == "rows":
                torch.mm(x[rows], copy.t(), out=out[rows])
            else:
                out[rows] += copy.reshape(-1)
    return out


#: Input features of one tile of a Conv1D at least: each tile is a product that is added to the output.
_CONV_ROWS = 256


def _conv1d(stream: Stream, module: Any, x: torch.Tensor) -> torch.Tensor:
    """GPT-2's Linear, whose weight is [in, out]: a tile is some input features."""
    flat = x.reshape(-1, module.nx)
    half = flat.shape[0] // 2
    out = torch.empty(flat.shape[0], module.nf, device=x.device)
    halves = (slice(0, half), slice(half, 2 * half))
    for rows, bias in zip(halves, _vector(stream, module.bias, "bias"), strict=True):
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
            for rows, tile in zip(halves, tiles, strict=True):
                out[rows].addmm_(flat[rows, top:end], tile.view(end - top, module.nf))
    return out.view(*x.shape[:-1], module.nf)


def _rms_norm(stream: Stream, module: Any, x: torch.Tensor) -> torch.Tensor:
    out = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
    half = x.shape[0] // 2
    for rows, weight in zip((out[:half], out[half:]), _vector(stream, module.weight, "norm weight"), strict=True):
        assert weight is not None
        rows.mul_(weight)
    return out


def _vocab_loss(stream: Stream, module: VocabLoss, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Both streams' losses by tiles of the vocabulary, each perturbed once: largest logit and sum are kept as it goes."""
    linear = module.linear
    n, half = x.shape[0], x.shape[0] // 2
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
        for rows, tile, bias in zip((slice(0, half), slice(half, n)), tiles, biases, strict=True):
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
_LEAVES: dict[type[nn.Module] | str, Dual] = {
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
    RowHead: _row_head,
    VocabLoss: _vocab_loss,
    "Conv1D": _conv1d,
    "LlamaRMSNorm": _rms_norm,
    "Qwen2RMSNorm": _rms_norm,
}


def _kind(module: nn.Module) -> type[nn.Module] | str:
    """Return the leaf type of a module: itself or the one it is derived from without a forward of its own."""
    if type(module).__module__.startswith("transformers.") and type(module).__name__ in _LEAVES:
        return type(module).__name__
    for kind in _LEAVES:
        if isinstance(kind, type) and isinstance(module, kind) and type(module).forward is kind.forward:
            return kind
    return type(module)
