"""Weights in a working file: the same bits as in memory, nothing left behind, and a memory that a resident model exceeds."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tinycuts import batch_for, embedded_cut
from tinyruns import WORKING, Tiny, make, make_job, same, weights

from fedbench.base import account
from fedbench.base.errors import ConfigError, FedbenchError, ModelError
from fedbench.comm.loopback import Loopback
from fedbench.data.rows import Batch
from fedbench.models import checkpoint, mapped
from fedbench.models.cut import State
from fedbench.models.mapped import Mapped
from fedbench.models.residency import RESIDENT
from fedbench.run import execute
from fedbench.run.build import Job
from fedbench.run.callbacks.checkpoint import state_of, take_up
from fedbench.run.memory import Memory
from fedbench.zo import micro

CHILD = Path(__file__).with_name("limited_child.py")


def digest_of(method: str, changes: dict[str, Any]) -> tuple[str, dict[str, np.ndarray]]:
    tiny = Tiny(make(method, {"federation.batch_size": 5, "federation.local_steps": 2, **changes}))
    tiny.run()
    return tiny.runner.trajectory.digest.hex(), weights(tiny.built.trainable)


@pytest.mark.parametrize("method", WORKING)
def test_a_mapped_run_has_the_bits_of_a_resident_one(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mapped, "piece", 1 << 10)  # so that tensors of this small model take several
    monkeypatch.setattr(Mapped, "picked_rows", 3)
    monkeypatch.setattr(mapped, "_LARGE_TABLE", 1 << 10)
    own = {"method.spry.derivative": "central"} if method == "spry" else {}  # a mapped row carries no tangent
    resident = digest_of(method, own)
    found = digest_of(method, own | {"model.mapped": True, "results.dir": str(tmp_path)})
    assert found[0] == resident[0]
    assert same(found[1], resident[1])
    assert not list((tmp_path / "scratch").iterdir())


def test_a_mapped_run_goes_on_from_its_checkpoint_and_from_that_of_a_resident_one(tmp_path: Path) -> None:
    there = {"model.mapped": True, "results.dir": str(tmp_path)}
    straight = Tiny(make("fedmezo", {"run.rounds": 4}))
    straight.run()
    for first, second in ((there, there), ({}, there), (there, {})):
        stopped = Tiny(make("fedmezo", {"run.rounds": 4, **first}))
        assert stopped.run(wants_to_stop=lambda t=stopped: t.runner.next_round == 2) == "stopped"  # type: ignore[misc]
        resumed = Tiny(make("fedmezo", {"run.rounds": 4, **second}))
        take_up(state_of(stopped.runner, stopped.metrics), resumed.runner, resumed.metrics)
        resumed.run()
        assert resumed.runner.trajectory.digest == straight.runner.trajectory.digest


@pytest.mark.parametrize(
    ("rows", "size", "expected"),
    [
        (5, 0, [(0, 5)]),
        (5, 5, [(0, 5)]),
        (5, 8, [(0, 5)]),
        (5, 2, [(0, 2), (2, 5)]),
        (6, 2, [(0, 2), (2, 4), (4, 6)]),
        (7, 3, [(0, 3), (3, 7)]),
        (3, 2, [(0, 3)]),
        (2, 2, [(0, 2)]),
    ],
)
def test_slices_have_two_rows_at_least(rows: int, size: int, expected: list[tuple[int, int]]) -> None:
    assert micro.cuts(rows, size) == expected


def test_a_single_row_at_a_time_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"micro_batch = 1.*allowed: 0, or from 2"):
        make("fedmezo", {"model.micro_batch": 1})


@pytest.mark.parametrize("padded", [False, True])
def test_a_stage_by_slices_gives_both_streams_their_own_rows(padded: bool) -> None:
    cut = embedded_cut()
    one, other = (batch_for(cut, rows=7, seed=seed, padded=padded) for seed in (1, 2))
    both = Batch(*(torch.cat(pair) for pair in zip(vars(one).values(), vars(other).values(), strict=True)))
    state: Any = both
    with torch.inference_mode():
        expected = torch.cat([cut(one), cut(other)])
        for stage in range(cut.stages):
            before = state.h.clone() if stage == 2 else None
            kept = state
            state = micro.run_stage(cut, stage, state, 2, 2, reuse=stage > 2)
            if before is not None:
                assert torch.equal(kept.h, before), "states that are not to be reused were overwritten"
    torch.testing.assert_close(state, expected, rtol=0, atol=1e-5)


def test_masks_of_slices_are_joined_where_some_have_none() -> None:
    class Masked:
        residency = RESIDENT

        def run_stage(self, stage: int, batch: Batch) -> State:
            mask = None if bool(batch.mask.all()) else batch.mask[:, None, None, :]
            return State(torch.zeros(len(batch.ids), 1, 1), mask, batch)

    mask = torch.ones(8, 3, dtype=torch.bool)
    mask[7, 2] = False
    batch = Batch(torch.zeros(8, 3, dtype=torch.int64), mask, torch.zeros(8), torch.zeros(8))
    state = micro.run_stage(Masked(), 0, batch, 2, 2, reuse=False)  # type: ignore[arg-type]
    assert isinstance(state, State)
    assert state.mask is not None
    assert torch.equal(state.mask[:, 0, 0], mask)


@pytest.mark.parametrize("method", ["fedmezo", "fedspzo"])
def test_micro_batches_change_losses_by_rounding_alone_and_count_the_same(method: str) -> None:
    outcomes, runs = [], []
    for size in (0, 2):
        tiny = Tiny(make(method, {"federation.batch_size": 7, "model.micro_batch": size}))
        (outcome,) = tiny.play(1)
        outcomes.append(outcome)
        runs.append(tiny.built.lab.stream.block_runs)
    np.testing.assert_allclose(outcomes[1].losses, outcomes[0].losses, rtol=1e-6)
    assert outcomes[1].flops == outcomes[0].flops
    assert runs[1] == runs[0]


def test_a_folder_in_memory_is_refused() -> None:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        pytest.skip("no /dev/shm on this system")
    with pytest.raises(ModelError, match=r"tmpfs.*set results\.dir"):
        Mapped(folder / "fedbench-test")
    assert not (folder / "fedbench-test").exists()


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ModelError, match=r"No space left on device.*results\.dir"):
        Mapped(tmp_path).place(embedded_cut())
    assert not list(tmp_path.iterdir())


def test_a_kill_leaves_nothing_in_scratch(tmp_path: Path) -> None:
    words = [sys.executable, str(CHILD), "wait", str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert "(deleted)" in Path(f"/proc/{child.pid}/maps").read_text()
        child.send_signal(signal.SIGKILL)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def limited(how: str, folder: Path, model: str = "opt-limited") -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(CHILD), how, str(folder), model]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)


def test_a_step_passes_mapped_under_a_limit_that_a_resident_model_fails(tmp_path: Path) -> None:
    resident, passed = limited("resident", tmp_path), limited("mapped", tmp_path)
    assert resident.returncode == 2, resident.stderr
    assert "memory" in resident.stderr
    assert passed.returncode == 0, passed.stderr
    assert passed.stdout.startswith("loss ")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), r"not enough: MemoryError.*model\.mapped = true"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), r"you tried.*model\.mapped = true"),
    ],
)
def test_memory_that_can_not_be_had_is_one_sentence(
    error: Exception, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def construct(job: Job) -> None:
        raise error

    monkeypatch.setattr(execute, "construct", construct)
    with pytest.raises(FedbenchError, match=told):
        execute.Execution(Loopback(), Memory())(lambda size: make_job("fedmezo"), execute.Options(tmp_path))


def test_other_errors_of_a_run_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def construct(job: Job) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(execute, "construct", construct)
    with pytest.raises(RuntimeError, match="shapes differ"):
        execute.Execution(Loopback(), Memory())(lambda size: make_job("fedmezo"), execute.Options(tmp_path))


@pytest.mark.slow
def test_opt_125m_passes_mapped_under_a_limit_that_it_fails_resident(tmp_path: Path) -> None:
    resident, passed = limited("resident", tmp_path, "opt-125m"), limited("mapped", tmp_path, "opt-125m")
    assert resident.returncode == 2, resident.stderr
    assert passed.returncode == 0, passed.stderr


def test_a_mapped_model_takes_no_more_than_a_stage(tmp_path: Path) -> None:
    cut = embedded_cut()
    Mapped(tmp_path).place(cut)
    with torch.inference_mode():
        cut(batch_for(cut))
    ranges = [line for line in Path("/proc/self/smaps").read_text().split("VmFlags") if f"{tmp_path}/" in line]
    assert ranges
    resident = sum(int(line.split("Rss:")[1].split()[0]) for line in ranges)
    assert resident <= 64  # kB: the embedding's last page and no block


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_checkpoint_is_read_piece_by_piece_under_its_names(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    monkeypatch.setattr(checkpoint, "_PIECE_BYTES", 64)
    model = torch.nn.Module()
    model.norm = torch.nn.LayerNorm(5)
    model.linear = torch.nn.Linear(5, 33)
    values = {f"bert.{name}": torch.randn(p.shape).to(dtype) for name, p in model.named_parameters()}
    old = {name.replace("norm.weight", "norm.gamma").replace("norm.bias", "norm.beta"): v for name, v in values.items()}
    save_file(old, tmp_path / "model.safetensors")
    found = checkpoint.matched(checkpoint.index(tmp_path), model, "bert")
    assert found is not None
    checkpoint.fill(model, found, RESIDENT)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, values[f"bert.{name}"].float())
    model.other = torch.nn.Linear(2, 2)
    assert checkpoint.matched(checkpoint.index(tmp_path), model, "bert") is None


def test_a_phase_that_allocates_shows_in_its_own_peak_alone() -> None:
    """The block is mapped by hand: the heap may serve it from pages that earlier tests left, and keep it when freed."""
    if not account.reset_peak():
        pytest.skip("this system can't set the high-water mark back (/proc/self/clear_refs)")
    before = account.peak_bytes()
    with mmap.mmap(-1, 200 << 20) as block:
        for page in range(0, 200 << 20, mmap.PAGESIZE):
            block[page] = 1
        assert account.peak_bytes() >= before + (190 << 20)
    assert account.peak_bytes() >= before + (190 << 20)
    assert account.reset_peak()
    assert account.peak_bytes() < before + (100 << 20)


def test_free_memory_and_code_can_be_given_back_while_it_runs() -> None:
    start = time.perf_counter()
    account.give_back_free_memory()
    account.give_back_code()
    assert float(torch.ones(64, 64).mm(torch.ones(64, 64)).sum()) == 64.0**3
    assert time.perf_counter() - start < 30
