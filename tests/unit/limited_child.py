"""A step of a model in a process of its own: under a limit on private memory, or held open until it is killed.

`limited_child.py resident|mapped|wait FOLDER [SHAPE]`. The limit is on the data segment (RLIMIT_DATA): private
memory counts, shared mappings of files do not. It leaves room for half of the model's weights.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import torch

from fedbench.base import account
from fedbench.bench.memory_child import _batch, _imports, _zeroth
from fedbench.models import load
from fedbench.models.mapped import Mapped
from fedbench.models.residency import RESIDENT, Residency
from fedbench.models.shapes import SHAPES

#: A quick model that is mostly weights: 6 layers of 28 MB.
TINY = dict(SHAPES["opt-125m"], vocab_size=2048, num_hidden_layers=6, max_position_embeddings=64)
ROOM = {"opt-limited": 70 << 20, "opt-125m": 250 << 20}


def data_bytes() -> int:
    """Return the private memory that the limit counts (VmData)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmData:")).split()[1]) * 1024


def main(how: str, folder: str, model: str = "opt-limited") -> int:
    """Return 0, or 2 where the memory is not enough."""
    account.use_threads(1)
    account.bound_heap()
    SHAPES["opt-limited"] = TINY
    _imports(model, zeroth=True)
    torch.ones(64, 64).mm(torch.ones(64, 64))
    if how != "wait":
        limit = data_bytes() + ROOM[model]
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    residency: Residency = RESIDENT if how == "resident" else Mapped(Path(folder))
    try:
        cut = load.of_shape(model, (5, 9), 0, residency)
        if how == "wait":
            print("ready", flush=True)
            time.sleep(60)
        batch = _batch({"batch": 2, "length": 16}, 2000)
        loss = _zeroth({"trainable": "full", "threads": 1, "micro_batch": 0}, cut, batch)(0)
    except (MemoryError, RuntimeError) as error:
        print(f"not enough memory: {error}", file=sys.stderr)
        return 2
    print(f"loss {loss:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
