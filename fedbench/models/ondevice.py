"""A model on a GPU: its weights lie there, batches and guides are brought there, scalars and weights come back.

The model is loaded and its parts are added on the CPU before it moves, so that start weights have the same bits
everywhere. Ranks of a host share its GPUs in turn. Nothing here computes.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import numpy as np
import torch

from fedbench.base.errors import ConfigError
from fedbench.data.rows import Batch
from fedbench.models.cut import Cut
from fedbench.models.residency import Residency

#: Number of a process among those of its host, by the launcher's word.
_LOCAL_RANK = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PMI_LOCAL_RANK", "SLURM_LOCALID")


class OnDevice(Residency):
    """Weights in the memory of one device of torch."""

    kernels: Literal["cpu", "gpu"] = "gpu"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def move(self, cut: Cut) -> None:
        """Bring a whole cut here; parameters stay the same objects."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        cut.to(self.device)
        cut.residency = self

    def batch(self, batch: Batch) -> Batch:
        """Return a batch on the device."""
        return Batch(*(t.to(self.device) for t in (batch.ids, batch.mask, batch.labels, batch.lengths)))

    def view(self, values: torch.Tensor) -> Any:
        """Return the tensor itself."""
        return values

    def host(self, view: Any) -> np.ndarray[Any, Any]:
        """Return a copy in ordinary memory."""
        return view.detach().cpu().numpy()

    def take(self, array: np.ndarray[Any, Any]) -> Any:
        """Return a copy on the device."""
        return torch.tensor(array, device=self.device)

    def told(self) -> str:
        """Return the device and, where it has one, its name."""
        cuda = self.device.type == "cuda"
        return f"{self.device}, {torch.cuda.get_device_name(self.device)}" if cuda else str(self.device)


def cuda() -> OnDevice:
    """Return this rank's GPU, or raise ConfigError with the reason why there is none; no memory is taken yet."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = (
            f"torch {torch.__version__} finds no GPU that its CUDA {built} can use"
            if built
            else (f"torch {torch.__version__} is built without CUDA")
        )
        raise ConfigError(f"model.device = 'cuda': {why}; allowed here: 'cpu'.")
    local = next((int(os.environ[name]) for name in _LOCAL_RANK if os.environ.get(name, "").isdigit()), 0)
    return OnDevice(torch.device("cuda", local % torch.cuda.device_count()))
