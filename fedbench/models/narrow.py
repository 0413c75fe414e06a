"""bfloat16 weights: frozen matrices are stored in half the bytes and widened where they are used.

What is trained stays float32: a probing step of 1e-5 lies below the spacing of bfloat16
(methods.md 1.5), and sums of many small updates must not be rounded away. All arithmetic is
float32, so directions, losses and gradients are those of the widened weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedbench.base.errors import ConfigError
from fedbench.models.cut import Cut, wide


def narrow(cut: Cut) -> int:
    """Store every frozen matrix of a cut as bfloat16 and return how many bytes that saves.

    ConfigError where a matrix sits in a module that can't widen it.
    """
    frozen = {id(p) for p in cut.parameters() if p.ndim > 1 and not p.requires_grad}
    done: dict[int, nn.Parameter] = {}
    for module in cut.modules():
        forward = _WIDENED.get(_kind(module))
        weight = module._parameters.get("weight")
        if forward is not None and weight is not None and id(weight) in frozen:
            done[id(weight)] = weight
            module.forward = _Widened(module, forward)
    for name, parameter in cut.named_parameters():
        if id(parameter) in frozen and id(parameter) not in done:
            kinds = ", ".join(_WIDENED)
            raise ConfigError(f"model.dtype = 'bfloat16': {name} is the weight of no {kinds} and can't be widened.")
    for parameter in done.values():
        parameter.data = parameter.data.to(torch.bfloat16)
    return sum(2 * parameter.numel() for parameter in done.values())


class _Widened:
    """The plain forward of a leaf whose matrix is stored narrow."""

    def __init__(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        self._module = module
        self._forward = forward

    def __call__(self, x: Tensor) -> Tensor:
        return self._forward(self._module, x)


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, wide(module.weight), module.bias)


def _embedding(module: nn.Embedding, ids: Tensor) -> Tensor:
    return wide(F.embedding(ids, module.weight))


def _conv1d(module: Any, x: Tensor) -> Tensor:
    return F.linear(x, wide(module.weight).t(), module.bias)


def _kind(module: nn.Module) -> str:
    """Return the class of a leaf of torch or transformers; others may have the same name (peft has a Linear)."""
    return type(module).__name__ if type(module).__module__.startswith(("torch.", "transformers.")) else ""


#: Class name -> its forward with a widened matrix.
_WIDENED: dict[str, Callable[..., Tensor]] = {"Linear": _linear, "Embedding": _embedding, "Conv1D": _conv1d}
