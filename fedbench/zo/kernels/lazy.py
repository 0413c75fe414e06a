"""The CPU kernels of one distribution at a time, compiled or read from the cache at their first use.

Nothing happens at import, and nothing here knows what a kernel computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from numba import types

from fedbench.base import compiled as cache

Compiled = Callable[[bool], Any]
KERNELS: list[Compiled] = []


def lazy_kernel(*arguments: Any) -> Callable[[Any], Compiled]:
    """Make a function into one from `gaussian` to its kernel, compiled or read from the cache on the first call."""

    def wrap(function: Any) -> Compiled:
        """Return the function that compiles once for each distribution."""

        @functools.cache
        def compiled(gaussian: bool) -> Any:
            """Return the kernel for one distribution."""
            kind = types.boolean if gaussian else types.none
            made = cache.kernel(function, (kind, *arguments), "gaussian" if gaussian else "rademacher")
            return functools.partial(made, True if gaussian else None)

        KERNELS.append(compiled)
        return compiled

    return wrap
