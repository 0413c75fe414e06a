"""Heads: which position is read, and through which weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fedbench.data.rows import Batch
from fedbench.models.cut import Head, RowHead, read_at
from fedbench.models.vocab import VocabLoss


class LabelWords(Head):
    """The logits of label words after a text's last token, through the rows of a causal model's own output layer.

    `norm` is what the model runs between its last layer and the output layer.
    """

    one_place = True

    def __init__(self, norm: nn.Module, output: nn.Linear, words: Sequence[int]) -> None:
        super().__init__()
        self.norm = norm
        self.output = RowHead(output, words)
        self.classes = len(words)

    def features(self, h: Tensor, batch: Batch) -> Tensor:
        """Return the normed state at each text's last token."""
        return self.norm(read_at(h, self.places(batch)))

    def classify(self, features: Tensor) -> Tensor:
        """Return the logits of the label words."""
        return self.output(features)


class MaskWords(LabelWords):
    """The logits of label words at the mask token, through the rows of a masked language model's own output layer.

    Where a text has more than one mask token the last one is read, and without one the first position.
    """

    def __init__(self, transform: nn.Module, output: nn.Linear, words: Sequence[int], mask: int) -> None:
        super().__init__(transform, output, words)
        self.mask = mask

    def places(self, batch: Batch) -> Tensor:
        """Return the position of each text's mask token, int64 [b]."""
        places = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        return (places * (batch.ids == self.mask)).amax(1)


class Classifier(Head):
    """A classifying layer on the state of one token, the first or the last, after what the architecture puts between."""

    one_place = True

    def __init__(self, before: nn.Module, linear: nn.Linear, where: Literal["first", "last"]) -> None:
        super().__init__()
        self.before = before
        self.linear = linear
        self.where = where
        self.classes = linear.out_features

    def places(self, batch: Batch) -> Tensor:
        """Return the position that is read of each text, int64 [b]."""
        return torch.zeros_like(batch.lengths) if self.where == "first" else super().places(batch)

    def features(self, h: Tensor, batch: Batch) -> Tensor:
        """Return what the classifying layer sees of each text."""
        return self.before(read_at(h, self.places(batch)))

    def classify(self, features: Tensor) -> Tensor:
        """Return the classifying layer's logits."""
        return self.linear(features)


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


class NextToken(Head):
    """Causal language modelling: the mean loss of a text's tokens from its second on; labels are not read."""

    def __init__(self, norm: nn.Module, output: nn.Linear, classes: int) -> None:
        super().__init__()
        self.norm = norm
        self.vocabulary = VocabLoss(output)
        self.classes = classes

    def features(self, h: Tensor, batch: Batch) -> Tensor:
        """Return the normed state at each text's last token."""
        return self.norm(read_at(h, self.places(batch)))

    def classify(self, features: Tensor) -> Tensor:
        """Return the logits of the whole vocabulary."""
        return self.vocabulary.linear(features)

    def read(self, h: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss and the share of right tokens of each text, float64 [b, 2]."""
        b, t = batch.ids.shape
        x = self.norm(h[:, :-1]).flatten(0, 1)
        scores = self.vocabulary(x, batch.ids[:, 1:].reshape(-1)).view(b, t - 1, 2)
        counted = batch.mask[:, 1:, None].double()
        return (scores * counted).sum(1) / counted.sum(1).clamp(min=1.0)

    def losses(self, out: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss of each text's tokens, float64 [b]."""
        return out[:, 0]

    def hits(self, out: Tensor, batch: Batch) -> Tensor:
        """Return the share of each text's tokens that were the likeliest, float64 [b]."""
        return out[:, 1]

    def flops(self, rows: int, length: int) -> float:
        """Return the FLOPs of `read`: the matrices at every position but the last, padding included."""
        return super().flops(rows, length) * (length - 1)
