"""What enters the trainable matrices of a model in a forward: for directions that follow activations.

It listens to leaves and keeps copies of their inputs; it changes no forward and no weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from fedbench.models.cut import Cut, RowHead
from fedbench.models.trainable import Tensor, Trainable
from fedbench.models.vocab import VocabLoss
from fedbench.zo.leaves import kind_of


class Matrix(NamedTuple):
    """A trainable matrix and the leaf that multiplies by it; `transposed` where it is stored [in, out]."""

    tensor: Tensor
    leaf: nn.Module
    inputs: int
    outputs: int
    transposed: bool


def matrices(cut: Cut, trainable: Trainable) -> list[Matrix]:
    """Return the trainable matrices that are only ever multiplied by, in the order of `trainable`."""
    tensors = {id(t.parameter): t for t in trainable}
    found: dict[str, Matrix] = {}
    looked_up: set[str] = set()
    for module in cut.modules():
        weight: Any = getattr(module.linear if isinstance(module, RowHead | VocabLoss) else module, "weight", None)
        tensor = tensors.get(id(weight))
        if tensor is None:
            continue
        kind = kind_of(module)
        if kind in (nn.Linear, RowHead, VocabLoss, "Conv1D"):
            outputs, inputs = weight.shape[::-1] if kind == "Conv1D" else weight.shape
            if tensor.name not in found or not isinstance(module, nn.Linear):
                found[tensor.name] = Matrix(tensor, module, inputs, outputs, kind == "Conv1D")
        elif weight.dim() == 2:
            looked_up.add(tensor.name)
    return [found[t.name] for t in trainable if t.name in found and t.name not in looked_up]


@contextmanager
def captured(wanted: Iterable[Matrix]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Collect copies of what enters each matrix's leaf meanwhile, by the tensor's name; a leaf may run more than once."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = []
    for matrix in wanted:

        def keep(_: nn.Module, inputs: tuple[torch.Tensor, ...], name: str = matrix.tensor.name) -> None:
            seen.setdefault(name, []).append(inputs[0].clone())

        handles.append(matrix.leaf.register_forward_pre_hook(keep))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
