"""Which runs of a sweep are done, asked often: `DIR/done.json` keeps what a full look at a run file found.

A file is looked at in full (`reader.inspect`) unless it is, by size, time and inode, the one that was found done before.
Submit looks at all of them in full, and collect checks every seal, so that a file that decays unseen is run again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from fedbench.base import fsio
from fedbench.base.errors import StorageError
from fedbench.batch.manifest import Sweep
from fedbench.results import reader

NAME = "done.json"


class DoneRuns:
    """The done runs of a sweep, and what is wrong with files that don't count."""

    def __init__(self, sweep: Sweep, *, fresh: bool = False) -> None:
        """Look at the run files; `fresh`: at all of them in full."""
        path = sweep.folder / NAME
        known = {} if fresh else _read(path)
        stamps = _stamps(sweep.folder / "runs")
        self.reasons: dict[str, str] = {}
        found: dict[str, list[int]] = {}
        for line in sweep.lines:
            stamp = stamps.get(f"{line.run_id}.h5")
            if stamp is None:
                continue
            if known.get(line.run_id) == stamp:
                found[line.run_id] = stamp
                continue
            verdict = reader.inspect(sweep.run_file(line), line.run_id)
            if verdict.done:
                found[line.run_id] = stamp
            else:
                self.reasons[line.run_id] = verdict.reason
        self.runs = found.keys()
        if found != known:
            _keep(path, found)


def _stamps(runs: Path) -> dict[str, list[int]]:
    """Return file name -> size, time of change and inode."""
    if not runs.is_dir():
        return {}
    with os.scandir(runs) as entries:
        told = {entry.name: entry.stat() for entry in entries if entry.name.endswith(".h5") and entry.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in told.items()}


def _keep(path: Path, found: dict[str, list[int]]) -> bool:
    """Return whether what was found could be kept; on a full or read-only disk it is found again next time."""
    try:
        fsio.write_text(path, json.dumps(found))
    except StorageError:
        return False
    return True


def _read(path: Path) -> dict[str, list[int]]:
    """Return what was found before; nothing where that can't be read, since it can be found again."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}
