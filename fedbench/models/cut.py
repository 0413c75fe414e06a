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


class State(NamedTuple):
    """What crosses a stage boundary: states [b, t, width], the attention mask of the blocks and the batch."""

    h: Tensor
    mask: Tensor | None
    batch: Batch


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
        return F.linear(x, self.linear.weight[self.rows], None if bias is None else bias[self.rows])


class Head(nn.Module, ABC):
    """How a text's states become its logits; the last norm of a decoder belongs to it."""

    classes: int

    @abstractmethod
    def features(self, h: Tensor, batch: Batch) -> Tensor:
        """Return one feature row per text, [b, width], before the classifying weights."""

    @abstractmethod
    def classify(self, features: Tensor) -> Tensor:
        """Return logits [b, classes] of feature rows."""


class Cut(nn.Module, ABC):
    """A classifier in stages; `width` is the size of its states and `classes` the number of labels."""

    width: int

    def __init__(self, backbone: Any, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

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

    @cached_property
    def _products(self) -> list[int]:
        """Entries of the weight matrices of each block."""
        return [sum(m.weight.numel() for m in b.modules() if isinstance(m, nn.Linear)) for b in self.blocks]

    @property
    def stages(self) -> int:
        """Number of stages: embed, blocks and head."""
        return len(self.blocks) + 2

    def run_stage(self, stage: int, state: State | Batch) -> State | Tensor:
        """Run one stage: stage 0 takes a batch, the last one returns logits."""
        if stage == 0:
            assert isinstance(state, Batch)
            return self.embed(state)
        assert isinstance(state, State)
        if stage == self.stages - 1:
            return self.head.classify(self.head.features(state.h, state.batch))
        return self.block(stage - 1, state)

    def trunk(self, batch: Batch) -> Tensor:
        """Return the feature rows of a batch by the plain forward."""
        state = self.embed(batch)
        for index in range(len(self.blocks)):
            state = self.block(index, state)
        return self.head.features(state.h, batch)

    def forward(self, batch: Batch) -> Tensor:
        """Return logits [b, classes] by the plain forward."""
        return self.head.classify(self.trunk(batch))

    def stage_modules(self) -> list[Sequence[nn.Module]]:
        """Return the modules of each stage; a tensor used in two stages belongs to the first."""
        return [self.embed_modules, *([block] for block in self.blocks), [self.head]]

    def stage_flops(self, stage: int, rows: int, length: int) -> float:
        """Return multiply-adds times two of one forward of a stage, padding included.

        Matrix products alone are counted: projections, attention scores and mixing (the full
        square, causal or not), and the head's rows for one position a text.
        """
        if stage == 0:
            return 0.0
        if stage == self.stages - 1:
            return 2.0 * rows * self.width * self.classes
        products = self._products[stage - 1]
        return 2.0 * rows * length * products + 4.0 * rows * length * length * self.width

    def forward_flops(self, rows: int, length: int) -> float:
        """Return the FLOPs of one forward of the whole model (C of methods.md)."""
        return sum(self.stage_flops(stage, rows, length) for stage in range(self.stages))
