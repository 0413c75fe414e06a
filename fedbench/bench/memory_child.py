"""One arm of `bench memory` in a process of its own: what it held at most from its start to its end.

It imports what its arm needs and nothing else, and prints one JSON object. `python -m fedbench.bench.memory_child`
takes one JSON object: arm, model, batch, length, trainable, threads, micro_batch, heap, folder.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fedbench.base import account
from fedbench.base.rng import generator
from fedbench.data.rows import Batch
from fedbench.models import load
from fedbench.models.cut import Cut
from fedbench.models.residency import RESIDENT, Residency

#: Steps of an arm: in the second one every buffer and optimiser state is there.
STEPS = 2
_WORDS = (5, 9)
_EPSILON = 1e-3
_LR = 1e-6

Step = Callable[[int], float]


def main(text: str) -> None:
    """Run the arm that `text` describes and print its figures."""
    job = json.loads(text)
    account.use_threads(job["threads"])
    if job["heap"] == "bounded":
        account.bound_heap()
    elif job["heap"] == "kept":
        account.keep_heap()
    zeroth = job["arm"].startswith("zo")
    _imports(job["model"], zeroth=zeroth)
    runtime = account.resident_bytes()
    residency: Residency = RESIDENT
    if job["arm"] == "zo_mapped":
        from fedbench.models.mapped import Mapped

        residency = Mapped(Path(job["folder"]))
    cut = load.of_shape(job["model"], _WORDS, 0, residency)
    weights = sum(p.nbytes for p in cut.parameters())
    batch = _batch(job, int(cut.backbone.config.vocab_size))
    step = (_zeroth if zeroth else _inference if job["arm"] == "inference" else _backprop)(job, cut, batch)
    if job["heap"] == "bounded":
        account.give_back_free_memory()
        account.give_back_code()
    loaded, load_peak = account.resident_bytes(), account.peak_bytes()
    apart = account.reset_peak()
    seconds = []
    for number in range(STEPS):
        start = time.perf_counter()
        loss = step(number)
        seconds.append(time.perf_counter() - start)
    step_peak = account.peak_bytes()
    print(
        json.dumps(
            {
                "peak_bytes": max(load_peak, step_peak),
                "runtime_bytes": runtime,
                "loaded_bytes": loaded,
                "load_peak_bytes": load_peak,
                "step_peak_bytes": step_peak if apart else None,
                "weights_bytes": residency.bytes_held() or weights,
                "activations_bytes": step_peak - loaded if apart else None,
                "step_s": min(seconds),
                "loss": loss,
            }
        )
    )


def _imports(model: str, *, zeroth: bool) -> None:
    """Import what the arm needs, so that the runtime is known before any weight is there."""
    origin = load.origin_of("shape:" + model)
    import transformers

    assert transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(origin.config)] is not None
    if zeroth:
        from fedbench.zo import stream, update
        from fedbench.zo.kernels import cpu

        assert stream is not None
        assert update is not None
        cpu.prepare(False)


def _batch(job: Mapping[str, Any], vocabulary: int) -> Batch:
    draw = generator(0, "bench batch")
    rows, length = job["batch"], job["length"]
    ids = torch.from_numpy(draw.integers(3, vocabulary, (rows, length)))
    labels = torch.from_numpy(draw.integers(0, len(_WORDS), rows))
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), labels, torch.full((rows,), length))


def _inference(job: Mapping[str, Any], cut: Cut, batch: Batch) -> Step:
    def step(number: int) -> float:
        with torch.inference_mode():
            return float(F.cross_entropy(cut(batch).double(), batch.labels))

    return step


def _zeroth(job: Mapping[str, Any], cut: Cut, batch: Batch) -> Step:
    import numpy as np

    from fedbench.models.trainable import select
    from fedbench.zo.direction import Direction, Terms, as_keys, direction_key
    from fedbench.zo.kernels import cpu
    from fedbench.zo.stream import Stream
    from fedbench.zo.update import subtract

    cpu.set_threads(job["threads"])
    trainable = select(cut, job["trainable"])
    stream = Stream(cut, trainable, account.Meter(), gaussian=False, micro_batch=job["micro_batch"])

    def step(number: int) -> float:
        """Take a zeroth-order step; return its mean loss."""
        keys = as_keys([direction_key(0, number, 0, 0, 0)])
        plus, minus = stream.losses(batch, Direction(keys[0]), _EPSILON)
        coef = np.array([_LR * (plus - minus) / (2 * _EPSILON)], np.float32)
        subtract(trainable, Terms(keys, coef), gaussian=False)
        return (plus + minus) / 2

    return step


def _backprop(job: Mapping[str, Any], cut: Cut, batch: Batch) -> Step:
    from fedbench.models.trainable import select

    parameters = select(cut, job["trainable"]).parameters
    optimiser: torch.optim.Optimizer = (
        torch.optim.SGD(parameters, _LR) if job["arm"] == "sgd" else torch.optim.AdamW(parameters, _LR)
    )
    if job["arm"] == "adamw_checkpointing":
        for block in (*cut.blocks, *(() if cut.last is None else (cut.last,))):
            setattr(block, "forward", _recomputed(block.forward))  # noqa: B010  (an instance takes another forward)

    def step(number: int) -> float:
        """Take a step by backpropagation; return its loss."""
        optimiser.zero_grad()
        loss = F.cross_entropy(cut(batch), batch.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        return float(loss.detach())

    return step


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    from torch.utils.checkpoint import checkpoint

    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


if __name__ == "__main__":
    main(sys.argv[1])
