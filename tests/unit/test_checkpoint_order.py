"""The order in which a checkpoint reaches the disk, and what a killed writer or a damaged generation leaves possible."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbench.base import fsio, rng
from fedbench.run.ckpt import Checkpoint, Store


def state(number: int) -> Checkpoint:
    arrays = {"weights/a": np.arange(2000, dtype=np.float32) + number}
    return Checkpoint(arrays, {"next_round": number})


def numbers(folder: Path) -> int | None:
    """Return the round of the newest sound generation, and hold its arrays against it."""
    found = Store(folder, "config", list[str]().append).newest()
    if found is None:
        return None
    number = int(found.state["next_round"])
    assert found.arrays["weights/a"].tobytes() == state(number).arrays["weights/a"].tobytes()
    return number


def test_latest_is_named_after_all_else_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []

    def noting(name: str, told: Callable[..., str]) -> None:
        original: Any = getattr(os, name)

        def noted(*args: Any) -> Any:
            done.append((name, told(*args)))
            return original(*args)

        monkeypatch.setattr(os, name, noted)

    noting("fsync", lambda handle: Path(os.readlink(f"/proc/self/fd/{handle}")).name)
    noting("replace", lambda source, target: Path(target).name)
    Store(tmp_path / "ckpt", "config", print).save(state(1))
    plain = [
        (what, name.split(".tmp")[0].lstrip(".").rsplit(".", 1)[0] if ".tmp" in name else name) for what, name in done
    ]
    assert plain == [("fsync", tmp_path.name)] + [  # the folder is new
        step
        for name in ("a.safetensors", "a.json", "LATEST")
        for step in (("fsync", name), ("replace", name), ("fsync", "ckpt"))
    ]


def test_every_folder_on_the_way_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (synced.append(Path(os.readlink(f"/proc/self/fd/{handle}"))), fsync(handle))
    )
    fsio.write_text(tmp_path / "results" / "ckpt" / "x" / "a", "text")
    assert synced[:3] == [tmp_path, tmp_path / "results", tmp_path / "results" / "ckpt"]


def test_two_writers_do_not_take_each_others_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (Store(tmp_path / "ckpt", "config", print) for _ in range(2))
    fsync, between = fsio._fsync, [True]

    def other_writer(path: Path) -> None:
        if between:
            between.clear()
            second.save(state(2))
        fsync(path)

    first.save(state(0))
    monkeypatch.setattr(fsio, "_fsync", other_writer)
    first.save(state(1))
    assert numbers(tmp_path / "ckpt") == 1


def test_what_was_fallen_back_to_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The damaged generation is written anew: a kill in that moment leaves the sound one."""
    store = Store(tmp_path / "ckpt", "config", print)
    store.save(state(1))
    store.save(state(2))
    (tmp_path / "ckpt" / "b.safetensors").write_bytes(b"")
    warned: list[str] = []
    resumed = Store(tmp_path / "ckpt", "config", warned.append)
    found = resumed.newest()
    assert found is not None
    assert (found.state["next_round"], len(warned)) == (1, 1)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda source, target: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space"):
            resumed.save(state(2))
    assert numbers(tmp_path / "ckpt") == 1
    resumed.save(state(2))
    assert numbers(tmp_path / "ckpt") == 2
    resumed.save(state(3))
    assert numbers(tmp_path / "ckpt") == 3


KILLED = """
import sys, threading, time, os, signal
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_checkpoint_order import state
from fedbench.run.ckpt import Store
store = Store(Path(sys.argv[2]), "config", print)
store.save(state(0))
threading.Timer(float(sys.argv[3]), os.kill, (os.getpid(), signal.SIGKILL)).start()
number = 1
while True:
    store.save(state(number))
    print(number, flush=True)
    number += 1
"""


def test_a_writer_killed_at_any_moment_leaves_the_last_checkpoint_that_it_finished(tmp_path: Path) -> None:
    draw = rng.generator(0, "test-killed-writer")
    for number in range(3):
        folder = tmp_path / str(number) / "ckpt"
        words = [
            sys.executable,
            "-c",
            KILLED,
            str(Path(__file__).parent),
            str(folder),
            f"{draw.uniform(0.02, 0.2):.4f}",
        ]
        ran = subprocess.run(words, check=False, timeout=60, capture_output=True, text=True)
        assert ran.returncode == -signal.SIGKILL, ran.stderr
        finished = int((ran.stdout.split() or ["0"])[-1])
        assert numbers(folder) in (finished, finished + 1), ran.stdout
        store = Store(folder, "config", print)
        store.save(state(9))
        store.sweep_up()
        assert not list(folder.glob("*.tmp"))
        assert not list(folder.glob(".*.tmp"))
        store.clear()
        assert not folder.exists()
