"""How the embedded model's weights were made, and the figures that are stated for them.

`python -m fedbench.models.embedded.recipe --out FILE` makes the weights anew, with `--measure` it prints
the figures of docs/embedded.md for the shipped ones. No run imports this module.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fedbench.base import fsio, rng
from fedbench.data import embedded
from fedbench.models.embedded import network

STEPS = 800
BATCH = 64
WARMUP = 40
PEAK_LR = 3e-3
BETAS = (0.9, 0.98)
#: Share of texts whose label word is drawn at random: it keeps the zero-shot accuracy mediocre.
RANDOM_LABELS = 0.5


def initial_weights() -> dict[str, Tensor]:
    """Return the weights before the first step: normal(0, .02), scaled down by depth where a branch ends; norms 1, biases 0."""
    weights = {}
    for name, shape in network.shapes().items():
        if name.endswith("norm.weight"):
            weights[name] = torch.ones(shape)
        elif name.endswith("bias"):
            weights[name] = torch.zeros(shape)
        else:
            ends_branch = name.endswith(("attention.output.weight", "ffn_out.weight"))
            scale = 0.02 / math.sqrt(2 * network.LAYERS) if ends_branch else 0.02
            drawn = rng.generator(embedded.DATA_SEED, f"embedded.init.{name}").standard_normal(shape)
            weights[name] = torch.from_numpy(drawn.astype(np.float32)) * scale
    return weights


def pretraining_batch(step: int) -> tuple[Tensor, Tensor]:
    """Return texts int64 [BATCH, LENGTH] of pretraining step `step`, and the label word to continue each with, int64 [BATCH]."""
    stream = rng.generator(embedded.DATA_SEED, "embedded.pretrain", step)
    topics = stream.integers(0, embedded.TOPICS, BATCH)
    ids = embedded.write_texts(stream, topics)
    guesses = stream.integers(0, embedded.TOPICS, BATCH)
    named = np.where(stream.random(BATCH) < RANDOM_LABELS, guesses, topics)
    return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(embedded.LABEL_WORDS + named)


def pretrain(model: network.TinyCausal, steps: int = STEPS) -> Iterator[float]:
    """Yield the loss (nat, next-token mean plus label word) of each of the first `steps` steps, training `model` in place."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=BETAS, weight_decay=0.01)
    for step in range(steps):
        rise, fall = (step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * step / STEPS))
        for group in optimiser.param_groups:
            group["lr"] = PEAK_LR * min(rise, fall)
        ids, label_words = pretraining_batch(step)
        logits = model(ids, torch.ones_like(ids, dtype=torch.bool))
        text = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        label = F.cross_entropy(logits[:, -1], label_words)
        loss = text + label
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        yield float(loss.detach())


def write(path: Path) -> None:
    """Pretrain from the start and write the weights to `path` as float16."""
    model = network.with_weights(initial_weights(), "recipe")
    for step, loss in enumerate(pretrain(model)):
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step:4d} loss {loss:.3f}", file=sys.stderr)
    weights = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    fsio.replace_whole(path, lambda temporary: save_file(weights, temporary))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0."""
    parser = argparse.ArgumentParser(prog="python -m fedbench.models.embedded.recipe", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write new weights to FILE (about two minutes)")
    parser.add_argument("--measure", action="store_true", help="print the shipped weights' figures (some minutes)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.out is not None:
        write(given.out)
        print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
