"""The tuned weights that a run keeps: `RESULTS/weights/RUN_ID.safetensors`, beside the folder of its run file.

They are written before the run file, so that a run that is complete has them. Their hash is `weights_sha256` of the run,
and nothing that does not have it is ever returned.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedbench.base import fsio
from fedbench.base.errors import ResultError
from fedbench.base.records import Run
from fedbench.models.trainable import Trainable
from fedbench.run.runner import arrays_sha256


def path_of(run_file: Path) -> Path:
    """Return where the weights of a run file lie."""
    return run_file.parent.parent / "weights" / f"{run_file.stem}.safetensors"


def write(run_file: Path, trainable: Trainable) -> None:
    """Keep the trainable tensors, float32 in their shapes."""
    arrays = {t.name: np.ascontiguousarray(t.values()).reshape(tuple(t.parameter.shape)) for t in trainable}
    fsio.write_bytes(path_of(run_file), save(arrays))


def read(run_file: Path, run: Run) -> dict[str, np.ndarray]:
    """Return the weights of a run by name; ResultError where it kept none, or they are not those that it ended with."""
    path = path_of(run_file)
    if not run.config["results"].get("save_weights"):
        raise ResultError(
            f"{run_file}: the run kept no weights. Make it again with --set results.save_weights=true --force."
        )
    try:
        arrays = load(path.read_bytes())
    except FileNotFoundError:
        raise ResultError(f"{path}: no such file; the weights of a run lie there, beside its folder runs/.") from None
    except (OSError, SafetensorError) as error:
        raise ResultError(f"{path}: can't be read: {error}.") from None
    found = arrays_sha256(arrays)
    if found != run.summary.weights_sha256:
        raise ResultError(
            f"{path}: holds other weights ({found[:16]}...) than the run ended with ({run.summary.weights_sha256[:16]}...)."
        )
    return arrays
