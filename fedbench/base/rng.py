"""Random streams from keys: (seed, purpose, numbers) names a stream, nothing else does.

No global generator is ever touched, so no result depends on call order, rank,
thread count or time.
"""

from __future__ import annotations

import functools
import hashlib
import struct

import numpy as np


def key(seed: int, purpose: str, *numbers: int) -> tuple[int, int]:
    """Return the 128-bit key of a stream as two unsigned 64-bit words."""
    name = purpose.encode()
    packed = struct.pack(f"<qI{len(name)}s{len(numbers)}q", seed, len(name), name, *numbers)
    return struct.unpack("<QQ", hashlib.blake2b(packed, digest_size=16).digest())


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """Return a NumPy generator (Philox) that depends on the key alone."""
    low, high = key(seed, purpose, *numbers)
    return np.random.Generator(np.random.Philox(key=low | high << 64))


@functools.lru_cache(maxsize=65536)
def tensor_key(name: str) -> int:
    """Return the unsigned 64-bit key of a tensor, from its name and not from its position."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
