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
from safetensors.torch import save
from torch import Tensor

from fedbench.base import fsio, rng
from fedbench.data import embedded
from fedbench.data.rows import Rows, Splits
from fedbench.models.embedded import network

STEPS = 800
BATCH = 64
WARMUP = 40
PEAK_LR = 2e-3
BETAS = (0.9, 0.999)
#: Share of texts whose label word is drawn at random: it keeps the zero-shot accuracy mediocre.
RANDOM_LABELS = 0.55

#: What `--measure` tries: (optimiser, lr) on the private rows and lr of SGD on the public rows.
PRIVATE_TRIALS = (("SGD", 0.05), ("SGD", 0.1), ("AdamW", 5e-4))
PRIVATE_MARKS = (20, 50, 100, 200, 300)
PUBLIC_LRS = (0.01, 0.03, 0.1)
PUBLIC_MARKS = (5, 10, 20, 40, 100)
PUBLIC_SETS: tuple[embedded.Public, ...] = ("embedded", "embedded:poor")
PUBLIC_SIZES = (8, 16, 32)
MEASURE_BATCH = 128


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
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        yield float(loss.detach())


def class_logits(model: network.TinyCausal, ids: Tensor) -> Tensor:
    """Return the verbaliser's logits, float32 [b, CLASSES], after the last position of texts `ids` int64 [b, LENGTH]."""
    h = model.embed(ids, torch.ones_like(ids, dtype=torch.bool))
    for block in model.blocks:
        h = block(h, torch.ones_like(ids, dtype=torch.bool))
    return model.lm_head(model.final_norm(h[:, -1]))[:, list(embedded.verbaliser())]


@torch.no_grad()
def accuracy(model: network.TinyCausal, rows: Rows) -> float:
    """Return the share of `rows` that the verbaliser classifies rightly, 0..1."""
    batch = rows.batch(np.arange(len(rows)))
    return float((class_logits(model, batch.ids).argmax(1) == batch.labels).float().mean())


def fine_tune(rows: Rows, optimiser: str, lr: float, seed: int, steps: int) -> Iterator[network.TinyCausal]:
    """Yield the shipped model after each step of backpropagation on batches of MEASURE_BATCH of `rows`, or all of them."""
    model = network.load_pretrained()
    kind = torch.optim.SGD if optimiser == "SGD" else torch.optim.AdamW
    optimise = kind(model.parameters(), lr=lr, weight_decay=0.0)
    for step in range(steps):
        stream = rng.generator(seed, "embedded.measure", step)
        batch = rows.batch(stream.choice(len(rows), min(MEASURE_BATCH, len(rows)), replace=False))
        optimise.zero_grad()
        torch.autograd.backward(F.cross_entropy(class_logits(model, batch.ids), batch.labels))
        optimise.step()
        yield model


def measure(seed: int) -> Iterator[str]:
    """Yield the figures of the shipped weights as lines of Markdown tables; accuracies are on dev, the last one on test."""
    splits = embedded.load("embedded", 1, seed)
    model = network.load_pretrained()
    yield f"zero-shot: dev {accuracy(model, splits.dev):.3f}, test {accuracy(model, splits.test):.3f}"
    for optimiser, lr in PRIVATE_TRIALS:
        yield _row(f"private, {optimiser}, lr {lr}", splits, splits.train, optimiser, lr, seed, PRIVATE_MARKS)
    for name in PUBLIC_SETS:
        for size in PUBLIC_SIZES:
            splits = embedded.load(name, size, seed)
            for lr in PUBLIC_LRS:
                title = f"{name}, {size} a class, lr {lr}"
                yield _row(title, splits, splits.public, "SGD", lr, seed, PUBLIC_MARKS)


def _row(title: str, splits: Splits, rows: Rows, optimiser: str, lr: float, seed: int, marks: tuple[int, ...]) -> str:
    found = []
    for step, model in enumerate(fine_tune(rows, optimiser, lr, seed, marks[-1]), start=1):
        if step in marks:
            found.append(accuracy(model, splits.dev))
    found.append(accuracy(model, splits.test))
    return f"| {title} | " + " | ".join(f"{value:.3f}" for value in found) + " |"


def write(path: Path) -> None:
    """Pretrain from the start and write the weights to `path` as float16."""
    model = network.with_weights(initial_weights(), "recipe")
    for step, loss in enumerate(pretrain(model)):
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step:4d} loss {loss:.3f}", file=sys.stderr)
    weights = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    content = save(weights)

    def fill(temporary: Path) -> None:
        temporary.write_bytes(content)

    fsio.replace_whole(path, fill)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0."""
    parser = argparse.ArgumentParser(prog="python -m fedbench.models.embedded.recipe", description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, metavar="FILE", help="write new weights to FILE (about two minutes)")
    action.add_argument("--measure", action="store_true", help="print the shipped weights' figures (some ten minutes)")
    parser.add_argument("--seed", type=int, default=0, help="with --measure: choice of public rows and batches")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.measure:
        for line in measure(given.seed):
            print(line, flush=True)
    else:
        write(given.out)
        print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
