"""Checkpoints: two generations of weights (safetensors) and everything else (JSON), the newest named in LATEST.

Rank 0 writes and reads them. A generation is named only after it is safely on disk, a damaged one falls back to the
other with a warning, and one of another job is refused. What was last written or read whole is never written over.
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
_FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """State at a round boundary: `arrays` by name, `state` as a tree that JSON can hold."""

    arrays: Mapping[str, np.ndarray]
    state: Mapping[str, Any]


class Store:
    """The checkpoint folder of one run."""

    def __init__(self, folder: Path, config_sha256: str, warn: Callable[[str], None]) -> None:
        self._folder = folder
        self._config = config_sha256
        self._warn = warn
        self._sound: str | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the older generation, or a damaged one, anew and name it."""
        name = _GENERATIONS[1] if (self._sound or self._latest()) == _GENERATIONS[0] else _GENERATIONS[0]
        self._sweep_up()
        blob = save({key: np.ascontiguousarray(array) for key, array in checkpoint.arrays.items()})
        head = {
            "format": _FORMAT,
            "config_sha256": self._config,
            "arrays_sha256": hashlib.sha256(blob).hexdigest(),
            "state": checkpoint.state,
        }
        fsio.write_bytes(self._folder / f"{name}.safetensors", blob)
        fsio.write_text(self._folder / f"{name}.json", json.dumps({"head_sha256": _digest(head), "head": head}))
        fsio.write_text(self._folder / "LATEST", name)
        self._sound = name

    def newest(self) -> Checkpoint | None:
        """Return the newest sound generation, or None where there is none; another job's is a ResultError."""
        latest = self._latest()
        for name in sorted(_GENERATIONS, key=lambda generation: generation != latest):
            if not (self._folder / f"{name}.json").exists():
                continue
            try:
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
        self._sweep_up()
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _sweep_up(self) -> None:
        """Remove the halves that a killed writer left."""
        for name in _FILES:
            for path in fsio.leftovers(self._folder / name):
                path.unlink(missing_ok=True)

    def _latest(self) -> str | None:
        path = self._folder / "LATEST"
        return path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else None

    def _read(self, name: str) -> Checkpoint:
        file = json.loads((self._folder / f"{name}.json").read_text(encoding="utf-8"))
        if not isinstance(file, dict) or file["head_sha256"] != _digest(file["head"]):
            raise ValueError("its head doesn't match its hash")
        head = file["head"]
        if head["format"] != _FORMAT:
            raise ResultError(f"{self._folder}: checkpoint format {head['format']}; this version reads {_FORMAT}.")
        if head["config_sha256"] != self._config:
            raise ResultError(f"{self._folder}: the checkpoint belongs to another job (its config hash differs).")
        blob = (self._folder / f"{name}.safetensors").read_bytes()
        if hashlib.sha256(blob).hexdigest() != head["arrays_sha256"]:
            raise ValueError("arrays don't match their hash")
        return Checkpoint(load(blob), head["state"])


def _digest(head: Any) -> str:
    return hashlib.sha256(json.dumps(head).encode()).hexdigest()
