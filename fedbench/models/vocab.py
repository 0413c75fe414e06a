"""The loss over a whole vocabulary, piece by piece, so that logits of all tokens never exist together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedbench.models.cut import wide

#: Entries of the logits that exist at a time.
PIECE = 1 << 22


class VocabLoss(nn.Module):
    """An output layer that is asked for losses alone: float64 [n, 2], a token's loss and whether it was the likeliest."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return losses and hits of states x [n, width] and token ids int64 [n], some tokens at a time.

        Under autograd the logits of a piece are made again in the backward pass instead of being kept.
        """
        size = max(1, PIECE // self.linear.out_features)
        weight = wide(self.linear.weight)
        pieces = zip(torch.split(x, size), torch.split(targets, size), strict=True)
        if torch.is_grad_enabled():
            return torch.cat([checkpoint(self._piece, weight, *piece, use_reentrant=False) for piece in pieces])
        return torch.cat([self._piece(weight, *piece) for piece in pieces])

    def _piece(self, weight: Tensor, x: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(x, weight, self.linear.bias)
        return losses(*summary(logits), logits.gather(1, targets[:, None])[:, 0])


def summary(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest logit of each row [n] and the float64 sum of the exponentials of all above it [n]."""
    top = logits.detach().amax(1)
    return top, (logits - top[:, None]).exp().sum(1).double()


def losses(top: Tensor, total: Tensor, wanted: Tensor) -> Tensor:
    """Return loss and hit, float64 [n, 2], from a row's `summary` and the logit of its target [n]."""
    nll = top.double() + total.log() - wanted.double()
    return torch.stack((nll, (wanted.detach() >= top).double()), 1)
