"""The layer-streamed dual forward: f(w + h u) and f(w - h u) in one visit of every tensor.

Two streams run through the model as one batch, + rows first. Where a leaf needs a
trainable tensor, both perturbed copies are written tile by tile into scratch that is
used again at once; the weights are only read. Frozen tensors serve both streams in one
product. A local walk (steps that a device has made and nobody else has) is laid over
the weights in the same pass. One-sided estimators run the + stream alone: f(w + h u),
and f(w) as the same with h = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fedbench.base.account import Meter
from fedbench.base.errors import ModelError
from fedbench.data.rows import Batch
from fedbench.models.cut import Cut, RowHead, State
from fedbench.models.perhead import PerHead
from fedbench.models.trainable import Tensor, Trainable
from fedbench.models.vocab import VocabLoss
from fedbench.zo import micro
from fedbench.zo.direction import AT_WEIGHTS, Direction, Terms
from fedbench.zo.kernels.device import Kernels, kernels_of
from fedbench.zo.leaves import LEAVES, Dual, Pair, kind_of
from fedbench.zo.ranges import pieces_of

Visit = Batch | State | torch.Tensor

_NO_ROWS = np.empty((0, 0), np.float32)


def _nothing_to_poll() -> None:
    """Do nothing: the stream of a rank without messages under way."""


@dataclass(frozen=True)
class Front:
    """What tensors of the stages before `until` take instead, wherever a visit meets them (a tied one in the head)."""

    until: int
    direction: Direction
    h: float


@dataclass(frozen=True)
class Probe:
    """What a visit perturbs with: w - walk, plus and minus h times the direction; one side is plus alone."""

    direction: Direction
    h: float
    walk: Terms = AT_WEIGHTS
    sides: int = 2
    front: Front | None = None

    def of(self, tensor: Tensor) -> tuple[Direction, float]:
        """Return a tensor's direction and step."""
        front = self.front
        return (self.direction, self.h) if front is None or tensor.stage >= front.until else (front.direction, front.h)


class Stream:
    """Runs a cut on pairs of perturbed weights; between visits the model computes as ever."""

    def __init__(self, cut: Cut, trainable: Trainable, meter: Meter, *, gaussian: bool, micro_batch: int = 0) -> None:
        self.cut = cut
        self.micro_batch = micro_batch
        self.meter = meter
        self.gaussian = gaussian
        self.block_runs = [0] * cut.stages
        #: Called after each tile that is perturbed, so that messages under way get on while the device computes.
        self.poll: Callable[[], None] = _nothing_to_poll
        self._probe: Probe | None = None
        self._tensors = {id(t.parameter): t for t in trainable}
        self._scratch: dict[str, torch.Tensor] = {}
        self._device = next(cut.parameters()).device
        self._view = cut.residency.view
        owned: set[int] = set()
        for module in cut.modules():
            parameters = [p for p in module.parameters(recurse=False) if id(p) in self._tensors]
            leaf = LEAVES.get(kind_of(module))
            if isinstance(module, PerHead | RowHead | VocabLoss):
                parameters = [p for p in module.linear.parameters() if id(p) in self._tensors]
            if leaf is None or not parameters:
                continue
            owned.update(map(id, parameters))
            module.forward = _Leaf(self, module, leaf)
        for tensor in trainable:
            if id(tensor.parameter) not in owned:
                kinds = ", ".join(kind if isinstance(kind, str) else kind.__name__ for kind in LEAVES)
                raise ModelError(f"{tensor.name} is trainable but sits in no leaf that can be perturbed ({kinds}).")

    def losses(self, batch: Batch, direction: Direction, h: float, walk: Terms = AT_WEIGHTS) -> tuple[float, float]:
        """Return the mean losses of a batch at w + h u and at w - h u."""
        plus, minus = self.end(self.begin(batch), 0, Probe(direction, h, walk))
        return plus, minus

    def loss(self, batch: Batch, direction: Direction, h: float, walk: Terms = AT_WEIGHTS) -> float:
        """Return the mean loss of a batch at w + h u; with h = 0 at w, whatever the direction."""
        (plus,) = self.end(self.begin(batch, 1), 0, Probe(direction, h, walk, 1))
        return plus

    def begin(self, batch: Batch, sides: int = 2) -> Batch:
        """Return the batch as the input of both streams, or of one."""
        batch = self.cut.residency.batch(batch)
        return batch if sides == 1 else _twice(batch)

    def both(self, state: Visit) -> State:
        """Return the states of one stream as those of two, for two-sided probes that begin there."""
        assert isinstance(state, State)
        rows = len(state.batch.ids)
        mask = state.mask
        if mask is not None and len(mask) == rows:
            mask = torch.cat((mask, mask))
        return State(torch.cat((state.h, state.h)), mask, _twice(state.batch))

    @torch.inference_mode()
    def run(self, state: Visit, stages: range, probe: Probe) -> Visit:
        """Run all streams through some stages: from a batch, or from the states where the stage before ended."""
        self._probe = probe
        try:
            for stage in stages:
                assert not isinstance(state, torch.Tensor)
                rows, length = (state if isinstance(state, Batch) else state.batch).ids.shape
                self.meter.add(self.cut.stage_flops(stage, rows, length))
                self.block_runs[stage] += 1
                state = micro.run_stage(
                    self.cut, stage, state, self.micro_batch, probe.sides, reuse=stage > stages.start
                )
        finally:
            self._probe = None
        return state

    def end(self, state: Visit, first: int, probe: Probe) -> tuple[float, ...]:
        """Run all streams from stage `first` to the end; return each one's mean loss, summed in float64."""
        assert not isinstance(state, torch.Tensor)
        batch = state if isinstance(state, Batch) else state.batch
        out = self.run(state, range(first, self.cut.stages), probe)
        assert isinstance(out, torch.Tensor)
        return tuple(float(part.mean()) for part in self.cut.head.losses(out, batch).chunk(probe.sides))

    @property
    def active(self) -> bool:
        """Whether a visit is under way."""
        return self._probe is not None

    def streams(self, rows: int) -> tuple[slice, ...]:
        """Return where the rows of each stream lie among `rows` of a visit: the + rows first."""
        assert self._probe is not None
        each = rows // self._probe.sides
        return tuple(slice(side * each, (side + 1) * each) for side in range(self._probe.sides))

    def tensor_of(self, parameter: torch.Tensor | None) -> Tensor | None:
        """Return the trainable tensor of a parameter, or None where it is frozen or absent."""
        return None if parameter is None else self._tensors.get(id(parameter))

    def pair(self, tensor: Tensor, first: int, count: int, use: str) -> Pair:
        """Return both perturbed copies of a range, flat, in the scratch `use`; the next call with it overwrites them."""
        assert self._probe is not None
        (direction, h), walk = self._probe.of(tensor), self._probe.walk
        plus, minus = self._buffer(use + "+", count), self._buffer(use + "-", count)
        walk_keys = self._kernels.stream_keys(walk.keys, tensor.key)
        key = self._kernels.stream_keys(direction.key[None], tensor.key)[0]
        for low, high, values in pieces_of(direction.guide, tensor, first, count):
            self._kernels.pair(
                tensor.flat[low:high],
                low,
                walk_keys,
                walk.coef,
                key,
                h * direction.z_scale,
                self._taken(values),
                h * direction.guide_scale,
                self._view(plus)[low - first : high - first],
                self._view(minus)[low - first : high - first],
                self.gaussian,
            )
            self.poll()
        return plus, minus

    def pair_rows(self, tensor: Tensor, rows: torch.Tensor, use: str, columns: int = 0) -> Pair:
        """Return both perturbed copies of some rows (int64 [r]) of a matrix, each [r, columns], in scratch.

        With `columns` the tensor is taken as a matrix of that many columns.
        """
        assert self._probe is not None
        (direction, h), walk = self._probe.of(tensor), self._probe.walk
        columns = columns or tensor.size // tensor.parameter.shape[0]
        weight = tensor.flat.reshape(-1, columns)
        size = len(rows) * columns
        plus = self._buffer(use + "+", size).view(len(rows), columns)
        minus = self._buffer(use + "-", size).view(len(rows), columns)
        index = self._view(rows)
        host = self.cut.residency.host(index)
        for part in tensor.picks(len(index)):
            guide = _NO_ROWS if direction.guide is None else direction.guide.rows(tensor, host[part], columns)
            self._kernels.pair_rows(
                weight,
                index[part],
                self._kernels.stream_keys(walk.keys, tensor.key),
                walk.coef,
                self._kernels.stream_keys(direction.key[None], tensor.key)[0],
                h * direction.z_scale,
                self._taken(guide),
                h * direction.guide_scale,
                self._view(plus)[part],
                self._view(minus)[part],
                self.gaussian,
            )
            self.poll()
        return plus, minus

    def _taken(self, values: np.ndarray) -> Any:
        """Return a guide's values where the weights are; nothing stays nothing."""
        return self.cut.residency.take(values) if values.size else values

    @property
    def _kernels(self) -> Kernels:
        return kernels_of(self.cut.residency)

    def _buffer(self, use: str, count: int) -> torch.Tensor:
        """Return scratch that starts on a cache line, so that products see the same alignment in every process."""
        buffer = self._scratch.get(use)
        if buffer is None or len(buffer) < count:
            buffer = self._scratch[use] = torch.empty(count, device=self._device)
        return buffer[:count]


def _twice(batch: Batch) -> Batch:
    return Batch(*(torch.cat((t, t)) for t in (batch.ids, batch.mask, batch.labels, batch.lengths)))


class _Leaf:
    """The forward of a leaf that holds trainable tensors."""

    def __init__(self, stream: Stream, module: nn.Module, dual: Dual) -> None:
        self._stream = stream
        self._module = module
        self._dual = dual
        self._plain = module.forward

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self._dual(self._stream, self._module, *inputs) if self._stream.active else self._plain(*inputs)
