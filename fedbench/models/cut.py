"""Models cut into stages: embed (stage 0), blocks (1 .. L), head (L + 1).

A cut runs one stage at a time, so that an engine can hold one stage's perturbed
weights, keep the states at a boundary, or stream weights in. No stage mixes rows of
a batch. Nothing here perturbs, trains or moves a weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedbench.data.rows import Batch
from fedbench.models.residency import RESIDENT, Residency


class State(NamedTuple):
    """What crosses a stage boundary: states [b, t, width], the attention mask of the blocks and the batch.

    Behind a last block that runs for the read positions alone, t is 1.
    """

    h: Tensor
    mask: Tensor | None
    batch: Batch


def wide(weight: Tensor) -> Tensor:
    """Return a weight as float32: itself, or a copy where it is stored narrow (`narrow.py`)."""
    return weight if weight.dtype == torch.float32 else weight.float()


def read_at(h: Tensor, places: Tensor) -> Tensor:
    """Return the state of one place of each text, [b, width]; states of one position are those that were read."""
    return h[:, 0] if h.shape[1] == 1 else h[torch.arange(len(h), device=h.device), places]


class RowHead(nn.Module):
    """The rows of a Linear that the loss needs: logits [n, rows] instead of [n, out]."""

    rows: Tensor

    def __init__(self, linear: nn.Linear, rows: Sequence[int]) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("rows", torch.tensor(rows, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x times the chosen rows, with their bias where there is one."""
        bias = self.linear.bias
        return F.linear(x, wide(self.linear.weight[self.rows]), None if bias is None else bias[self.rows])


def products(module: nn.Module) -> int:
    """Return the multiply-adds of a module's weight matrices for one position."""
    if isinstance(module, RowHead):
        return len(module.rows) * module.linear.in_features
    matrix = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    weight: Any = module.weight if matrix else None
    return (weight.numel() if matrix else 0) + sum(products(child) for child in module.children())


class Head(nn.Module, ABC):
    """How a text's states become its loss; the last norm of a decoder belongs to it."""

    classes: int

    #: Whether every text is read at one position alone, the one of `places`.
    one_place = False

    def places(self, batch: Batch) -> Tensor:
        """Return the position that is read of each text, int64 [b]: its last token."""
        return batch.lengths - 1

    @abstractmethod
    def features(self, h: Tensor, batch: Batch) -> Tensor:
        """Return one feature row per text, [b, width], before the classifying weights."""

    @abstractmethod
    def classify(self, features: Tensor) -> Tensor:
        """Return logits [b, classes] of feature rows."""

    def read(self, h: Tensor, batch: Batch) -> Tensor:
        """Return what the last stage gives for each text: its logits [b, classes]."""
        return self.classify(self.features(h, batch))

    def losses(self, out: Tensor, batch: Batch) -> Tensor:
        """Return the loss of each text, float64 [b], from what `read` returned: the cross-entropy of its label."""
        return F.cross_entropy(out.double(), batch.labels, reduction="none")

    def hits(self, out: Tensor, batch: Batch) -> Tensor:
        """Return the share of each text that is right, float64 [b] in 0..1, from what `read` returned."""
        return (out.argmax(1) == batch.labels).double()

    def flops(self, rows: int, length: int) -> float:
        """Return the FLOPs of `read`: its matrices at one position a text."""
        return 2.0 * rows * products(self)


class Cut(nn.Module, ABC):
    """A classifier in stages; `width` is the size of its states and `classes` the number of labels."""

    width: int

    #: Where the weights are: every visit of a stage goes through it.
    residency: Residency = RESIDENT

    #: Where the weights come from, in words.
    weights = ""

    #: What runs a block of the architecture for one position of each text (`folded.py`), where it is causal.
    folding: Any = None

    #: The last block in that form, where the head reads one position: the way in which it runs. Else None.
    last: Any

    def __init__(self, backbone: Any, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.last = None
        self.fold()

    @property
    def classes(self) -> int:
        """Number of labels."""
        return self.head.classes

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The repeated layers."""

    @property
    @abstractmethod
    def embed_modules(self) -> Sequence[nn.Module]:
        """The modules that stage 0 runs."""

    @abstractmethod
    def embed(self, batch: Batch) -> State:
        """Return the first states of a batch."""

    @abstractmethod
    def block(self, index: int, state: State) -> State:
        """Return the states after block `index` (from 0)."""

    def fold(self) -> None:
        """Make the last block's form for one position; once more where modules of that block were replaced."""
        if self.folding is not None and self.head.one_place:
            self.last = self.folding(self.blocks[-1])

    def turns(self, state: State) -> tuple[Tensor, ...]:
        """Return what a block's attention needs of the positions besides states and mask."""
        return ()

    @property
    def attention_width(self) -> int:
        """Entries of all heads' queries at one position."""
        return self.width

    @cached_property
    def _products(self) -> list[int]:
        """Entries of the weight matrices of stage 0 and of each block."""
        return [sum(map(products, modules)) for modules in (self.embed_modules, *([b] for b in self.blocks))]

    @property
    def stages(self) -> int:
        """Number of stages: embed, blocks and head."""
        return len(self.blocks) + 2

    def stage_name(self, stage: int) -> str:
        """Return what people call a stage: embed, layer 1 .. layer L, head."""
        return "embed" if stage == 0 else "head" if stage == self.stages - 1 else f"layer {stage}"

    def run_stage(self, stage: int, state: State | Batch) -> State | Tensor:
        """Run one stage: stage 0 takes a batch, the last one returns what the head reads (logits, mostly)."""
        with self.residency.visit(stage):
            if stage == 0:
                assert isinstance(state, Batch)
                return self.embed(state)
            assert isinstance(state, State)
            if stage == self.stages - 1:
                return self.head.read(state.h, state.batch)
            if self.last is not None and stage == self.stages - 2:
                places = self.head.places(state.batch)
                return state._replace(h=self.last(state.h, places, *self.turns(state)))
            return self.block(stage - 1, state)

    def states(self, batch: Batch) -> State:
        """Return what the last block gives for a batch by the plain forward."""
        state: Any = batch
        for stage in range(self.stages - 1):
            state = self.run_stage(stage, state)
        return state

    def trunk(self, batch: Batch) -> Tensor:
        """Return the feature rows of a batch by the plain forward."""
        state = self.states(batch)
        with self.residency.visit(self.stages - 1):
            return self.head.features(state.h, batch)

    def forward(self, batch: Batch) -> Tensor:
        """Return what the head reads of a batch by the plain forward: logits [b, classes], mostly."""
        out = self.run_stage(self.stages - 1, self.states(batch))
        assert isinstance(out, Tensor)
        return out

    def stage_modules(self) -> list[Sequence[nn.Module]]:
        """Return the modules of each stage; a tensor used in two stages belongs to the first."""
        return [self.embed_modules, *([block] for block in self.blocks), [self.head]]

    def stage_flops(self, stage: int, rows: int, length: int) -> float:
        """Return multiply-adds times two of one forward of a stage, padding included.

        Matrix products alone are counted: projections, attention scores and mixing (the full
        square, causal or not), and what the head reads.
        """
        if stage == self.stages - 1:
            return self.head.flops(rows, length)
        if self.last is not None and stage == self.stages - 2:
            return float(self.last.flops(rows, length, self.width))
        dense = 2.0 * rows * length * self._products[stage]
        return dense if stage == 0 else dense + 4.0 * rows * length * length * self.attention_width

    def forward_flops(self, rows: int, length: int) -> float:
        """Return the FLOPs of one forward of the whole model (C of methods.md)."""
        return sum(self.stage_flops(stage, rows, length) for stage in range(self.stages))
