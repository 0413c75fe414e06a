"""Which tensors a job trains: names, stages and sizes; nothing here changes a value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from fedbench.base.errors import ModelError
from fedbench.base.rng import tensor_key
from fedbench.models.cut import Cut
from fedbench.models.residency import RESIDENT, Residency

PARTS = ("full", "bitfit", "lora", "adapter", "head")

#: Part -> what the names of its tensors contain, a new classifier aside.
_MARKS = {"bitfit": "bias", "lora": "lora_", "adapter": ".adapter."}


@dataclass(frozen=True)
class Tensor:
    """One trainable tensor: the parameter, its flat float32 view and the key of its directions.

    The view is what kernels work on: a NumPy array, or a torch tensor where the weights are on a device.
    """

    name: str
    stage: int
    parameter: nn.Parameter
    flat: Any
    key: int
    residency: Residency = RESIDENT

    @property
    def size(self) -> int:
        """Number of entries."""
        return int(self.parameter.numel())

    def values(self) -> np.ndarray:
        """Return the entries as a flat NumPy array: the tensor's own memory, or a copy of a device's."""
        return self.residency.host(self.flat)

    def assign(self, values: np.ndarray) -> None:
        """Set all entries."""
        self.flat[:] = self.residency.take(values.reshape(-1))

    def add(self, values: np.ndarray) -> None:
        """Add to all entries."""
        flat = self.flat
        flat += self.residency.take(values.reshape(-1))

    def pieces(self, *, written: bool = False) -> Iterator[tuple[int, Any]]:
        """Yield (first entry, flat view) of ranges that cover the tensor, a mapped one's memory given back after each.

        `written` says that the ranges are changed.
        """
        step = self.residency.piece or self.size
        for first in range(0, self.size, step):
            part = self.flat[first : first + step]
            yield first, part
            self.residency.release(part, written=written)

    def picks(self, count: int) -> Iterator[slice]:
        """Yield slices of `count` picked rows, a mapped tensor's memory given back after each."""
        step = self.residency.picked_rows or max(1, count)
        for first in range(0, count, step):
            yield slice(first, min(first + step, count))
            if self.residency.picked_rows:
                self.residency.release(self.flat)


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

    `bitfit` keeps every name that contains "bias", `lora` and `adapter` the tensors that `parts.add` put in, and all
    three the classifier head (methods.md 2.3); a model that reads its label words from a language-model head has none.
    """
    names = {id(p): name for name, p in cut.named_parameters()}
    cut.requires_grad_(False)
    chosen: list[Tensor] = []
    for stage, modules in enumerate(cut.stage_modules()):
        for parameter in (p for module in modules for p in module.parameters()):
            name = names[id(parameter)]
            wanted = part == "full" or name.startswith("head.") or (part in _MARKS and _MARKS[part] in name)
            if part == "head" and stage == cut.stages - 1:
                wanted = True
            if not wanted or any(t.parameter is parameter for t in chosen):
                continue
            flat = cut.residency.view(parameter.detach()).reshape(-1)
            chosen.append(Tensor(name, stage, parameter, flat, tensor_key(name), cut.residency))
            parameter.requires_grad_(True)
    if not chosen:
        raise ModelError(f"model.trainable = {part!r} leaves nothing to train in {type(cut).__name__}.")
    return Trainable(part, tuple(chosen))
