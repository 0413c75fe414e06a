"""Known shapes of models with seeded weights: right for speed and memory, useless for accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fedbench.base.errors import ModelError, nearest
from fedbench.base.rng import generator
from fedbench.models.residency import RESIDENT, Residency

_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip

#: Sizes of the small shapes, as transformers' configs name them; DistilBERT has names of its own.
_TINY = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_TINY_GATED = _TINY | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
_TINY_ENCODER = _TINY | {"intermediate_size": 48, "max_position_embeddings": 130}

#: Shape -> what its transformers config says beyond the defaults, `model_type` first.
SHAPES: dict[str, dict[str, Any]] = {
    "opt-125m": {
        "model_type": "opt", "vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072,
        "num_attention_heads": 12, "word_embed_proj_dim": 768, "max_position_embeddings": 2048,
    },
    "opt-350m": {
        "model_type": "opt", "vocab_size": 50272, "hidden_size": 1024, "num_hidden_layers": 24, "ffn_dim": 4096,
        "num_attention_heads": 16, "word_embed_proj_dim": 512, "max_position_embeddings": 2048,
        "do_layer_norm_before": False,
    },
    "opt-1.3b": {
        "model_type": "opt", "vocab_size": 50272, "hidden_size": 2048, "num_hidden_layers": 24, "ffn_dim": 8192,
        "num_attention_heads": 32, "word_embed_proj_dim": 2048, "max_position_embeddings": 2048,
    },
    "opt-tiny": {
        "model_type": "opt", **_TINY, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128,
    },
    "gpt2": {"model_type": "gpt2"},
    "gpt2-tiny": {"model_type": "gpt2", "vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "llama-3.2-1b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "rope_parameters": _LLAMA3_ROPE,
    },
    "llama-tiny": {"model_type": "llama", **_TINY_GATED},
    "qwen2-0.5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "max_position_embeddings": 131072, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "qwen2-tiny": {"model_type": "qwen2", **_TINY_GATED, "tie_word_embeddings": True},
    "bert-base": {"model_type": "bert"},
    "bert-tiny": {"model_type": "bert", **_TINY_ENCODER},
    "roberta-base": {
        "model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    },
    "roberta-large": {
        "model_type": "roberta", "vocab_size": 50265, "hidden_size": 1024, "num_hidden_layers": 24,
        "num_attention_heads": 16, "intermediate_size": 4096, "max_position_embeddings": 514, "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    },
    "roberta-tiny": {"model_type": "roberta", **_TINY_ENCODER, "type_vocab_size": 1},
    "distilbert-base": {"model_type": "distilbert"},
    "distilbert-tiny": {
        "model_type": "distilbert", "vocab_size": 512, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48,
        "max_position_embeddings": 128,
    },
}  # fmt: skip

#: Standard deviation of a seeded weight, as the architectures' own initialisation has it.
_SPREAD = 0.02

#: Entries drawn at a time.
_PIECE = 1 << 20


def config_of(name: str) -> Any:
    """Return the transformers config of a shape; an unknown one is a ModelError."""
    import transformers

    if name not in SHAPES:
        raise ModelError(
            f"model.name = 'shape:{name}': unknown shape. Allowed: {', '.join(SHAPES)}.{nearest(name, SHAPES)}"
        )
    known = dict(SHAPES[name])
    return transformers.AutoConfig.for_model(known.pop("model_type"), **known)


def seed_weights(model: torch.nn.Module, seed: int, residency: Residency = RESIDENT) -> None:
    """Set every weight from its name's key: Gaussians for matrices, 1 and 0 for norms and biases."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.ndim > 1:
                source, flat = generator(seed, "shape", number), parameter.view(-1)
                for part in torch.split(flat, _PIECE):
                    draw = source.standard_normal(part.numel(), np.float32)
                    part.copy_(torch.from_numpy(draw).mul_(_SPREAD))
                    residency.release(part.numpy(), written=True)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
