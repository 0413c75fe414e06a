"""Parts that bring weights of their own: LoRA matrices (through peft) and bottleneck adapters.

Both start as the identity: what is added on the way up is zero, what is on the way down is
drawn from its name's key. Nothing of the model itself is changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedbench.base.errors import ModelError
from fedbench.base.job import ModelSection
from fedbench.base.rng import generator, tensor_key
from fedbench.models.cut import Cut

#: Projections that LoRA goes beside where peft has no choice of its own for the architecture.
_LORA_TARGETS = {"embedded": ("query", "value"), "distilbert": ("q_lin", "v_lin")}

_ADAPTER_SPREAD = 0.02


class Bottleneck(nn.Module):
    """h + up(relu(down(h))): the Pfeiffer adapter, one after each block."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, inner)
        self.up = nn.Linear(inner, width)

    def forward(self, h: Tensor) -> Tensor:
        """Return the adapted states, [b, t, width]."""
        out: Tensor = h + self.up(torch.relu(self.down(h)))
        return out


class Adapted(nn.Module):
    """A block with an adapter behind it."""

    def __init__(self, block: nn.Module, adapter: Bottleneck) -> None:
        super().__init__()
        self.block = block
        self.adapter = adapter

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return what the block returns, its states adapted."""
        out = self.block(*inputs, **named)
        return (self.adapter(out[0]), *out[1:]) if isinstance(out, tuple) else self.adapter(out)


def add(cut: Cut, part: str, section: ModelSection, seed: int) -> None:
    """Put the weights of `part` into the cut; a part that adds none leaves it as it is."""
    if part == "lora":
        _add_lora(cut, section.lora_rank, section.lora_alpha, seed)
    if part == "adapter":
        _add_adapters(cut, section.adapter_reduction, seed)
    cut.fold()


def lora_config(cut: Cut, rank: int, alpha: int, **more: Any) -> Any:
    """Return peft's config of the LoRA matrices of a cut; ModelError without peft."""
    try:
        from peft import LoraConfig
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CHOSEN
    except ImportError:
        raise ModelError("model.trainable = 'lora' needs peft. Run: pip install 'fedbench[text]'") from None
    kind = getattr(getattr(cut.backbone, "config", None), "model_type", "embedded")
    targets: Sequence[str] = _LORA_TARGETS.get(kind) or CHOSEN[kind]
    fixed: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "fan_in_fan_out": kind == "gpt2"}
    return LoraConfig(target_modules=list(targets), **fixed, **more)


def _add_lora(cut: Cut, rank: int, alpha: int, seed: int) -> None:
    wanted = lora_config(cut, rank, alpha)
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(wanted, cut.backbone)
    with torch.no_grad():
        for name, parameter in cut.named_parameters():
            if "lora_A" in name:
                bound = 1.0 / math.sqrt(parameter.shape[1])
                draw = generator(seed, "lora", _number(name)).uniform(-bound, bound, tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(draw.astype(np.float32)))
            elif "lora_B" in name:
                parameter.zero_()


def _add_adapters(cut: Cut, reduction: int, seed: int) -> None:
    blocks = list(cut.blocks)
    holder = next(m for m in cut.backbone.modules() if isinstance(m, nn.ModuleList) and list(m) == blocks)
    inner = max(1, cut.width // reduction)
    for index, block in enumerate(blocks):
        with torch.random.fork_rng(devices=[]):
            adapter = Bottleneck(cut.width, inner)
        draw = generator(seed, "adapter", index).standard_normal(tuple(adapter.down.weight.shape))
        with torch.no_grad():
            adapter.down.weight.copy_(torch.from_numpy((_ADAPTER_SPREAD * draw).astype(np.float32)))
            for zero in (adapter.down.bias, adapter.up.weight, adapter.up.bias):
                zero.zero_()
        holder[index] = Adapted(block, adapter)
    cut.eval()


def _number(name: str) -> int:
    """Return a tensor's key as a signed 64-bit number."""
    return tensor_key(name) - (1 << 63)
