"""The CPU kernels equal the reference bit for bit: any range, cut, thread count, distribution, guide and walk."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

from fedbench.base.errors import FedbenchError
from fedbench.base.rng import key, tensor_key
from fedbench.zo.kernels import cpu, lazy, loops, reference

SENTINEL = np.float32(-77.25)
BOTH = pytest.mark.parametrize("gaussian", [False, True], ids=["rademacher", "gaussian"])

#: first coordinate, length
RANGES = [
    (0, 1), (0, 64), (0, 63), (0, 65), (1, 1), (1, 63), (1, 64), (63, 1), (63, 2), (63, 130), (64, 64), (37, 20),
    (5, 1000), (128, 640), (6400, 777), (2**31 - 5, 200), (2**40 + 17, 333), (64, 0), (3, 0),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    yield
    cpu.set_threads(1)


class Case:
    """Seeded arguments for a range of n coordinates and K directions."""

    def __init__(self, n: int, k: int, *, guided: bool, seed: int = 0) -> None:
        r = np.random.default_rng([n, k, guided, seed])
        self.w = (r.standard_normal(n) * 0.05).astype(np.float32)
        self.keys = r.integers(0, 2**64, (k, 2), dtype=np.uint64)
        self.coef = (r.standard_normal(k) * 1e-3).astype(np.float32)
        self.key = r.integers(0, 2**64, 2, dtype=np.uint64)
        self.guide = r.standard_normal(n).astype(np.float32) if guided else np.empty(0, np.float32)
        self.scale, self.guide_scale = 1.3e-3, -7.7e-4


class Guarded:
    """An output of n float32 inside a larger array of sentinels."""

    def __init__(self, shape: tuple[int, ...] | int) -> None:
        self.size = int(np.prod(shape))
        self.memory = np.full(self.size + 200, SENTINEL)
        self.array = self.memory[100 : 100 + self.size].reshape(shape)

    def check(self) -> None:
        assert (self.memory[:100] == SENTINEL).all()
        assert (self.memory[100 + self.size :] == SENTINEL).all()


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def do_pair(module: Any, case: Case, first: int, gaussian: bool) -> tuple[np.ndarray, np.ndarray]:
    plus, minus = Guarded(case.w.size), Guarded(case.w.size)
    module.pair(
        case.w, first, case.keys, case.coef, case.key, case.scale, case.guide, case.guide_scale,
        plus.array, minus.array, gaussian,
    )  # fmt: skip
    plus.check()
    minus.check()
    return plus.array, minus.array


def test_words_and_keys_are_what_the_specification_says() -> None:
    """A second implementation in Python's own integers."""
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    for k0, k1 in [key(0, "direction", 3, 0, 2, 1), (0, 0), (mask, mask)]:
        t = tensor_key("body.0.weight")
        a = k0 ^ mix(k1 + t * golden + 0x243F6A8885A308D3 & mask)
        b = k1 ^ mix(a + t + 0x13198A2E03707344 & mask)
        a ^= mix(b + (t ^ 0xA4093822299F31D0) & mask)
        b ^= mix(a + 0x082EFA98EC4E6C89 & mask)
        for module in (reference, cpu):
            assert module.stream_keys(np.array([[k0, k1]], np.uint64), t).tolist() == [[a, b]]
            out = np.empty(300, np.float32)
            module.draw(np.array([a, b], np.uint64), 50, out, False)
            words = [mix(mix(a + j * golden & mask) ^ b) for j in range(6)]
            assert out.tolist() == [1.0 - 2.0 * (words[i // 64] >> i % 64 & 1) for i in range(50, 350)]


def test_logarithm_and_circle_are_accurate() -> None:
    r = np.random.default_rng(1)
    u = np.concatenate([r.integers(1, 2**32, 100_000), [1, 2, 3, 2**32 - 1, 2**32], 2 ** np.arange(33)]) * 2.0**-32
    exact = np.log(u)
    assert np.abs(reference.log(u) - exact).max() < 1e-14 * 23
    assert (np.abs(reference.log(u) - exact) <= 1e-14 * np.abs(exact)).all()
    turn = np.concatenate([r.integers(0, 2**32, 100_000), np.arange(8) * 2**29, np.arange(1, 9) * 2**29 - 1])
    cos, sin = reference.cos_sin(turn.astype(np.uint64))
    angle = turn * (2 * np.pi / 2**32)
    assert np.abs(cos - np.cos(angle)).max() < 3e-15
    assert np.abs(sin - np.sin(angle)).max() < 3e-15


@BOTH
@pytest.mark.parametrize(("first", "n"), RANGES)
def test_draw_equals_the_reference(first: int, n: int, gaussian: bool) -> None:
    case = Case(n, 0, guided=False)
    expected, found = np.empty(n, np.float32), Guarded(n)
    reference.draw(case.key, first, expected, gaussian)
    cpu.draw(case.key, first, found.array, gaussian)
    assert same(expected, found.array)
    found.check()


@BOTH
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize(("first", "n"), RANGES)
def test_pair_equals_the_reference(first: int, n: int, guided: bool, gaussian: bool) -> None:
    for k in (0, 1, 2, 5):
        case = Case(n, k, guided=guided)
        expected, found = (do_pair(module, case, first, gaussian) for module in (reference, cpu))
        assert same(expected[0], found[0])
        assert same(expected[1], found[1])


@BOTH
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize(("first", "n"), RANGES)
def test_base_and_update_equal_the_reference(first: int, n: int, guided: bool, gaussian: bool) -> None:
    for k in (0, 1, 3, 8, 65):
        case = Case(n, k, guided=guided)
        expected, found = np.empty(n, np.float32), Guarded(n)
        reference.base(case.w, first, case.keys, case.coef, expected, gaussian)
        cpu.base(case.w, first, case.keys, case.coef, found.array, gaussian)
        assert same(expected, found.array)
        found.check()
        expected[:] = found.array[:] = case.w
        reference.update(expected, first, case.keys, case.coef, case.guide, 3e-4, gaussian)
        cpu.update(found.array, first, case.keys, case.coef, case.guide, 3e-4, gaussian)
        assert same(expected, found.array)
        found.check()


@BOTH
@pytest.mark.parametrize("cut", [1, 2, 63, 64, 65, 127, 500, 999])
def test_a_range_cut_anywhere_has_the_same_bits(cut: int, gaussian: bool) -> None:
    case, first = Case(1000, 3, guided=True), 4321
    whole = do_pair(cpu, case, first, gaussian)
    parts = []
    for low, high in ((0, cut), (cut, 1000)):
        part = Case(0, 3, guided=True)
        part.__dict__.update(case.__dict__, w=case.w[low:high], guide=case.guide[low:high])
        parts.append(do_pair(cpu, part, first + low, gaussian))
    assert same(whole[0], np.concatenate([parts[0][0], parts[1][0]]))
    assert same(whole[1], np.concatenate([parts[0][1], parts[1][1]]))


@BOTH
@pytest.mark.parametrize("first", [0, 31])
def test_threads_do_not_change_bits(first: int, gaussian: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_SPLIT", 1 << 10)
    case = Case(100_001, 2, guided=True)
    results = []
    for threads in (1, 2, 3):
        cpu.set_threads(threads)
        w = case.w.copy()
        cpu.update(w, first, case.keys, case.coef, case.guide, 3e-4, gaussian)
        z = np.empty_like(w)
        cpu.draw(case.key, first, z, gaussian)
        results.append([w, z, *do_pair(cpu, case, first, gaussian)])
        assert (cpu._Threads.pool is not None) == (threads > 1)
    for other in results[1:]:
        assert all(same(a, b) for a, b in zip(results[0], other, strict=True))


@BOTH
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("cols", [64, 100, 7])
def test_rows_equal_the_whole_tensor(cols: int, guided: bool, gaussian: bool) -> None:
    case, rows = Case(40 * cols, 2, guided=guided), np.array([39, 0, 7, 7, 21])
    plus, minus = do_pair(reference, case, 0, gaussian)
    guide = case.guide.reshape(40, cols)[rows] if guided else np.empty((0, 0), np.float32)
    for module in (reference, cpu):
        out = Guarded((5, cols)), Guarded((5, cols))
        module.pair_rows(
            case.w.reshape(40, cols), rows, case.keys, case.coef, case.key, case.scale, guide, case.guide_scale,
            out[0].array, out[1].array, gaussian,
        )  # fmt: skip
        assert same(out[0].array, plus.reshape(40, cols)[rows])
        assert same(out[1].array, minus.reshape(40, cols)[rows])
        out[0].check()
        out[1].check()


def test_many_rows_on_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_SPLIT", 1 << 10)
    case, rows = Case(400 * 512, 1, guided=True), np.random.default_rng(0).integers(0, 400, 300)
    args = (case.keys, case.coef, case.key, 1e-3, case.guide.reshape(400, 512)[rows], 1e-3)
    results = []
    for threads in (1, 2):
        cpu.set_threads(threads)
        plus, minus = np.empty((300, 512), np.float32), np.empty((300, 512), np.float32)
        cpu.pair_rows(case.w.reshape(400, 512), rows, *args, plus, minus, False)
        results.append((plus, minus))
    assert same(results[0][0], results[1][0])
    assert same(results[0][1], results[1][1])


def test_read_only_weights_are_probed_but_not_updated() -> None:
    case = Case(200, 1, guided=False)
    expected = do_pair(cpu, case, 0, False)
    case.w.flags.writeable = False
    assert same(do_pair(cpu, case, 0, False)[0], expected[0])
    with pytest.raises(TypeError):
        cpu.update(case.w, 0, case.keys, case.coef, case.guide, 0.0, False)


def test_wrong_arguments_are_refused() -> None:
    case, none = Case(128, 2, guided=False), np.empty(0, np.float32)
    small = np.empty(127, np.float32)
    for keys, coef, guide in [(case.keys[:1], case.coef, none), (case.keys, case.coef[:1], none)]:
        with pytest.raises(FedbenchError, match="keys"):
            cpu.update(case.w, 0, keys, coef, guide, 0.0, False)
    with pytest.raises(FedbenchError, match="guide"):
        cpu.update(case.w, 0, case.keys, case.coef, small, 0.0, False)
    with pytest.raises(FedbenchError, match="outputs"):
        cpu.base(case.w, 0, case.keys, case.coef, small, False)
    for wrong in (case.w.astype(np.float64), np.empty(256, np.float32)[::2]):
        with pytest.raises(TypeError):
            cpu.update(wrong, 0, case.keys, case.coef, none, 0.0, False)
    two = np.empty((1, 64), np.float32)
    for row in (-1, 2):
        with pytest.raises(FedbenchError, match="rows"):
            cpu.pair_rows(
                case.w.reshape(2, 64), np.array([row]), case.keys, case.coef, case.key, 1.0, none.reshape(0, 0), 0.0,
                two, two.copy(), False,
            )  # fmt: skip
    with pytest.raises(FedbenchError, match="threads"):
        cpu.set_threads(0)


USE_CACHE = """
import hashlib, sys
import numpy as np
from fedbench.zo.kernels import cpu, loops
w = np.ones(1000, np.float32)
cpu.update(w, 5, np.arange(8, dtype=np.uint64).reshape(4, 2), np.full(4, .5, np.float32), np.empty(0, np.float32), 0., False)
hits = sum(loops.base(False).func.stats.cache_hits.values())
print(hashlib.sha256(w.tobytes()).hexdigest(), hits)
"""


def start(cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", USE_CACHE], env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str]) -> list[str]:
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return out.split()


def test_cache_filled_by_two_at_once_then_read_then_damaged(tmp_path: Path) -> None:
    w = np.ones(1000, np.float32)
    keys = np.arange(8, dtype=np.uint64).reshape(4, 2)
    reference.update(w, 5, keys, np.full(4, 0.5, np.float32), np.empty(0, np.float32), 0.0, False)
    expected = hashlib.sha256(w.tobytes()).hexdigest()
    for process in [start(tmp_path), start(tmp_path)]:
        assert finish(process)[0] == expected
    files = [path for path in tmp_path.rglob("*") if path.suffix in {".nbi", ".nbc"}]
    assert {path.suffix for path in files} == {".nbi", ".nbc"}
    assert finish(start(tmp_path)) == [expected, "1"]
    for path in files:
        path.write_bytes(path.read_bytes()[:20])
    assert finish(start(tmp_path)) == [expected, "0"]


def test_without_a_writable_folder_kernels_compile_all_the_same(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(loops, "draw", lazy.lazy_kernel(*DRAW_TYPES)(draw_source()))
    out = np.empty(70, np.float32)
    cpu.draw(np.array([1, 2], np.uint64), 0, out, False)
    expected = np.empty_like(out)
    reference.draw(np.array([1, 2], np.uint64), 0, expected, False)
    assert same(out, expected)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


DRAW_TYPES = (numba.types.int64, loops._KEY, loops._OUT)


def draw_source() -> Any:
    return loops.draw(False).func.py_func
