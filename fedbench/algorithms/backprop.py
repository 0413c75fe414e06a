"""Local steps of a device by gradients: the optimisers, and the walk that leaves the replica's weights as they were.

Optimiser state lives for one round. What a method does with the change is its own business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from fedbench.algorithms.base import Lab, Round
from fedbench.data.rows import Batch
from fedbench.models.trainable import Tensor
from fedbench.zo.guide import gradient, mean_gradient

Kind = Literal["sgd", "adamw"]

#: AdamW's decay rates and the number that keeps its division finite, as torch has them.
BETAS, TINY = (0.9, 0.999), 1e-8


class Optimiser:
    """SGD, or AdamW with its decay apart from the gradient, over the steps of one round.

    `torch.optim` would do the same, and its first use imports torch's compiler: 2 s and memory that would be measured.
    """

    def __init__(self, kind: Kind, parameters: Sequence[nn.Parameter], lr: float, decay: float = 0.0) -> None:
        self._kind, self._parameters, self._lr, self._decay = kind, parameters, lr, decay
        self._steps = 0
        adam = [torch.zeros_like(p, requires_grad=False) for p in parameters if kind == "adamw"]
        self._first, self._second = adam, [torch.zeros_like(m) for m in adam]

    @torch.no_grad()
    def step(self, grads: Sequence[torch.Tensor]) -> None:
        """Move the parameters by one step along gradients in their order."""
        self._steps += 1
        if self._kind == "adamw":
            self._adamw(grads)
            return
        for w, g in zip(self._parameters, grads, strict=True):
            w.add_(g.add(w, alpha=self._decay) if self._decay else g, alpha=-self._lr)

    def _adamw(self, grads: Sequence[torch.Tensor]) -> None:
        """m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;  w <- (1 - lr decay) w - lr m^ / (sqrt(v^) + tiny)."""
        (b1, b2), t = BETAS, self._steps
        for w, g, m, v in zip(self._parameters, grads, self._first, self._second, strict=True):
            m.lerp_(g, 1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            w.mul_(1 - self._lr * self._decay)
            spread = v.sqrt().div_((1 - b2**t) ** 0.5).add_(TINY)
            w.addcdiv_(m, spread, value=-self._lr / (1 - b1**t))


@contextmanager
def walking(tensors: Sequence[Tensor]) -> Iterator[list[torch.Tensor]]:
    """Give copies of the tensors as they are, and put their values back at the end."""
    start = [t.parameter.detach().clone() for t in tensors]
    try:
        yield start
    finally:
        with torch.no_grad():
            for tensor, before in zip(tensors, start, strict=True):
                tensor.parameter.copy_(before)


def descend(lab: Lab, round_: Round, device: int, kind: Kind, decay: float) -> tuple[list[torch.Tensor], list[float]]:
    """Return w_i - w of every trainable tensor (float32) after S local steps by backpropagation, and each step's loss."""
    tensors = lab.trainable.tensors
    losses = []
    with walking(tensors) as start:
        optimiser = Optimiser(kind, lab.trainable.parameters, round_.lr, decay)
        for step in range(lab.local_steps):
            loss, grads = gradient(lab.cut, lab.trainable, lab.private(round_.number, step, device), lab.meter)
            losses.append(loss)
            optimiser.step(grads)
        change = [t.parameter.detach() - before for t, before in zip(tensors, start, strict=True)]
    return change, losses


def on_public_rows(lab: Lab, rows: Iterable[Batch], lr: float) -> float:
    """Step the weights in place, w <- w - lr grad f_pub(w; rows) (cloud only), and return the loss before the step."""
    loss, grads = mean_gradient(lab.cut, lab.trainable, rows, lab.meter)
    with torch.no_grad():
        for parameter, grad in zip(lab.trainable.parameters, grads, strict=True):
            parameter.add_(grad, alpha=-lr)
    return loss
