"""Start values of a head that a checkpoint does not hold: class prototypes, or small keyed Gaussians."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fedbench.base.errors import ModelError
from fedbench.base.rng import generator
from fedbench.data.rows import Rows
from fedbench.models.cut import Cut

#: The linear layer that reads a model's features, which no class of transformers has a place for.
HEAD_FILE = "fedbench_head.safetensors"

_FEATURE_ROWS = 64
_SPREAD = 0.02


def features_of(cut: Cut, rows: Rows) -> np.ndarray:
    """Return the feature rows [n, width] (float32) of `rows` by the plain forward, in batches of similar length."""
    order = np.argsort(rows.lengths, kind="stable")
    parts = []
    with torch.inference_mode():
        for start in range(0, len(rows), _FEATURE_ROWS):
            parts.append(cut.trunk(cut.residency.batch(rows.batch(order[start : start + _FEATURE_ROWS]))).cpu().numpy())
    sorted_ = np.concatenate(parts)
    features = np.empty_like(sorted_)
    features[order] = sorted_
    return features


def gaussians(model: torch.nn.Module, names: Iterable[str], seed: int) -> None:
    """Set the named parameters of a model: matrices to Gaussians of spread 0.02 from their names, vectors to 0."""
    with torch.no_grad():
        for name in names:
            parameter = model.get_parameter(name)
            if parameter.ndim > 1:
                draws = generator(seed, f"head {name}").standard_normal(parameter.shape).astype(np.float32)
                parameter.copy_(torch.from_numpy(_SPREAD * draws))
            else:
                parameter.zero_()


def exported(cut: Cut, folder: Path | None) -> bool:
    """Set the linear head to the one that an export left in the model's folder; return False where there is none."""
    path = None if folder is None else folder / HEAD_FILE
    if path is None or not path.is_file():
        return False
    linear: Any = cut.head.linear
    wanted = {name: tuple(tensor.shape) for name, tensor in linear.state_dict().items()}
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: no safetensors file: {error}.") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if shapes != wanted:
        raise ModelError(
            f"{path}: holds a head of {shapes}; the task needs {wanted}. Remove it to start from prototypes."
        )
    with torch.no_grad():
        for name, parameter in linear.named_parameters():
            parameter.copy_(found[name])
    return True


def prototypes(cut: Cut, public: Rows) -> None:
    """Set the linear head to the class prototypes of the public rows.

    Prototypes are the nearest-centroid rule as a linear layer, f.m_c - |m_c|^2 / 2 with m_c the
    centred class means, scaled so that the public rows' logits have a root mean square of 1.
    """
    linear: Any = cut.head.linear
    features = features_of(cut, public).astype(np.float64)
    means = np.stack([features[public.labels == label].mean(0) for label in range(cut.classes)])
    centre = means.mean(0)
    weight = means - centre
    bias = -weight @ centre - 0.5 * (weight**2).sum(1)
    logits = features @ weight.T + bias
    scale = 1.0 / np.sqrt(np.mean((logits - logits.mean(1, keepdims=True)) ** 2))
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy((scale * weight).astype(np.float32)))
        linear.bias.copy_(torch.from_numpy((scale * bias).astype(np.float32)))
