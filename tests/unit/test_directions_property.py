"""Directions behave like independent random signs and normals: fixed seeds, bounds in standard deviations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from fedbench.base.rng import key, tensor_key
from fedbench.zo.kernels import cpu
from fedbench.zo.kernels.reference import feistel, hash64

SIGMAS = 5.5  # one in 2.6e7 for a normal; every bound below is checked on at most some thousands of values
N = 1 << 20


def stream(*numbers: int, tensor: str = "body.0.weight", seed: int = 0) -> np.ndarray:
    keys = np.array([key(seed, "direction", *numbers)], np.uint64)
    return cpu.stream_keys(keys, tensor_key(tensor))[0]


def direction(name: np.ndarray, n: int = N, *, gaussian: bool = False, first: int = 0) -> np.ndarray:
    out = np.empty(n, np.float32)
    cpu.draw(name, first, out, gaussian)
    return out


STREAMS = [(0, 0, 0, 0), (1, 0, 0, 0), (77, 3, 5, 2)]


@pytest.mark.parametrize("numbers", STREAMS)
def test_signs_are_balanced_in_all_places_and_at_all_lags(numbers: tuple[int, ...]) -> None:
    z = direction(stream(*numbers))
    assert set(np.unique(z)) == {-1.0, 1.0}
    assert abs(z.mean(dtype=np.float64)) < SIGMAS / math.sqrt(N)
    by_place = z.reshape(-1, 64).sum(axis=0, dtype=np.float64)
    chi_square = (by_place**2).sum() / (N / 64)
    assert abs(chi_square - 64) < SIGMAS * math.sqrt(2 * 64)
    for lag in (1, 2, 3, 7, 8, 31, 32, 33, 63, 64, 65, 128, 768, 3072, 4096, 65536):
        assert abs(float(np.dot(z[:-lag], z[lag:]))) < SIGMAS * math.sqrt(N - lag), lag


@pytest.mark.parametrize("numbers", STREAMS)
def test_bytes_of_signs_are_uniform(numbers: tuple[int, ...]) -> None:
    counts = np.bincount(np.packbits(direction(stream(*numbers)) < 0), minlength=256)
    expected = N / 8 / 256
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - 255) < SIGMAS * math.sqrt(2 * 255)


@pytest.mark.parametrize("numbers", STREAMS)
def test_normals_have_the_moments_and_the_distribution_of_a_normal(numbers: tuple[int, ...]) -> None:
    z = direction(stream(*numbers), gaussian=True).astype(np.float64)
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)]:
        assert abs((z**power).mean() - mean) < SIGMAS * math.sqrt(variance / N), power
    ordered = np.sort(z)
    cdf = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in ordered[::64]])
    distance = np.abs(cdf - np.arange(0, N, 64) / N).max()
    assert distance < 2.4 / math.sqrt(N)  # Kolmogorov: exceeded by one in 50,000
    cosine, sine = z[0::2], z[1::2]
    for a, b in [(cosine, sine), (cosine**2 - 1, sine**2 - 1), (z[:-1], z[1:]), (z[:-2], z[2:])]:
        spread = math.sqrt((a * a).mean() * (b * b).mean())
        assert abs((a * b).mean()) < SIGMAS * spread / math.sqrt(len(a))
    assert np.abs(z).max() < 6.7


def neighbours() -> list[np.ndarray]:
    """Streams whose names differ by little: every grid of round, step, device and p, tensors, seeds, and bare numbers."""
    grid = [stream(*numbers) for numbers in itertools.product(range(4), range(2), range(4), range(4))]
    tensors = [stream(0, 0, 0, 0, tensor=f"body.{i}.{kind}") for i in range(1, 13) for kind in ("weight", "bias")]
    seeds = [stream(0, 0, 0, 0, seed=seed) for seed in range(1, 9)]
    bare = [cpu.stream_keys(np.array([[a, b]], np.uint64), t)[0] for a, b, t in itertools.product(range(3), repeat=3)]
    return grid + tensors + seeds + bare


@pytest.mark.parametrize("gaussian", [False, True], ids=["rademacher", "gaussian"])
def test_neighbouring_streams_are_uncorrelated(gaussian: bool) -> None:
    names, n = neighbours(), 1 << 15
    z = np.stack([direction(name, n, gaussian=gaussian) for name in names])
    correlation = (z @ z.T).astype(np.float64)[np.triu_indices(len(names), 1)] / math.sqrt(n)
    assert np.abs(correlation).max() < SIGMAS
    assert abs((correlation**2).mean() - 1) < SIGMAS * math.sqrt(2 / correlation.size)
    assert abs(correlation.mean()) < SIGMAS / math.sqrt(correlation.size)


def test_products_of_three_directions_are_balanced() -> None:
    z = [direction(stream(0, 0, 0, p), 1 << 16) for p in range(12)]
    for a, b, c in itertools.combinations(z, 3):
        assert abs(float(np.dot(a * b, c))) < SIGMAS * math.sqrt(1 << 16)


def test_far_coordinates_are_as_good_as_near_ones() -> None:
    name = stream(0, 0, 0, 0)
    near = direction(name, 1 << 16)
    for first in (1 << 32, 1 << 40, (1 << 45) + 64):
        far = direction(name, 1 << 16, first=first)
        assert abs(float(far.sum())) < SIGMAS * 256
        assert abs(float(np.dot(near, far))) < SIGMAS * 256


def flips(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return how often each of the 64 output bits changed, as a fraction."""
    bits = np.unpackbits((before ^ after).view(np.uint8).reshape(-1, 8), axis=1)
    return bits.mean(axis=0)


@pytest.mark.parametrize("function", ["hash64", "feistel"])
def test_every_input_bit_changes_every_output_bit_half_the_time(function: str) -> None:
    samples = 4096
    words = np.random.default_rng(5).integers(0, 2**64, (3, samples), dtype=np.uint64)
    words[2] = np.arange(samples)  # word numbers and tests of structure: small counters, not random ones

    def outputs(inputs: np.ndarray) -> list[np.ndarray]:
        if function == "hash64":
            return [hash64(*inputs)]
        return [word.copy() for word in feistel(*inputs)]

    plain = outputs(words)
    for which, bit in itertools.product(range(3), range(64)):
        changed = words.copy()
        changed[which] ^= np.uint64(1 << bit)
        for before, after in zip(plain, outputs(changed), strict=True):
            fraction = flips(before, after)
            assert np.abs(fraction - 0.5).max() < SIGMAS * 0.5 / math.sqrt(samples), (which, bit)


def collisions(tensors: int, buckets: int) -> int:
    """Return equal neighbours among the sorted first words of 100,000 directions in each of some tensors.

    Directions and tensors are named by small numbers. One bucket of leading bits is held and sorted at a time, so
    memory is 100,000 * tensors / buckets words.
    """
    names = np.stack(np.divmod(np.arange(100_000, dtype=np.uint64), np.uint64(1000)), axis=1)
    shift = np.uint64(65 - buckets.bit_length())
    found = 0
    for bucket in range(buckets):
        held = []
        for t in range(tensors):
            words = cpu.stream_keys(names, t)[:, 0]
            held.append(words if buckets == 1 else words[words >> shift == bucket])
        ordered = np.sort(np.concatenate(held))
        found += int((ordered[1:] == ordered[:-1]).sum())
    return found


def test_no_collision_among_a_million_stream_keys() -> None:
    assert collisions(12, buckets=1) == 0


def test_no_collision_among_keys_of_real_names() -> None:
    numbers = itertools.product(range(25), range(2), range(50), range(8))
    keys = np.array([key(0, "direction", *n) for n in numbers], np.uint64)
    streams = np.concatenate([cpu.stream_keys(keys, tensor_key(f"body.{i}.weight")) for i in range(60)])
    assert len(streams) == 1_200_000
    for words in streams.T:
        ordered = np.sort(words)
        assert (ordered[1:] != ordered[:-1]).all()


def test_collisions_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = cpu.stream_keys
    monkeypatch.setattr(cpu, "stream_keys", lambda keys, t: honest(keys, t) & np.uint64(0xFFFFFFFF << 32))
    pairs = 300_000**2 / 2 / 2**32
    assert abs(collisions(3, buckets=4) - pairs) < SIGMAS * math.sqrt(pairs)


@pytest.mark.slow
def test_no_collision_among_a_hundred_million_stream_keys() -> None:
    assert collisions(1000, buckets=16) == 0
