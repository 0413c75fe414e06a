"""Benchmarks of messages: the same function on all ranks of a world, which is started here unless a launcher did.

Rank 0's numbers are the result; the others have none. Ranks never have more threads than there are cores for: a device
and its cloud are different machines, and would else wait for each other's.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from fedbench.base import account
from fedbench.base.errors import EXIT_OK, ConfigError, FedbenchError
from fedbench.bench.harness import Options
from fedbench.run import launch, supervise
from fedbench.zo.kernels import cpu


def measured(module: str, options: Options) -> dict[str, Any] | None:
    """Return what `measure(transport, options)` of a module of this package returns on rank 0; None on other ranks."""
    if options.ranks < 2:
        raise ConfigError(f"bench: found -n {options.ranks}; messages are measured between 2 ranks or more.")
    if launch.launched_size() is not None:
        return _on_this_rank(module, options)
    with tempfile.TemporaryDirectory(prefix="fedbench-bench-") as folder:
        asked, told = Path(folder, "options.json"), Path(folder, "result.json")
        asked.write_text(json.dumps(options.tree()), encoding="utf-8")
        code = supervise.on_ranks(__name__, [module, str(asked), str(told)], options.ranks, options.threads)
        if code != EXIT_OK or not told.exists():
            raise FedbenchError(f"bench: the ranks of {module} ended with status {code} and left no numbers.")
        found: dict[str, Any] = json.loads(told.read_text(encoding="utf-8"))
        return found


def main(module: str, asked: str, told: str) -> int:
    """Measure on a rank that `measured` started; rank 0 leaves the numbers in a file."""
    result = _on_this_rank(module, Options(**json.loads(Path(asked).read_text(encoding="utf-8"))))
    if result is not None:
        Path(told).write_text(json.dumps(result), encoding="utf-8")
    return EXIT_OK


def _on_this_rank(module: str, options: Options) -> dict[str, Any] | None:
    transport = launch.enter(options.ranks)
    threads = max(1, min(options.threads, (os.cpu_count() or 1) // options.ranks))
    account.use_threads(threads)
    cpu.set_threads(threads)
    found: list[dict[str, Any]] = []

    def body() -> int:
        result = importlib.import_module(f"fedbench.bench.{module}").measure(transport, options)
        found.append({**result, "threads": threads, "cores": os.cpu_count()})
        return EXIT_OK

    code = launch.guard(transport, body, lambda: f"bench {module}")
    if code != EXIT_OK:
        raise SystemExit(code)
    return found[0] if transport.rank == 0 else None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
