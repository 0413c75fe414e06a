"""The cloud's side: backpropagation on public rows, and the orthonormal guides made from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from fedbench.base.account import Meter
from fedbench.base.errors import NumericsError
from fedbench.data.rows import Batch
from fedbench.models.cut import Cut, State
from fedbench.models.trainable import Trainable
from fedbench.zo.layout import Layout

#: A backward counts as two forwards (methods.md 1.3).
BACKPROP_FORWARDS = 3.0

#: What is left of a gradient once the guides before it are taken out, over its own length: less is rounding.
_INDEPENDENT = 1e-4


def gradient(
    cut: Cut, trainable: Trainable, batch: Batch, meter: Meter, poll: Callable[[], None] = lambda: None
) -> tuple[float, list[torch.Tensor]]:
    """Return the mean loss of a batch and its gradient in every trainable tensor (float32), in evaluation mode.

    `poll` is called after each stage, forwards and backwards.
    """
    batch = cut.residency.batch(batch)
    loss = cut.head.losses(_polled(cut, batch, poll), batch).mean()
    grads = torch.autograd.grad(loss, trainable.parameters, allow_unused=True)
    meter.add(BACKPROP_FORWARDS * cut.forward_flops(*batch.ids.shape))
    value = float(loss.detach())
    if not np.isfinite(value):
        raise NumericsError(f"The loss of a backpropagation step is {value}.")
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(trainable.parameters, grads, strict=True)]
    return value, filled


def _polled(cut: Cut, batch: Batch, poll: Callable[[], None]) -> torch.Tensor:
    """Return what the head reads of a batch by the plain forward, with `poll` called after each stage of both passes."""
    state: State | Batch = batch
    for stage in range(cut.stages - 1):
        after = cut.run_stage(stage, state)
        assert isinstance(after, State)
        poll()
        if after.h.requires_grad and after.h.device.type == "cpu":  # a GPU's backward runs in a thread of its own
            after.h.register_hook(lambda _: poll())  # type: ignore[no-untyped-call]
        state = after
    out = cut.run_stage(cut.stages - 1, state)
    assert isinstance(out, torch.Tensor)
    return out


def mean_gradient(
    cut: Cut, trainable: Trainable, batches: Iterable[Batch], meter: Meter, poll: Callable[[], None] = lambda: None
) -> tuple[float, list[torch.Tensor]]:
    """Return loss and gradient averaged over batches with equal weight per row; `poll` is called after each stage."""
    total: list[torch.Tensor] = []
    rows, loss = 0, 0.0
    for batch in batches:
        n = len(batch.labels)
        value, grads = gradient(cut, trainable, batch, meter, poll)
        loss += n * value
        rows += n
        if total:
            for sum_, grad in zip(total, grads, strict=True):
                sum_.add_(grad, alpha=n)
        else:
            total = [grad * n for grad in grads]
    return loss / rows, [sum_.div_(rows) for sum_ in total]


def by_class(batches: Iterable[Batch], classes: int) -> list[list[Batch]]:
    """Return the public batches of each class apart; classes without a row are left out."""
    apart: list[list[Batch]] = [[] for _ in range(classes)]
    for batch in batches:
        for label in range(classes):
            chosen = batch.labels == label
            if bool(chosen.any()):
                apart[label].append(
                    Batch(batch.ids[chosen], batch.mask[chosen], batch.labels[chosen], batch.lengths[chosen])
                )
    return [own for own in apart if own]


def unit_guides(layout: Layout, gradients: Sequence[list[torch.Tensor]]) -> dict[str, np.ndarray]:
    """Return orthonormal guides over all trainable tensors jointly, by the layout's names (float32).

    Several gradients are made orthonormal in their order (modified Gram-Schmidt, in float64 sums); the layers' shares
    of one gradient are orthogonal as they are, and each gets length 1.
    """
    tensors = list(layout.trainable)
    if layout.by_layer:
        (grads,) = gradients
        squares = dict.fromkeys(range(layout.count), 0.0)
        for tensor, grad in zip(tensors, grads, strict=True):
            squares[layout.of(tensor)[0]] += _product(grad, grad)
        scale = {j: _inverse_length(square, f"layer {j}") for j, square in squares.items()}
        return {
            layout.name(0, t): grad.mul(scale[layout.of(t)[0]]).cpu().numpy()
            for t, grad in zip(tensors, grads, strict=True)
        }
    done: list[list[torch.Tensor]] = []
    for j, grads in enumerate(gradients):
        length = np.sqrt(sum(_product(g, g) for g in grads))
        left = grads
        for other in done:
            along = sum(_product(g, o) for g, o in zip(left, other, strict=True))
            left = [g - along * o for g, o in zip(left, other, strict=True)]
        square = sum(_product(g, g) for g in left)
        if done and square <= (_INDEPENDENT * length) ** 2:
            raise NumericsError(f"Guide {j} lies in the span of the {len(done)} before it: ask for fewer guides.")
        done.append([g.mul(_inverse_length(square, f"guide {j}")) for g in left])
    return {
        layout.name(j, t): grad.cpu().numpy()
        for j, grads in enumerate(done)
        for t, grad in zip(tensors, grads, strict=True)
    }


def _product(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.double() * right.double()).sum())


def _inverse_length(square: float, what: str) -> float:
    if square == 0.0:
        raise NumericsError(f"The public gradient is exactly zero ({what}): there is no direction to guide along.")
    return float(1.0 / np.sqrt(square))
