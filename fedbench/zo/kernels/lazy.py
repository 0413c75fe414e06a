"""Compilation of the CPU kernels at their first use, and their cache: one folder per user, CPU, version and source.

A folder that can't be written or is damaged costs a compilation and nothing else. Nothing happens at import.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import types

_log = logging.getLogger(__name__)


def _cache_folder(kernel: Any, name: str) -> Path | None:
    """A folder of this user for one build of each kernel, or None where it can't be written.

    One build means that processes that fill it at the same time write the same entries, each file by a rename.
    """
    sources = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    target = kernel.targetctx.codegen().magic_tuple()
    build = hashlib.sha256(repr((numba.__version__, np.__version__, target)).encode() + sources).hexdigest()[:16]
    home = numba.config.CACHE_DIR or os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(home) / "fedbench" / f"kernels-{build}" / name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return None
    return folder


def _compile(function: Any, arguments: Any, gaussian: bool, cached: bool) -> Any:
    kernel = numba.njit(nogil=True, error_model="numpy")(function)
    folder = _cache_folder(kernel, "gaussian" if gaussian else "rademacher") if cached else None
    if folder is not None:
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
        try:
            kernel.enable_caching()
        finally:
            numba.config.CACHE_DIR = before
    kernel.compile((types.boolean if gaussian else types.none, *arguments))
    kernel.disable_compile()
    return functools.partial(kernel, True if gaussian else None)


Compiled = Callable[[bool], Any]
KERNELS: list[Compiled] = []


def lazy_kernel(*arguments: Any) -> Callable[[Any], Compiled]:
    """Make a function into one from `gaussian` to its kernel, compiled or read from the cache on the first call."""

    def wrap(function: Any) -> Compiled:
        """Return the function that compiles once for each distribution."""

        @functools.cache
        def compiled(gaussian: bool) -> Any:
            """Return the kernel for one distribution."""
            try:
                return _compile(function, arguments, gaussian, cached=True)
            except (OSError, EOFError, RuntimeError, ValueError, pickle.PickleError) as error:
                _log.warning("The kernel cache can't be used (%s: %s): compiling anew.", type(error).__name__, error)
                return _compile(function, arguments, gaussian, cached=False)

        KERNELS.append(compiled)
        return compiled

    return wrap
