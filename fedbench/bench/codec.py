"""`bench codec`: every codec on tiles of normal entries, to codes and back, beside plain copies of the same tiles.

A codec works on one thread, so it is measured once and rates are those of a core for any number of threads. Tiles come
from memory, not from a cache: together they are larger than most.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from fedbench.base import account
from fedbench.base.rng import generator
from fedbench.bench import harness
from fedbench.bench.harness import Options
from fedbench.codec.codecs import CODECS
from fedbench.codec.coding import TILE_ENTRIES, Codec

_TILES = 48


def run(options: Options) -> dict[str, Any]:
    """Return GB of float32 a second by codec and way, the same over memcpy, bits and cosines, and all samples."""
    shape = _TILES, TILE_ENTRIES
    tiles = generator(0, "codec tiles").standard_normal(shape, np.float32)
    account.keep_heap()
    found = _measured(tiles, options.repeats)
    return {**found, **{f"threads_{threads}": found for threads in sorted({*harness.THREADS, options.threads})}}


def _measured(tiles: np.ndarray, repeats: int) -> dict[str, Any]:
    back = np.zeros_like(tiles)
    coded = {name: np.zeros((_TILES, codec.coded_bytes(TILE_ENTRIES)), np.uint8) for name, codec in CODECS.items()}
    arms: dict[str, harness.Arm] = {"memcpy": lambda: _each(np.copyto, back, tiles)}
    for name, codec in CODECS.items():
        arms[f"{name} encode"] = partial(_each, codec.encode, tiles, coded[name])
        arms[f"{name} decode"] = partial(_each, codec.decode, coded[name], back)
    samples = harness.measure(arms, repeats)
    seconds = harness.medians(samples)
    rates = {
        name: {way: tiles.nbytes / seconds[f"{name} {way}"] / 1e9 for way in ("encode", "decode")} for name in CODECS
    }
    over = {
        name: {way: harness.ratio(samples[f"{name} {way}"], samples["memcpy"])["value"] for way in ("encode", "decode")}
        for name in CODECS
    }
    return {
        "gb_per_s": rates,
        "memcpy_gb_per_s": tiles.nbytes / seconds["memcpy"] / 1e9,
        "over_memcpy": over,
        "bits": {name: 8 * codec.coded_bytes(TILE_ENTRIES) / TILE_ENTRIES for name, codec in CODECS.items()},
        "cosine": {name: _cosine(codec, tiles[0]) for name, codec in CODECS.items()},
        "entries": tiles.size,
        "medians_s": seconds,
        "samples_s": samples,
    }


def _each(step: Callable[[np.ndarray, np.ndarray], object], sources: np.ndarray, targets: np.ndarray) -> None:
    for source, target in zip(sources, targets, strict=True):
        step(source, target)


def _cosine(codec: Codec, tile: np.ndarray) -> float:
    payload, found = np.empty(codec.coded_bytes(tile.size), np.uint8), np.empty_like(tile)
    codec.encode(tile, payload)
    codec.decode(payload, found)
    left, right = tile.astype(np.float64), found.astype(np.float64)
    return float((left * right).sum() / np.sqrt((left * left).sum() * (right * right).sum()))
