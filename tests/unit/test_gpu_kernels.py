"""The GPU kernels equal the reference bit for bit, and a run on a device is the run on the CPU.

Where there is a GPU they run on it. Elsewhere Triton's interpreter runs the same source on CPU tensors, with
TRITON_INTERPRET=1; and what the compiler makes of it for a GPU is read, for which no GPU is needed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from tinyruns import Tiny, make, make_job, same

from fedbench.base import config
from fedbench.base.errors import ConfigError, FedbenchError
from fedbench.models import ondevice
from fedbench.run import build
from fedbench.run.callbacks.checkpoint import SaveCheckpoint, take_up
from fedbench.run.ckpt import Store
from fedbench.run.runner import weights_sha256
from fedbench.zo.kernels import gpu, reference

TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if CUDA else "cpu")

BOTH = pytest.mark.parametrize("gaussian", [False, True], ids=["rademacher", "gaussian"])
kernels = pytest.mark.skipif(
    not (TRITON and (CUDA or INTERPRETED)),
    reason="needs triton, and a GPU or TRITON_INTERPRET=1 (make gpu)",
)
compiled = pytest.mark.skipif(not TRITON or INTERPRETED, reason="needs triton without TRITON_INTERPRET=1 (make gpu)")
on_gpu = pytest.mark.skipif(not (TRITON and CUDA), reason="needs triton and a GPU (make gpu)")

#: first coordinate, length; blocks of the kernels are 2,048 signs or 1,024 normal values.
RANGES = [
    (0, 1), (0, 63), (0, 64), (0, 65), (1, 1), (1, 64), (63, 2), (64, 64), (37, 20), (5, 1000), (128, 640),
    (0, 2048), (0, 2049), (64, 4096), (2047, 2050), (6400, 7777), (2**31 - 64, 200), (2**31 - 5, 200),
    (2**40 + 17, 3333), (2**62 + 64, 130), (64, 0),
]  # fmt: skip

#: Sentinels around outputs.
EDGE, SENTINEL = 96, -77.25


class Case:
    """Seeded arguments for a range of n coordinates and K directions."""

    def __init__(self, n: int, k: int, *, guided: bool) -> None:
        r = np.random.default_rng([n, k, guided])
        self.w = (r.standard_normal(n) * 0.05).astype(np.float32)
        self.keys = r.integers(0, 2**64, (k, 2), dtype=np.uint64)
        self.coef = (r.standard_normal(k) * 1e-3).astype(np.float32)
        self.key = r.integers(0, 2**64, 2, dtype=np.uint64)
        self.guide = r.standard_normal(n if guided else 0).astype(np.float32)
        self.scale, self.guide_scale = 1.3e-3, -7.7e-4


class Guarded:
    """A tensor of the device inside a larger one of sentinels, starting as `values`."""

    def __init__(self, values: np.ndarray) -> None:
        self.memory = torch.full((values.size + 2 * EDGE,), SENTINEL, device=DEVICE)
        self.tensor = self.memory[EDGE : EDGE + values.size].view(values.shape)
        self.tensor.copy_(torch.tensor(values))

    def equals(self, expected: np.ndarray) -> bool:
        """Return whether the bits are those of `expected` and no sentinel was touched."""
        edges = torch.cat((self.memory[:EDGE], self.memory[EDGE + expected.size :]))
        assert bool((edges == SENTINEL).all())
        return self.tensor.cpu().numpy().tobytes() == expected.tobytes()


def there(array: np.ndarray) -> torch.Tensor:
    return torch.tensor(array, device=DEVICE)


def blank(shape: Any) -> np.ndarray:
    return np.full(shape, np.float32(3.5))


@kernels
@BOTH
@pytest.mark.parametrize(("first", "n"), RANGES)
def test_draw_equals_the_reference(first: int, n: int, gaussian: bool) -> None:
    case, expected, found = Case(n, 0, guided=False), blank(n), Guarded(blank(n))
    reference.draw(case.key, first, expected, gaussian)
    gpu.draw(case.key, first, found.tensor, gaussian)
    assert found.equals(expected)


@kernels
@BOTH
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("k", [0, 1, 5])
@pytest.mark.parametrize(("first", "n"), RANGES)
def test_pair_and_update_equal_the_reference(first: int, n: int, k: int, guided: bool, gaussian: bool) -> None:
    case = Case(n, k, guided=guided)
    plus, minus = blank(n), blank(n)
    walk, step = (case.keys, case.coef), (case.key, case.scale)
    reference.pair(case.w, first, *walk, *step, case.guide, case.guide_scale, plus, minus, gaussian)
    up, down, w = Guarded(blank(n)), Guarded(blank(n)), Guarded(case.w)
    guide = there(case.guide)
    gpu.pair(w.tensor, first, *walk, *step, guide, case.guide_scale, up.tensor, down.tensor, gaussian)
    assert up.equals(plus)
    assert down.equals(minus)
    assert w.equals(case.w)

    moved = blank(n)
    reference.base(case.w, first, *walk, moved, gaussian)
    gpu.base(w.tensor, first, *walk, up.tensor, gaussian)
    assert up.equals(moved)
    reference.update(case.w, first, *walk, case.guide, case.guide_scale, gaussian)
    gpu.update(w.tensor, first, *walk, guide, case.guide_scale, gaussian)
    assert w.equals(case.w)


@kernels
@BOTH
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    ("shape", "rows"),
    [((9, 64), [0, 3, 8]), ((9, 64), [8, 8, 1]), ((5, 37), [4, 0]), ((4, 2100), [3, 1, 2]), ((7, 1), [6, 2]),
     ((3, 16), [])],
)  # fmt: skip
def test_pair_rows_equals_the_reference(shape: tuple[int, int], rows: list[int], guided: bool, gaussian: bool) -> None:
    case, some = Case(shape[0] * shape[1], 2, guided=False), (len(rows), shape[1])
    w, index = case.w.reshape(shape), np.array(rows, np.int64)
    guide = blank(some) * 0.1 if guided else np.empty((0, 0), np.float32)
    plus, minus = blank(some), blank(some)
    step = case.keys, case.coef, case.key, case.scale
    reference.pair_rows(w, index, *step, guide, case.guide_scale, plus, minus, gaussian)
    up, down = Guarded(blank(some)), Guarded(blank(some))
    given = there(guide), case.guide_scale
    gpu.pair_rows(there(w), there(index), *step, *given, up.tensor, down.tensor, gaussian)
    assert up.equals(plus)
    assert down.equals(minus)


@kernels
@BOTH
def test_bits_do_not_depend_on_the_size_of_a_block(gaussian: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case, found = Case(5000, 3, guided=True), []
    for words in (16, 128, 1024):
        monkeypatch.setattr(gpu, "SIGN_WORDS", words)
        monkeypatch.setattr(gpu, "NORMAL_WORDS", words)
        w = there(case.w)
        gpu.update(w, 70, case.keys, case.coef, there(case.guide), 0.3, gaussian)
        found.append(w.cpu().numpy().tobytes())
    assert found[0] == found[1] == found[2] != case.w.tobytes()


@kernels
def test_many_directions_equal_the_reference() -> None:
    case = Case(300, 200, guided=False)
    w = there(case.w)
    gpu.update(w, 0, case.keys, case.coef, there(case.guide), 0.0, False)
    reference.update(case.w, 0, case.keys, case.coef, case.guide, 0.0, False)
    assert w.cpu().numpy().tobytes() == case.w.tobytes()


def test_sizes_that_disagree_are_refused() -> None:
    w, keys, coef, none = torch.zeros(8), np.zeros((2, 2), np.uint64), np.zeros(2, np.float32), torch.empty(0)
    wrong: list[tuple[Any, ...]] = [
        (w, 0, keys, coef[:1], none, 0.0, False),
        (w, 0, keys, coef, torch.zeros(7), 0.0, False),
        (w.double(), 0, keys, coef, none, 0.0, False),
        (torch.zeros(16)[::2], 0, keys, coef, none, 0.0, False),
    ]
    for arguments in wrong:
        with pytest.raises(FedbenchError, match="allowed for a range of 8"):
            gpu.update(*arguments)
    table, rows = torch.zeros(3, 4), torch.tensor([1, 3])
    with pytest.raises(FedbenchError, match="found rows 1 to 3"):
        gpu.pair_rows(table, rows, keys, coef, keys[0], 0.1, none, 0.0, torch.zeros(2, 4), torch.zeros(2, 4), False)


# ---- What the compiler makes of them ----

#: Argument -> its type in a real launch.
TYPES = {
    "keys": "*i64", "rows": "*i64", "coef": "*fp32", "w": "*fp32", "guide": "*fp32", "out": "*fp32", "plus": "*fp32",
    "minus": "*fp32", "first": "i64", "n": "i32", "chunks": "i32", "count": "i32", "a": "i64", "b": "i64",
    "scale": "fp32", "guide_scale": "fp32", "guide_coef": "fp32",
}  # fmt: skip


def assembly(name: str, constants: dict[str, Any]) -> str:
    """Return the PTX of a kernel for an H100 or H200; a machine program is made of it too."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fedbench.zo.kernels import gpu_loops

    kernel: Any = getattr(gpu_loops, name)
    fixed = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {a: "constexpr" if a in fixed else TYPES[a] for a in kernel.arg_names}
    whole = [["tt.divisibility", 16]]
    attributes = {(i,): whole for i, a in enumerate(kernel.arg_names) if a == "n" or signature[a].startswith("*")}
    made = triton.compile(
        ASTSource(kernel, signature, constexprs=fixed, attrs=attributes),
        target=GPUTarget("cuda", 90, 32),
        options=dict(gpu._LAUNCH),
    )
    assert len(made.asm["cubin"]) > 1000
    return str(made.asm["ptx"])


@compiled
@BOTH
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(("name", "picked"), [("draw", False), ("base", False), ("pair", False), ("pair", True)])
def test_no_product_is_contracted_and_divisions_and_roots_are_rounded(
    name: str, picked: bool, aligned: bool, gaussian: bool
) -> None:
    words = gpu.NORMAL_WORDS if gaussian else gpu.SIGN_WORDS
    constants = {"GAUSSIAN": gaussian, "WORDS": words, "GUIDED": True, "PICKED": picked, "ALIGNED": aligned}
    ptx = assembly(name, constants)
    assert re.search(r"\bmul\.lo\.[su]64", ptx), "the hash is in there"
    assert not re.findall(r"\b(?:fma|mad)\.(?:rn\.|rz\.)?f(?:32|64)|approx|\.ftz|div\.full", ptx)
    if gaussian:
        assert "div.rn.f64" in ptx
        assert "sqrt.rn.f64" in ptx
    if aligned:
        assert re.search(r"st\.global\.v[24]", ptx), "neighbours are written together"


@compiled
def test_a_launch_that_allows_contraction_is_seen() -> None:
    constants = {"GAUSSIAN": True, "WORDS": 512, "GUIDED": True, "ALIGNED": True}
    with mock.patch.dict(gpu._LAUNCH, enable_fp_fusion=True):
        assert re.search(r"\bfma\.rn\.f64", assembly("base", constants))


# ---- Runs ----


def run_of(method: str, changes: dict[str, Any], device: torch.device | None) -> Tiny:
    """Return a small run, its model moved to a device behind the check for a GPU where one is given."""
    if device is None:
        return Tiny(make(method, changes, evaluated=8))
    with mock.patch.object(ondevice, "cuda", return_value=ondevice.OnDevice(device)):
        return Tiny(make(method, changes | {"model.device": "cuda"}, evaluated=8))


FEW = {"run.rounds": 2, "federation.devices": 2, "federation.batch_size": 2, "data.public_per_class": 2}
RUNS = [
    ("fedmezo", {"federation.local_steps": 2}),
    ("fedmezo", {"zo.distribution": "gaussian", "model.micro_batch": 2, "federation.batch_size": 4}),
    ("cooperllm", {"zo.perturbations": 2}),
    ("cooperllm", {"comm.lz4": True, "federation.local_steps": 2}),
    ("fedspzo", {"method.fedspzo.p2": 2}),
    ("fedavg", {}),
    ("public_only", {}),
    ("decomfl", {"federation.local_steps": 2}),
    ("fedkseed_pro", {"method.fedkseed_pro.candidates": 8}),
    ("fwdllm", {"method.fwdllm.max_directions": 1}),
]


@pytest.fixture
def _large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's time goes by blocks."""
    monkeypatch.setattr(gpu, "SIGN_WORDS", 1 << 8)
    monkeypatch.setattr(gpu, "NORMAL_WORDS", 1 << 13)


@kernels
@pytest.mark.skipif(not INTERPRETED, reason="a GPU's matrix products have bits of their own")
@pytest.mark.usefixtures("_large_blocks")
@pytest.mark.parametrize(("method", "changes"), RUNS)
def test_a_run_with_the_gpus_kernels_is_the_run_on_the_cpu(method: str, changes: dict[str, Any]) -> None:
    plain, moved = (run_of(method, FEW | changes, device) for device in (None, torch.device("cpu")))
    for tiny in (plain, moved):
        assert tiny.run() == "rounds"
    assert isinstance(moved.built.trainable.tensors[0].flat, torch.Tensor)
    assert moved.runner.trajectory.digest == plain.runner.trajectory.digest
    assert weights_sha256(moved.built.trainable) == weights_sha256(plain.built.trainable)
    start = Tiny(make(method, FEW, evaluated=8))
    assert weights_sha256(start.built.trainable) != weights_sha256(plain.built.trainable)


@kernels
@pytest.mark.usefixtures("_large_blocks")
def test_a_checkpoint_of_a_device_is_taken_up_there(tmp_path: Any) -> None:
    changes = FEW | {"model.trainable": "bitfit"}
    straight = run_of("cooperllm", changes, DEVICE)
    straight.run()
    stopped = run_of("cooperllm", changes, DEVICE)
    store = Store(tmp_path, "0" * 64, lambda text: None)
    saver = SaveCheckpoint(store, stopped.runner, stopped.metrics, 1)
    assert stopped.run(saver, wants_to_stop=lambda: True) == "stopped"
    again, found = run_of("cooperllm", changes, DEVICE), store.newest()
    assert found is not None
    take_up(found, again.runner, again.metrics)
    assert again.run() == "rounds"
    values = [{t.name: t.values() for t in tiny.built.trainable} for tiny in (straight, again)]
    assert same(*values)
    assert again.runner.trajectory.digest == straight.runner.trajectory.digest


@on_gpu
@pytest.mark.parametrize(("method", "changes"), RUNS)
def test_a_run_on_a_gpu_stays_near_the_run_on_the_cpu(method: str, changes: dict[str, Any]) -> None:
    plain, moved = (run_of(method, FEW | changes, device) for device in (None, DEVICE))
    for tiny in (plain, moved):
        tiny.run()
    assert all(p.is_cuda for p in moved.built.cut.parameters())
    for left, right in zip(plain.built.trainable, moved.built.trainable, strict=True):
        assert np.allclose(left.values(), right.values(), rtol=1e-3, atol=1e-4), left.name


@pytest.mark.skipif(os.environ.get("FEDBENCH_REQUIRE_GPU") != "1", reason="no GPU is asked for (make gpu)")
def test_a_gpu_is_there_where_one_is_asked_for() -> None:
    assert TRITON
    assert torch.cuda.is_available()


def test_a_job_for_a_gpu_that_is_not_there_says_why() -> None:
    job = make_job("fedmezo", {"model.device": "cuda"})
    for wanted in (job.on_host, lambda: build.construct(job)):
        with (
            mock.patch.object(torch.cuda, "is_available", return_value=False),
            pytest.raises(ConfigError, match=r"model\.device = 'cuda': torch .* allowed here: 'cpu'"),
        ):
            wanted()
    assert ConfigError("x").exit_code == 2
    assert make_job("fedmezo").on_host().config.model.device == "cpu"


def test_a_mapped_model_is_on_the_cpu() -> None:
    with pytest.raises(ConfigError, match="mapped = true maps memory of the host"):
        make_job("fedmezo", {"model.device": "cuda", "model.mapped": True})
    tree = {"method": {"name": "fedmezo"}, "model": {"device": "tpu"}}
    with pytest.raises(ConfigError, match=r"model\.device: found 'tpu'.*'cpu' or 'cuda'"):
        config.check(tree, source="test")


def test_without_triton_one_sentence_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from fedbench.base.errors import ConfigError\n"
        "from fedbench.zo.kernels import gpu\n"
        "try:\n    gpu.prepare(False, 'cpu')\nexcept ConfigError as error:\n    print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.strip().endswith("Run: pip install 'fedbench[gpu]'")
