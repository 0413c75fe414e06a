"""The cloud's side: backpropagation on public rows, and the unit guide made from it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from fedbench.base.account import Meter
from fedbench.base.errors import NumericsError
from fedbench.data.rows import Batch
from fedbench.models.cut import Cut
from fedbench.models.trainable import Trainable

#: A backward counts as two forwards (methods.md 1.3).
BACKPROP_FORWARDS = 3.0


def gradient(cut: Cut, trainable: Trainable, batch: Batch, meter: Meter) -> tuple[float, list[torch.Tensor]]:
    """Return the mean loss of a batch and its gradient in every trainable tensor (float32), in evaluation mode."""
    batch = cut.residency.batch(batch)
    loss = cut.head.losses(cut(batch), batch).mean()
    grads = torch.autograd.grad(loss, trainable.parameters, allow_unused=True)
    meter.add(BACKPROP_FORWARDS * cut.forward_flops(*batch.ids.shape))
    value = float(loss.detach())
    if not np.isfinite(value):
        raise NumericsError(f"The loss of a backpropagation step is {value}.")
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(trainable.parameters, grads, strict=True)]
    return value, filled


def mean_gradient(
    cut: Cut, trainable: Trainable, batches: Iterable[Batch], meter: Meter
) -> tuple[float, list[torch.Tensor]]:
    """Return loss and gradient averaged over batches with equal weight per row."""
    total: list[torch.Tensor] = []
    rows, loss = 0, 0.0
    for batch in batches:
        n = len(batch.labels)
        value, grads = gradient(cut, trainable, batch, meter)
        loss += n * value
        rows += n
        if total:
            for sum_, grad in zip(total, grads, strict=True):
                sum_.add_(grad, alpha=n)
        else:
            total = [grad * n for grad in grads]
    return loss / rows, [sum_.div_(rows) for sum_ in total]


def unit_guide(trainable: Trainable, grads: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """Return the gradient divided by its joint L2 norm over all trainable tensors, by name (float32)."""
    square = sum(float(grad.double().square().sum()) for grad in grads)
    if square == 0.0:
        raise NumericsError("The public gradient is exactly zero: there is no direction to guide along.")
    scale = 1.0 / np.sqrt(square)
    return {t.name: grad.mul(scale).cpu().numpy() for t, grad in zip(trainable, grads, strict=True)}
