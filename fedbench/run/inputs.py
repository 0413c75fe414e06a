"""What a run starts from besides its config: names and hashes of its data, and of all weights before the first round.

A checkpoint goes on from the same alone, or the data in the provenance would not be those that the rounds were played on.
"""

from __future__ import annotations

import torch
import xxhash

from fedbench.run.build import Built
from fedbench.run.runner import weights_sha256


def inputs_of(built: Built) -> dict[str, str]:
    """Return the inputs of a run that has not played a round in this process, by name."""
    data = {f"data.{name}": value for name, value in built.splits.source.items()}
    return data | {"weights.trainable": weights_sha256(built.trainable), "weights.frozen": _frozen_hash(built)}


def _frozen_hash(built: Built) -> str:
    """Return the hash of the weights that are not trained, a mapped model's memory given back piece by piece."""
    residency = built.cut.residency
    trained = {id(parameter) for parameter in built.trainable.parameters}
    digest = xxhash.xxh3_128()  # at the speed of memory, since models may be large
    for name, parameter in sorted(built.cut.named_parameters()):
        if id(parameter) in trained:
            continue
        digest.update(name.encode())
        bits = parameter.detach().reshape(-1).view(torch.uint8)
        step = residency.piece * parameter.element_size() or max(1, len(bits))
        for first in range(0, len(bits), step):
            part = bits[first : first + step].cpu().numpy()
            digest.update(part.data)
            residency.release(part)
    return digest.hexdigest()
