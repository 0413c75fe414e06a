"""Where a result comes from: code, packages, machine, time; no secrets and no environment beyond a short list."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("fedbench", "torch", "numpy", "numba", "mpi4py", "h5py", "lz4", "safetensors", "transformers", "datasets")
ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def collect(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return the provenance of this process as a tree that JSON can hold, with `extra` joined to it."""
    slurm = {k: v for k, v in os.environ.items() if k in {"SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"}}
    return {
        "commit": _commit(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "python": platform.python_version(),
        "system": platform.platform(),
        "host": platform.node(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "slurm": slurm,
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        **extra,
    }


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def cpu_model() -> str:
    """Return the processor's name, or an empty string."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = info.read_text(errors="replace").splitlines()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> dict[str, Any] | None:
    """Return the commit of the source tree and whether it was changed; None outside a checkout."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        head, dirty = (
            subprocess.run(["git", *words], check=False, cwd=folder, capture_output=True, text=True, timeout=10)
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return {"hash": head.stdout.strip(), "dirty": bool(dirty.stdout.strip())} if head.returncode == 0 else None
