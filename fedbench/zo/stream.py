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
from fedbench.models.cut import Cut, RowHead, State
from fedbench.models.trainable import Tensor, Trainable
from fedbench.zo.direction import AT_WEIGHTS, Direction, Terms
from fedbench.zo.kernels import cpu

#: Entries of one scratch tile: two of them stay in a core's second-level cache.
TILE = 128 * 1024

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

    def __init__(self, cut: Cut, trainable: Trainable, meter: Meter, *, gaussian: bool) -> None:
        self.cut = cut
        self.meter = meter
        self.gaussian = gaussian
        self.block_runs = [0] * cut.stages
        self._probe: Probe | None = None
        self._tensors = {id(t.parameter): t for t in trainable}
        self._scratch: dict[tuple[str, int], torch.Tensor] = {}
        owned: set[int] = set()
        for module in cut.modules():
            parameters = [p for p in module.parameters(recurse=False) if id(p) in self._tensors]
            leaf = _LEAVES.get(_kind(module))
            if isinstance(module, RowHead):
                parameters = [p for p in module.linear.parameters() if id(p) in self._tensors]
            if leaf is None or not parameters:
                continue
            owned.update(map(id, parameters))
            module.forward = _Leaf(self, module, leaf)
        for tensor in trainable:
            if id(tensor.parameter) not in owned:
                kinds = ", ".join(kind.__name__ for kind in _LEAVES)
                raise ModelError(f"{tensor.name} is trainable but sits in no leaf that can be perturbed ({kinds}).")

    def losses(self, batch: Batch, direction: Direction, h: float, walk: Terms = AT_WEIGHTS) -> tuple[float, float]:
        """Return the mean losses of a batch at w + h u and at w - h u."""
        return self.end(self.begin(batch), 0, batch.labels, Probe(direction, h, walk))

    def begin(self, batch: Batch) -> Batch:
        """Return the batch twice, as the input of both streams."""
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
                state = self.cut.run_stage(stage, state)
        finally:
            self._probe = None
        return state

    def end(self, state: Visit, first: int, labels: torch.Tensor, probe: Probe) -> tuple[float, float]:
        """Run both streams from stage `first` to the end; return each one's mean cross-entropy, summed in float64."""
        logits = self.run(state, range(first, self.cut.stages), probe)
        assert isinstance(logits, torch.Tensor)
        n = len(labels)
        return _mean_loss(logits[:n], labels), _mean_loss(logits[n:], labels)

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
        cpu.pair(
            tensor.flat[first : first + count],
            first,
            cpu.stream_keys(walk.keys, tensor.key),
            walk.coef,
            cpu.stream_keys(direction.key[None], tensor.key)[0],
            h * direction.z_scale,
            guide[first : first + count],
            h * direction.guide_scale,
            plus.numpy(),
            minus.numpy(),
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
        index = rows.numpy()
        guide = direction.guide_flat(tensor.name)
        guide2d = guide.reshape(weight.shape)[index] if guide.size else guide.reshape(0, 0)
        cpu.pair_rows(
            weight,
            index,
            cpu.stream_keys(walk.keys, tensor.key),
            walk.coef,
            cpu.stream_keys(direction.key[None], tensor.key)[0],
            h * direction.z_scale,
            guide2d,
            h * direction.guide_scale,
            plus.numpy(),
            minus.numpy(),
            self.gaussian,
        )
        return plus, minus

    def _buffer(self, use: str, count: int) -> torch.Tensor:
        """Return scratch that starts on a cache line, so that products see the same alignment in every process."""
        size = TILE if use.startswith("tile") and count <= TILE else count
        buffer = self._scratch.get((use, size))
        if buffer is None:
            buffer = self._scratch[use, size] = torch.empty(size)
        return buffer[:count]


Dual = Callable[[Stream, Any, torch.Tensor], torch.Tensor]


def _mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return float(F.cross_entropy(logits.double(), labels))


class _Leaf:
    """The forward of a leaf that holds trainable tensors."""

    def __init__(self, stream: Stream, module: nn.Module, dual: Dual) -> None:
        self._stream = stream
        self._module = module
        self._dual = dual
        self._plain = module.forward

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._dual(self._stream, self._module, x) if self._stream.active else self._plain(x)


def _vector(stream: Stream, parameter: torch.Tensor | None, use: str) -> Vectors:
    """Return both copies of a bias or a norm's weight; a frozen one stands for both."""
    tensor = stream.tensor_of(parameter)
    return (parameter, parameter) if tensor is None else stream.pair(tensor, 0, tensor.size, use)


def _linear(stream: Stream, module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(-1, module.in_features)
    half = flat.shape[0] // 2
    biases = _vector(stream, module.bias, "bias")
    out = torch.empty(flat.shape[0], module.out_features)
    halves = (slice(0, half), slice(half, 2 * half))
    weight = stream.tensor_of(module.weight)
    if weight is None:
        torch.mm(flat, module.weight.t(), out=out)
        for rows, bias in zip(halves, biases, strict=True):
            if bias is not None:
                out[rows] += bias
    else:
        step = max(1, TILE // module.in_features)
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
    out = torch.empty(*ids.shape, module.embedding_dim)
    flat = out.view(2, -1, module.embedding_dim)
    for stream_, copy in enumerate((plus, minus)):
        torch.index_select(copy, 0, where.reshape(-1), out=flat[stream_])
    return out


def _row_head(stream: Stream, module: RowHead, x: torch.Tensor) -> torch.Tensor:
    half = x.shape[0] // 2
    linear = module.linear
    out = torch.empty(x.shape[0], len(module.rows))
    halves = (slice(0, half), slice(half, 2 * half))
    for use, parameter in (("rows", linear.weight), ("bias", getattr(linear, "bias", None))):
        if parameter is None:
            continue
        tensor = stream.tensor_of(parameter)
        copies = (parameter[module.rows],) * 2 if tensor is None else stream.pair_rows(tensor, module.rows, use)
        for rows, copy in zip(halves, copies, strict=True):
            if use == "rows":
                torch.mm(x[rows], copy.t(), out=out[rows])
            else:
                out[rows] += copy.reshape(-1)
    return out


_LEAVES: dict[type[nn.Module], Dual] = {
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
    RowHead: _row_head,
}


def _kind(module: nn.Module) -> type[nn.Module]:
    """Return the leaf type of a module: itself or the one it is derived from without a forward of its own."""
    for kind in _LEAVES:
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return kind
    return type(module)
