"""Weights from a checkpoint folder into a model piece by piece, so that the whole is never in memory.

It reads the safetensors layout alone and says so where a checkpoint is of another kind or has other names.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fedbench.base.errors import ModelError
from fedbench.models.residency import Residency

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PIECE_BYTES = 8 << 20

#: What older checkpoints call the parameters of a norm.
_OLD_NAMES = {"gamma": "weight", "beta": "bias"}


class Stored(NamedTuple):
    """Where a tensor is: file, first byte, shape and dtype."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def index(folder: Path) -> dict[str, Stored]:
    """Return the tensors of a checkpoint folder by name; an empty index where it holds no safetensors file."""
    found: dict[str, Stored] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > file.stat().st_size:
                raise ModelError(f"{file}: not a safetensors file (its header would have {size} bytes).")
            header: dict[str, Any] = json.loads(stream.read(size))
        for name, entry in header.items():
            if name != "__metadata__" and entry["dtype"] in _DTYPES:
                start = 8 + size + int(entry["data_offsets"][0])
                found[name] = Stored(file, start, tuple(entry["shape"]), _DTYPES[entry["dtype"]])
    return found


def matched(stored: dict[str, Stored], model: nn.Module, prefix: str) -> dict[str, Stored] | None:
    """Return where each parameter of `model` is stored, by its name there; None where one has no match of its shape.

    Names may carry the architecture's prefix on one side alone, and norms their old names.
    """
    plain = {_plain(name, prefix): entry for name, entry in stored.items()}
    pairs = {name: plain.get(_plain(name, prefix)) for name, _ in model.named_parameters()}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    sound = {name: entry for name, entry in pairs.items() if entry is not None and entry.shape == shapes[name]}
    return sound if len(sound) == len(pairs) else None


def fill(model: nn.Module, stored: dict[str, Stored], residency: Residency) -> None:
    """Copy stored values into the parameters as float32, a few MiB at a time."""
    for name, parameter in model.named_parameters():
        entry = stored[name]
        flat = parameter.detach().view(-1)
        width = entry.dtype.itemsize
        step = _PIECE_BYTES // width
        with open(entry.file, "rb", buffering=0) as file:
            for first in range(0, flat.numel(), step):
                part = flat[first : first + step]
                raw = bytearray(part.numel() * width)
                if os.preadv(file.fileno(), [raw], entry.start + first * width) != len(raw):
                    raise ModelError(f"{entry.file}: the file ends within {name}.")
                part.copy_(torch.frombuffer(raw, dtype=entry.dtype))
                residency.release(np.asarray(part), written=True)


def _plain(name: str, prefix: str) -> str:
    words = name.removeprefix(f"{prefix}.").split(".")
    return ".".join([*words[:-1], _OLD_NAMES.get(words[-1], words[-1])])
