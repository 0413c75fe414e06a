"""FLOPs and memory, counted where they happen and asked for in one place."""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
from pathlib import Path
from typing import NamedTuple

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's mallopt
_MOST = (1 << 31) - 1  # what its int argument holds


class Meter:
    """A running count of floating-point operations."""

    def __init__(self) -> None:
        self._flops = 0.0

    def add(self, flops: float) -> None:
        """Count operations."""
        self._flops += flops

    def take(self) -> float:
        """Return the count since the last call and start again from 0."""
        flops, self._flops = self._flops, 0.0
        return flops


def peak_bytes() -> int:
    """Return this process's highest resident memory (VmHWM) since its start or `reset_peak`; 0 where it isn't told."""
    return _told(_STATUS, "VmHWM:")


def resident_bytes() -> int:
    """Return this process's resident memory (VmRSS), in bytes; 0 where the system doesn't tell."""
    return _told(_STATUS, "VmRSS:")


class Held(NamedTuple):
    """Resident memory in bytes: at present, and the highest since the start or `reset_peak`; 0 where it isn't told."""

    resident: int
    peak: int


def held() -> Held:
    """Return both figures of this process from one reading, which takes some 20 us."""
    if not _STATUS.exists():
        return Held(0, 0)
    words = _STATUS.read_bytes().split()
    return Held(*(int(words[words.index(name) + 1]) * 1024 for name in (b"VmRSS:", b"VmHWM:")))


def available_bytes() -> int:
    """Return the memory that the machine could still give (MemAvailable), in bytes; 0 where the system doesn't tell."""
    return _told(Path("/proc/meminfo"), "MemAvailable:")


def reset_peak() -> bool:
    """Let `peak_bytes` and `gpu_peak_bytes` count anew from the present; return whether the system can do it."""
    if _gpu_in_use():
        torch.cuda.reset_peak_memory_stats()
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def gpu_peak_bytes() -> int:
    """Return the most bytes of tensors on the GPU since `reset_peak`; 0 where this process uses none."""
    return torch.cuda.max_memory_allocated() if _gpu_in_use() else 0


def wait_for_gpu() -> None:
    """Return when the GPU has finished all that this process asked of it; at once where it uses none."""
    if _gpu_in_use():
        torch.cuda.synchronize()


def give_back_free_memory() -> None:
    """Collect garbage and return the allocator's free pages to the system, where it is glibc's."""
    gc.collect()
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def bound_heap(mapped_from_bytes: int = 1 << 20) -> None:
    """Let every block from a size on go back to the system when it is freed, where the allocator is glibc's.

    Left alone, the allocator learns to keep blocks of up to 32 MiB, and holes between them stay resident. Fresh pages
    for every block cost a step about 15 % of its time (docs/memory.md).
    """
    library = _glibc()
    if library is not None:
        library.mallopt(_MMAP_THRESHOLD, mapped_from_bytes)
        library.mallopt(_TRIM_THRESHOLD, mapped_from_bytes)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory could not be had, from Python or from torch's allocators."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def use_threads(count: int) -> None:
    """Let torch compute on `count` threads; more would change bits and speed behind the user's back."""
    torch.set_num_threads(count)


def keep_heap() -> None:
    """Keep freed blocks of up to 1 GiB for the next round, where the allocator is glibc's.

    Otherwise activations of some MB come from fresh pages every time, and faulting them in costs a step 2-4 %.
    """
    library = _glibc()
    if library is not None:
        library.mallopt(_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(_TRIM_THRESHOLD, _MOST)


def _told(file: Path, name: str) -> int:
    if not file.exists():
        return 0
    line = next((line for line in file.read_text().splitlines() if line.startswith(name)), "")
    return int(line.split()[1]) * 1024 if line else 0


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None


def give_back_code() -> None:
    """Return pages of programs and libraries to their files; what runs again is mapped again from the page cache.

    Imports and compilation touch far more code than a round does. Only executable ranges that nobody has written to
    are given back, so that nothing can be lost.
    """
    maps = Path("/proc/self/smaps")
    library = _glibc()
    if library is None or not maps.exists():
        return
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    low = high = 0
    for line in maps.read_text(errors="replace").splitlines():
        words = line.split()
        if words[0].endswith(":"):
            if words[0] == "Anonymous:" and words[1] == "0" and high:
                library.madvise(low, high - low, mmap.MADV_DONTNEED)
        else:
            low, high = (int(part, 16) for part in words[0].split("-"))
            if words[1] != "r-xp" or words[-1][0] != "/":
                high = 0


def _gpu_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
