"""Known shapes of models with seeded weights: right for speed and memory, useless for accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fedbench.base.errors import ModelError, nearest
from fedbench.base.rng import generator

#: Shape -> what its transformers config says beyond the defaults, `model_type` first.
SHAPES: dict[str, dict[str, Any]] = {
    "opt-125m": {
        "model_type": "opt", "vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072,
        "num_attention_heads": 12, "word_embed_proj_dim": 768, "max_position_embeddings": 2048,
    },
}  # fmt: skip

#: Standard deviation of a seeded weight, as the architectures' own initialisation has it.
_SPREAD = 0.02


def config_of(name: str) -> Any:
    """Return the transformers config of a shape; an unknown one is a ModelError."""
    import transformers

    if name not in SHAPES:
        raise ModelError(f"model.name = 'shape:{name}': unknown shape. Allowed: {', '.join(SHAPES)}.{nearest(name, SHAPES)}")
    known = dict(SHAPES[name])
    return transformers.AutoConfig.for_model(known.pop("model_type"), **known)


def seed_weights(model: torch.nn.Module, seed: int) -> None:
    """Set every weight from its name's key: Gaussians for matrices, 1 and 0 for norms and biases."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.ndim > 1:
                draw = generator(seed, "shape", number).standard_normal(parameter.numel(), np.float32)
                parameter.copy_(torch.from_numpy(draw).view_as(parameter) * _SPREAD)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
