"""Which tensors a job trains: names, stages and sizes; nothing here changes a value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import nn

from fedbench.base.errors import ModelError
from fedbench.base.rng import tensor_key
from fedbench.models.cut import Cut

PARTS = ("full", "bitfit", "head")


@dataclass(frozen=True)
class Tensor:
    """One trainable tensor: the parameter, its flat float32 NumPy view and the key of its directions."""

    name: str
    stage: int
    parameter: nn.Parameter
    flat: np.ndarray
    key: int

    @property
    def size(self) -> int:
        """Number of entries."""
        return int(self.flat.size)


@dataclass(frozen=True)
class Trainable:
    """The trainable tensors of a cut in forward order, and how the part is called."""

    part: str
    tensors: tuple[Tensor, ...]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    @property
    def size(self) -> int:
        """Number of trainable entries (d of methods.md)."""
        return sum(tensor.size for tensor in self.tensors)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters, in the same order."""
        return [tensor.parameter for tensor in self.tensors]


def select(cut: Cut, part: str) -> Trainable:
    """Return the trainable tensors of `part` and switch gradients on for them alone.

    `bitfit` keeps every name that contains "bias" and the classifier head (methods.md 2.3);
    a model that reads its label words from a language-model head has no classifier.
    """
    names = {id(p): name for name, p in cut.named_parameters()}
    cut.requires_grad_(False)
    chosen: list[Tensor] = []
    for stage, modules in enumerate(cut.stage_modules()):
        for parameter in (p for module in modules for p in module.parameters()):
            name = names[id(parameter)]
            wanted = part == "full" or name.startswith("head.") or (part == "bitfit" and "bias" in name)
            if part == "head" and stage == cut.stages - 1:
                wanted = True
            if not wanted or any(t.parameter is parameter for t in chosen):
                continue
            flat = parameter.detach().numpy().reshape(-1)
            chosen.append(Tensor(name, stage, parameter, flat, tensor_key(name)))
            parameter.requires_grad_(True)
    if not chosen:
        raise ModelError(f"model.trainable = {part!r} leaves nothing to train in {type(cut).__name__}.")
    return Trainable(part, tuple(chosen))
