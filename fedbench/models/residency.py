"""Where the weights of a model are, as the code that visits them sees it.

A resident model has all weights in memory and nothing here does anything; a mapped one (`mapped.py`) brings a stage
in before its visit and gives the memory back after it. Values are the same bits either way. A model on a GPU
(`ondevice.py`) has its batches and guides brought there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from fedbench.data.rows import Batch


class Residency:
    """Weights in ordinary memory: the base of every other place."""

    #: Entries of a range that is worked on at a time; 0 is a whole tensor.
    piece = 0
    #: Rows of a matrix that are picked at a time; 0 is all of them.
    picked_rows = 0
    #: Where kernels work on the weights: `cpu` on NumPy views, `gpu` on torch tensors.
    kernels: Literal["cpu", "gpu"] = "cpu"

    @contextmanager
    def skeleton(self) -> Iterator[None]:
        """Build modules whose weights have shapes and no memory; their buffers are real."""
        plain = nn.Module.register_parameter

        def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
            if param is not None and param.device.type != "meta":
                param = nn.Parameter(param.detach().to("meta"), param.requires_grad)
            plain(module, name, param)

        setattr(nn.Module, "register_parameter", register)  # noqa: B010  (a method of another library's class)
        try:
            yield
        finally:
            setattr(nn.Module, "register_parameter", plain)  # noqa: B010

    def place(self, cut: Any) -> None:
        """Bring all weights of a cut to where they belong; those of a skeleton get memory and the value 0."""
        rebind(cut, lambda parameter: torch.zeros(parameter.shape) if parameter.is_meta else parameter.detach())

    @contextmanager
    def visit(self, stage: int) -> Iterator[None]:
        """Hold a stage in memory during the block; visits of the same stage may be nested."""
        yield

    def release(self, array: np.ndarray[Any, Any], *, written: bool = False) -> None:
        """Give back the memory of a range of weights; `written` says that it was changed."""

    def bytes_held(self) -> int:
        """Return the most bytes of weights that lie in memory at a time; 0 where that is all of them."""
        return 0

    def batch(self, batch: Batch) -> Batch:
        """Return a batch where the weights are."""
        return batch

    def view(self, values: torch.Tensor) -> Any:
        """Return a tensor as the array that kernels work on, its memory shared: here a NumPy view."""
        return values.numpy()

    def host(self, view: Any) -> np.ndarray[Any, Any]:
        """Return a view as a NumPy array: here itself."""
        return view

    def take(self, array: np.ndarray[Any, Any]) -> Any:
        """Return a NumPy array as one that can be combined with views: here itself."""
        return array

    def told(self) -> str:
        """Return the hardware that computes, in words."""
        return "cpu"


def rebind(module: nn.Module, values_of: Callable[[nn.Parameter], torch.Tensor]) -> None:
    """Replace every parameter by one with the values that are returned for it; shared ones stay shared."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(values_of(parameter), parameter.requires_grad)
                part._parameters[name] = made[id(parameter)]


RESIDENT = Residency()
