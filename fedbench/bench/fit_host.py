"""What `fedbench check` finds on this host: clocks, cores, memory, GPUs, packages. Nothing is changed."""

from __future__ import annotations

import ctypes
import os
import shutil
import time
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from fedbench.bench.fit import Row, judged
from fedbench.data import load
from fedbench.report.units import quantity

_FINE_S = 1e-6
_DRIFT = 0.01
_WATCH_S = 0.2

#: What `adjtimex` returns where the kernel's clock is not synchronised.
_TIME_ERROR = 5
_TIMEX_BYTES = 512

#: Memory that a rank takes with its imports alone, and room for shared-memory messages.
_RANK_BYTES, _SHARED_BYTES = 400 << 20, 64 << 20

_CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
_SHOWN = 4


def rows(ranks: int, threads: int) -> list[Row]:
    """Return what is found on this host for so many ranks with so many threads on it."""
    here = [_clock(), _synchronised(), _cores(ranks, threads), _memory(ranks), _shared(), _gpus(ranks), _versions()]
    return [*here, _data()]


def _data() -> Row:
    """Look at the folder of named data sets, where one is named."""
    named, root = bool(os.environ.get(load.DATA_VARIABLE)), load.data_root()
    return judged(
        "data sets",
        f"{load.DATA_VARIABLE} = {root}{'' if root.is_dir() else ', which is no folder'}"
        if named
        else "no folder named",
        f"a folder, where {load.DATA_VARIABLE} names one",
        warn=f"data sets of a name are not found: set {load.DATA_VARIABLE} to their folder"
        if named and not root.is_dir()
        else "",
    )


def _clock() -> Row:
    """Look at the clock that measures: its resolution, that it never goes back, and its pace beside the day's clock."""
    told = time.get_clock_info("perf_counter")
    start, day = time.perf_counter(), time.time()
    last, steps = start, []
    while last - start < _WATCH_S:
        now = time.perf_counter()
        steps.append(now - last)
        last = now
    drift = abs((time.time() - day) / (last - start) - 1)
    finest = min((step for step in steps if step > 0), default=0.0)
    backwards = not told.monotonic or min(steps) < 0
    coarse = max(finest, told.resolution) > _FINE_S
    return judged(
        "clock",
        f"{told.implementation.partition('(')[2].rstrip(')') or told.implementation}, steps of {quantity(finest, 's')}, "
        f"{100 * drift:.2g} % beside the day's clock",
        f"monotonic, at most {quantity(_FINE_S, 's')}",
        fail="times measured here mean nothing: the clock goes back; choose another clock source" if backwards else "",
        warn="short spans are not resolved: choose another clock source"
        if coarse
        else "the two clocks differ in pace: one is being stepped"
        if drift > _DRIFT
        else "",
    )


def _synchronised() -> Row:
    """Ask the kernel whether the day's clock follows a time server."""
    state = synchronised()
    words = {True: "synchronised", False: "not synchronised", None: "not known"}
    advice = "start a time service (chrony, systemd-timesyncd): start and end of runs are told by this clock"
    return judged("time of day", words[state], "synchronised (NTP)", warn="" if state else advice)


def synchronised() -> bool | None:
    """Return whether the kernel says that its clock is synchronised; None where it can't be asked."""
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    except (AttributeError, OSError):
        return None
    return None if state < 0 else state != _TIME_ERROR


def _cores(ranks: int, threads: int) -> Row:
    """Compare the cores that this process may use with what ranks and threads ask for."""
    allowed, wanted = len(os.sched_getaffinity(0)), ranks * threads
    advice = f"times of runs with {ranks} ranks on one host mean little: use fewer ranks or more cores"
    return judged(
        "cores",
        f"{allowed} of {os.cpu_count()} may be used",
        f"{wanted} ({ranks} rank(s), {threads} thread(s) each, on one host)",
        warn=advice if allowed < wanted else "",
    )


def _memory(ranks: int) -> Row:
    free, needed = available_bytes(), ranks * _RANK_BYTES
    return judged(
        "memory",
        "not known" if free is None else f"{quantity(free, 'B')} free",
        f"{quantity(needed, 'B')} for {ranks} rank(s), without the model",
        warn="use fewer ranks on this host, or model.mapped = true" if free is not None and free < needed else "",
    )


def available_bytes() -> int | None:
    """Return the memory that a new process could have, or None where the system does not tell."""
    path = Path("/proc/meminfo")
    lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _shared() -> Row:
    """Look at the room for messages between the ranks of a host."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Row("shared memory", "no /dev/shm", "", "ok")
    free = shutil.disk_usage(folder).free
    advice = "remove what killed jobs left in /dev/shm, or give the container more of it"
    return judged(
        "shared memory",
        f"{quantity(free, 'B')} free",
        quantity(_SHARED_BYTES, "B"),
        warn=advice if free < _SHARED_BYTES else "",
    )


def _gpus(ranks: int) -> Row:
    """Compare the GPUs that torch sees with those of the host."""
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen:
        name = torch.cuda.get_device_name(0)
        shared = max(1, ranks - 1)
        value = f"{seen} x {name}, {shared / seen:.3g} rank(s) with devices for each"
        return Row("GPU", value, "none; for model.device = 'cuda' one at least")
    idle = sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))
    advice = "this torch can't use them: install its CUDA build (docs/gpu.md), or leave model.device = 'cpu'"
    value = f"none for torch, {len(idle)} on the host" if idle else "none"
    return judged("GPU", value, "none; for model.device = 'cuda' one at least", warn=advice if idle else "")


def _versions() -> Row:
    """Compare installed packages with what fedbench asks for, and with the versions that its tests ran with."""
    wrong, odd = unmet(), unlike(_CONSTRAINTS)
    value = ", ".join(wrong[:_SHOWN] or odd[:_SHOWN]) or f"fedbench {metadata.version('fedbench')} with all it asks for"
    return judged(
        "versions",
        value,
        "those of the package; best those of constraints.txt",
        fail="install fedbench again: pip install fedbench" if wrong else "",
        warn=f"{len(odd)} package(s) differ from constraints.txt: bits may, too" if odd else "",
    )


def unmet() -> list[str]:
    """Return the packages that fedbench asks for and that are absent or too old, in words."""
    found = []
    for text in metadata.requires("fedbench") or ():
        wanted = Requirement(text)
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            version = _version(wanted.name)
            if version is None or not wanted.specifier.contains(version, prereleases=True):
                found.append(f"{wanted.name} {version or 'absent'} (needs {wanted.specifier})")
    return found


def unlike(constraints: Path) -> list[str]:
    """Return the installed packages whose version is not the pinned one, in words; none without that file."""
    lines = constraints.read_text(encoding="utf-8").splitlines() if constraints.exists() else []
    pinned = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    versions = [(name, wanted, _version(name)) for name, wanted in pinned]
    return [
        f"{name} {version} (tested: {wanted})"
        for name, wanted, version in versions
        if version is not None and version.partition("+")[0] != wanted
    ]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
