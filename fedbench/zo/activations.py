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
from fedbench.models.folded import Attention
from fedbench.models.perhead import LoraPerHead, PerHead
from fedbench.models.trainable import Tensor, Trainable
from fedbench.models.vocab import VocabLoss
from fedbench.zo.leaves import kind_of


class Matrix(NamedTuple):
    """A trainable matrix and the module whose inputs it multiplies; `transposed` where it is stored [in, out]."""

    tensor: Tensor
    leaf: nn.Module
    inputs: int
    outputs: int
    transposed: bool


def matrices(cut: Cut, trainable: Trainable) -> list[Matrix]:
    """Return the trainable matrices that are only ever multiplied by, in the order of `trainable`.

    Tensors that are also looked up row by row are left out, and those whose inputs no module sees.
    """
    tensors = {id(t.parameter): t for t in trainable}
    found: dict[str, Matrix] = {}
    left_out: set[str] = set()
    for module in cut.modules():
        for layer, leaf in _uses(module):
            tensor = tensors.get(id(layer.weight))
            if tensor is None:
                continue
            if leaf is None:
                left_out.add(tensor.name)
            else:  # a folded layer comes after the block whose matrices it uses
                transposed = kind_of(layer) == "Conv1D"
                shape = tuple(layer.weight.shape)
                outputs, inputs = shape[::-1] if transposed else shape
                found[tensor.name] = Matrix(tensor, leaf, inputs, outputs, transposed)
    return [found[t.name] for t in trainable if t.name in found and t.name not in left_out]


def _uses(module: Any) -> list[tuple[Any, nn.Module | None]]:
    """Return the layers whose weights a module uses, each with the module that their inputs enter, where one sees them."""
    if kind_of(module) in (nn.Linear, "Conv1D"):
        return [(module, module)]
    if isinstance(module, RowHead | VocabLoss):
        return [(module.linear, module)]
    if isinstance(module, nn.Embedding):
        return [(module, None)]
    uses: list[tuple[Any, nn.Module | None]] = []
    for part in (module.query, module.key, module.value) if isinstance(module, Attention) else ():
        if isinstance(part, PerHead):
            uses.append((part.linear, module))
        elif isinstance(part, LoraPerHead):
            inner = None if part.back else part.up
            uses += [(part.base.linear, module), (part.down.linear, module), (part.up.linear, inner)]
    return uses


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
