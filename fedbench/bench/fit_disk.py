"""What `fedbench check` finds in the results folder: whole replacement with fsync, locks, room, the file server's clock.

It works in a folder of its own there and leaves nothing behind, not even the results folder where there was none.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fedbench.base import fsio
from fedbench.bench.fit import Row, judged
from fedbench.report.units import quantity

_TURNS = 12
_BYTES = 1 << 16
_SLOW_S = 0.5
_LEAST_BYTES, _ENOUGH_BYTES, _ENOUGH_FILES = 64 << 20, 1 << 30, 10_000
_SKEW_S = 2.0
_CHILD_S = 30.0

#: Taken, refused, or not known there: what another process says of a lock that this one holds.
_ASK = (
    "import fcntl, sys\n"
    "with open(sys.argv[1], 'a') as handle:\n"
    "    try:\n"
    "        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
    "    except BlockingIOError:\n"
    "        print('refused')\n"
    "    else:\n"
    "        print('taken')\n"
)


def rows(folder: Path) -> list[Row]:
    """Return what is found in a results folder; one failing row where nothing can be written there."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fedbench-check-", dir=folder) as name:
            place = Path(name)
            return [_replaced(place), _locked(place), _room(folder), _served(place)]
    except OSError as error:
        needed = "a folder where files can be written, replaced and synced"
        advice = "name another folder by --results (and results.dir of jobs), or ask for the right to write there"
        return [Row("results folder", f"{folder}: {error.strerror or error}", needed, "fail", advice)]
    finally:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def kind_of(folder: Path) -> str:
    """Return the type of the file system that holds a folder, or 'unknown'."""
    mounts = Path("/proc/self/mounts")
    here = folder.resolve()
    found = ("", "unknown")
    for line in mounts.read_text(errors="replace").splitlines() if mounts.exists() else ():
        _, where, kind, *_ = line.split(" ")
        point = Path(where.replace("\\040", " "))
        if (here == point or point in here.parents) and len(where) >= len(found[0]):
            found = (where, kind)
    return found[1]


def _replaced(place: Path) -> Row:
    """Replace a file a few times, synced, and read back what must stand there."""
    path, seconds = place / "replaced", []
    for turn in range(_TURNS):
        content = bytes([turn]) * _BYTES
        start = time.perf_counter()
        fsio.write_bytes(path, content)
        seconds.append(time.perf_counter() - start)
        if path.read_bytes() != content:
            told = "the old content stood there after a replacement"
            return Row("replace + fsync", told, "the new content, whole", "fail", "use another file system for results")
    left = sorted(other.name for other in place.iterdir() if other != path)
    middle = statistics.median(seconds)
    slow = "runs and checkpoints will wait for it; a file system of this host would be faster"
    return judged(
        "replace + fsync",
        f"{quantity(middle, 's')} for {_BYTES >> 10} KiB on {kind_of(place)}",
        f"whole files, at most {_SLOW_S:g} s each",
        fail=f"temporary files stay behind ({', '.join(left)}); use another file system" if left else "",
        warn=slow if middle > _SLOW_S else "",
    )


def _locked(place: Path) -> Row:
    """Hold a lock and let another process ask for it."""
    path, needed = place / "lock", "a second process is refused"
    advice = "start one `fedbench sweep submit` at a time per sweep by hand: locks don't tell of the other here"
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return Row("locks", f"not there: {error.strerror}", needed, "warn", advice)
        words = [sys.executable, "-c", _ASK, str(path)]
        asked = subprocess.run(words, capture_output=True, text=True, timeout=_CHILD_S, check=False)
    said = asked.stdout.strip() or f"the other process ended with {asked.returncode}"
    return judged("locks", f"a second process is {said}", needed, warn="" if said == "refused" else advice)


def _room(folder: Path) -> Row:
    """Return how much and how many files can still be written."""
    free = shutil.disk_usage(folder).free
    told = os.statvfs(folder)
    few = told.f_files > 0 and told.f_favail < _ENOUGH_FILES
    value = quantity(free, "B") + (f", {told.f_favail} files" if told.f_files else "")
    return judged(
        "free space",
        value,
        f"{quantity(_ENOUGH_BYTES, 'B')}, {_ENOUGH_FILES} files",
        fail="make room there, or name another folder by --results" if free < _LEAST_BYTES else "",
        warn="little room for a sweep: make some, or name another folder" if free < _ENOUGH_BYTES or few else "",
    )


def _served(place: Path) -> Row:
    """Compare the time stamp that a new file gets with this host's clock."""
    path = place / "stamp"
    before = time.time()
    path.write_bytes(b"x")
    stamp, after = path.stat().st_mtime, time.time()
    skew = max(before - stamp, stamp - after, 0.0)
    return judged(
        "file time stamps",
        f"{quantity(skew, 's')} off this host's clock",
        f"at most {_SKEW_S:g} s",
        warn="" if skew <= _SKEW_S else "the file server's clock is off; ages of files mean nothing there",
    )
