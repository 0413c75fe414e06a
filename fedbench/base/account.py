"""FLOPs and memory, counted where they happen and asked for in one place."""

from __future__ import annotations

from pathlib import Path

import torch


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
    """Return this process's highest resident memory so far (VmHWM), in bytes; 0 where the system doesn't tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def use_threads(count: int) -> None:
    """Let torch compute on `count` threads; more would change bits and speed behind the user's back."""
    torch.set_num_threads(count)
