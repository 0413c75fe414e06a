"""Checkpoints: two generations of weights (safetensors) and everything else (JSON), the newest named in LATEST.

Rank 0 writes and reads them. A generation is named only after it is safely on disk, a damaged one falls back to the
other with a warning, and one of another job, of other data or other weights is refused. What was last written or read
whole is never written over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedbench.base import fsio
from fedbench.base.errors import ResultError

_GENERATIONS = ("a", "b")
_FILES = ("LATEST", *(f"{name}.{ending}" for name in _GENERATIONS for ending in ("safetensors", "json")))
_FORMAT = 3


@dataclass(frozen=True)
class Checkpoint:
    """State at a round boundary: `arrays` by name, `state` as a tree that JSON can hold, and `where` it was read."""

    arrays: Mapping[str, np.ndarray]
    state: Mapping[str, Any]
    where: str = ""


class Store:
    """The checkpoint folder of one run.

    `inputs` are names and hashes of what the run started from, which a checkpoint goes on from alone.
    """

    def __init__(self, folder: Path, config_sha256: str, warn: Callable[[str], None]) -> None:
        self._folder = folder
        self._config = config_sha256
        self._warn = warn
        self._sound: str | None = None
        self.inputs: Mapping[str, str] = {}

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the older generation, or a damaged one, anew and name it."""
        name = _GENERATIONS[1] if (self._sound or self._latest()) == _GENERATIONS[0] else _GENERATIONS[0]
        blob = save({key: np.ascontiguousarray(array) for key, array in checkpoint.arrays.items()})
        head = {
            "format": _FORMAT,
            "config_sha256": self._config,
            "inputs": dict(self.inputs),
            "arrays_sha256": hashlib.sha256(blob).hexdigest(),
            "state": checkpoint.state,
        }
        fsio.write_bytes(self._folder / f"{name}.safetensors", blob)
        fsio.write_text(self._folder / f"{name}.json", json.dumps({"head_sha256": _digest(head), "head": head}))
        fsio.write_text(self._folder / "LATEST", name)
        self._sound = name

    def newest(self) -> Checkpoint | None:
        """Return the newest sound generation, or None where there is none; one of something else is a ResultError."""
        latest = self._latest()
        for name in sorted(_GENERATIONS, key=lambda generation: generation != latest):
            try:
                if name != latest and not any(
                    (self._folder / f).exists() for f in (f"{name}.json", f"{name}.safetensors")
                ):
                    continue
                found = self._read(name)
                self._sound = name
                return found
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                self._warn(f"{self._folder}: checkpoint {name} is damaged ({error}); falling back to the other one.")
        return None

    def clear(self) -> None:
        """Remove the checkpoints of a run that is done."""
        for name in _FILES:
            (self._folder / name).unlink(missing_ok=True)
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def sweep_up(self) -> None:
        """Remove the halves that a killed writer left; the caller knows that none is alive."""
        for name in _FILES:
            fsio.sweep_up(self._folder / name)

    def _latest(self) -> str | None:
        """Return the generation that LATEST names; None, with a warning where it is there, if it can't be told."""
        try:
            name = (self._folder / "LATEST").read_text(encoding="utf-8", errors="replace").strip()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(
                f"{self._folder}: LATEST can't be read ({error.strerror or error}); looking at both checkpoints."
            )
            return None
        return name if name in _GENERATIONS else None

    def _read(self, name: str) -> Checkpoint:
        file = json.loads((self._folder / f"{name}.json").read_text(encoding="utf-8"))
        if not isinstance(file, dict) or file["head_sha256"] != _digest(file["head"]):
            raise ValueError("its head doesn't match its hash")
        head = file["head"]
        if head["format"] != _FORMAT:
            raise ResultError(f"{self._folder}: checkpoint format {head['format']}; this version reads {_FORMAT}.")
        if head["config_sha256"] != self._config:
            raise ResultError(f"{self._folder}: the checkpoint belongs to another job (its config hash differs).")
        self._compare(head["inputs"])
        blob = (self._folder / f"{name}.safetensors").read_bytes()
        if hashlib.sha256(blob).hexdigest() != head["arrays_sha256"]:
            raise ValueError("arrays don't match their hash")
        return Checkpoint(load(blob), head["state"], str(self._folder))

    def _compare(self, inputs: Mapping[str, str]) -> None:
        """Raise ResultError unless a checkpoint was made from the inputs of this run."""
        other = [name for name in sorted({*inputs, *self.inputs}) if inputs.get(name) != self.inputs.get(name)]
        if other:
            told = "; ".join(
                f"{name}: found {self.inputs.get(name)}, in the checkpoint {inputs.get(name)}" for name in other
            )
            raise ResultError(
                f"{self._folder}: the checkpoint was made from other data or weights ({told}). Bring those back, or "
                "remove the folder to start anew."
            )


def _digest(head: Any) -> str:
    return hashlib.sha256(json.dumps(head).encode()).hexdigest()
