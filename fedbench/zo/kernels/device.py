"""Which kernels work on a model's weights: those of the CPU or those of the GPU, with the same functions."""

from __future__ import annotations

from typing import Any, Protocol

from fedbench.models.residency import Residency
from fedbench.zo.kernels import cpu, gpu
from fedbench.zo.kernels.reference import F32, U64


class Kernels(Protocol):
    """The functions of `cpu.py` and `gpu.py`; weights, guides and outputs are of the residency's kind."""

    def stream_keys(self, direction_keys: U64, tensor_key: int) -> U64:
        """Return the stream keys of directions in one tensor."""

    def pair(
        self, w: Any, first: int, walk_keys: U64, walk_coef: F32, key: U64, scale: float, guide: Any,
        guide_scale: float, plus: Any, minus: Any, gaussian: bool,
    ) -> None:  # fmt: skip
        """Write both perturbed copies of a range."""

    def pair_rows(
        self, w: Any, rows: Any, walk_keys: U64, walk_coef: F32, key: U64, scale: float, guide: Any,
        guide_scale: float, plus: Any, minus: Any, gaussian: bool,
    ) -> None:  # fmt: skip
        """Write both perturbed copies of some rows."""

    def update(self, w: Any, first: int, keys: U64, coef: F32, guide: Any, guide_coef: float, gaussian: bool) -> None:
        """Subtract K directions and the guide in place."""


def kernels_of(residency: Residency) -> Kernels:
    """Return the kernels for weights that are there."""
    return gpu if residency.kernels == "gpu" else cpu
