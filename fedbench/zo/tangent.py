"""Forward-mode derivatives of a cut's loss: a value and its tangent go through one plain forward.

Weights are exchanged for dual numbers meanwhile and put back; no graph is kept and no gradient is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedbench.base.errors import ModelError, NumericsError
from fedbench.data.rows import Batch
from fedbench.models.cut import Cut

#: A forward with a tangent beside every value counts as two (methods.md 1.3).
JVP_FORWARDS = 2.0


def jvp(cut: Cut, batch: Batch, tangents: Mapping[int, torch.Tensor]) -> tuple[float, float]:
    """Return the mean loss of a batch and its derivative along `tangents`, by the id of the parameter.

    Attention runs in the form made of plain products, since the fused ones have no forward derivative; an operation
    without one is a ModelError, numbers that aren't finite a NumericsError.
    """
    batch = cut.residency.batch(batch)
    try:
        with forward_ad.dual_level(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _dual(cut, tangents):
            loss = cut.head.losses(cut(batch), batch).mean()
            value, slope = forward_ad.unpack_dual(loss)  # type: ignore[no-untyped-call]
    except NotImplementedError as error:
        raise ModelError(
            f"method.spry.derivative = 'jvp': an operation of {type(cut).__name__} has no forward derivative "
            f"({str(error).splitlines()[0]}); allowed here: 'central'."
        ) from None
    found = float(value), 0.0 if slope is None else float(slope)
    if not all(torch.isfinite(torch.tensor(found))):
        raise NumericsError(f"A loss of {found[0]} with the derivative {found[1]} is not a finite number.")
    return found


@contextmanager
def _dual(cut: Cut, tangents: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Hold dual numbers in place of the parameters that have a tangent, wherever a module uses them."""
    made: dict[int, torch.Tensor] = {}
    before = []
    for module in cut.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in tangents:
                number = id(parameter)
                if number not in made:
                    held = parameter.detach()
                    made[number] = forward_ad.make_dual(held, tangents[number])  # type: ignore[no-untyped-call]
                before.append((module, name, parameter))
    for module, name, parameter in before:
        module._parameters[name] = made[id(parameter)]  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, name, parameter in before:
            module._parameters[name] = parameter
