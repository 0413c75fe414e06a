"""Heads: which position is read, and through which weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedbench.data.rows import Batch
from fedbench.models.cut import Head, RowHead


class LabelWords(Head):
    """The logits of label words after a text's last token, through the rows of a causal model's own output layer."""

    def __init__(self, norm: nn.Module, output: nn.Linear, words: Sequence[int]) -> None:
        super().__init__()
        self.norm = norm
        self.output = RowHead(output, words)
        self.classes = len(words)

    def features(self, h: Tensor, batch: Batch) -> Tensor:
        """Return the normed state at each text's last token."""
        return self.norm(h[torch.arange(len(h)), batch.lengths - 1])

    def classify(self, features: Tensor) -> Tensor:
        """Return the logits of the label words."""
        return self.output(features)


class MeanPooled(Head):
    """A linear layer of its own on the mean state over a text's real tokens."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)
        self.classes = classes

    def features(self, h: Tensor, batch: Batch) -> Tensor:
        """Return the mean state over each text's real tokens."""
        weight = batch.mask.to(h.dtype)
        return (h * weight[:, :, None]).sum(1) / weight.sum(1, keepdim=True)

    def classify(self, features: Tensor) -> Tensor:
        """Return the linear layer's logits."""
        return self.linear(features)
