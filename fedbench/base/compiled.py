"""Compilation of numba kernels at their first use, and their cache: one folder per user, CPU, version and source.

A folder that can't be written or is damaged costs a compilation and nothing else. Nothing happens at import.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numba
import numpy as np

_log = logging.getLogger(__name__)


def kernel(function: Any, arguments: tuple[Any, ...], name: str) -> Any:
    """Return a function compiled for one signature (numba types), read from the cache entry `name` where that is sound."""
    try:
        return _compile(function, arguments, name)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.PickleError) as error:
        _log.warning("The kernel cache can't be used (%s: %s): compiling anew.", type(error).__name__, error)
        return _compile(function, arguments, None)


def _compile(function: Any, arguments: tuple[Any, ...], name: str | None) -> Any:
    made = numba.njit(nogil=True, error_model="numpy")(function)
    folder = _cache_folder(made, name) if name is not None else None
    if folder is not None:
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
        try:
            made.enable_caching()
        finally:
            numba.config.CACHE_DIR = before
    made.compile(arguments)
    made.disable_compile()
    return made


def _cache_folder(made: Any, name: str) -> Path | None:
    """A folder of this user for one build of each kernel, or None where it can't be written.

    One build means that processes that fill it at the same time write the same entries, each file by a rename.
    """
    beside = Path(made.py_func.__code__.co_filename).parent
    sources = b"".join(file.read_bytes() for file in sorted(beside.glob("*.py")))
    target = made.targetctx.codegen().magic_tuple()
    build = hashlib.sha256(repr((numba.__version__, np.__version__, target)).encode() + sources).hexdigest()[:16]
    home = numba.config.CACHE_DIR or os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(home) / "fedbench" / f"kernels-{build}" / name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return None
    return folder
