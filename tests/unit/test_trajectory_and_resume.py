"""Stop and resume: the same bits as without a stop, and no checkpoint that is damaged or another job's is ever used."""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tinyruns import Tiny, make, make_job, same, weights

from fedbench.base.errors import EXIT_OK, EXIT_STOPPED, EXIT_USER, ResultError
from fedbench.base.identity import config_sha256
from fedbench.comm.loopback import Loopback
from fedbench.results import reader
from fedbench.run import execute
from fedbench.run.build import METHODS
from fedbench.run.callbacks import checkpoint
from fedbench.run.callbacks.checkpoint import SaveCheckpoint, take_up
from fedbench.run.ckpt import Checkpoint, Store
from fedbench.run.memory import Memory
from fedbench.run.runner import Runner, Trajectory, weights_sha256

ROUNDS = 4
CHANGES = {
    "run.rounds": ROUNDS,
    "run.eval_every": 2,
    "federation.devices": 4,
    "federation.sampled": 2,
    "federation.batch_size": 2,
    "federation.local_steps": 2,
    "method.fedspzo.p2": 2,
    "method.fwdllm.max_directions": 2,
    "model.trainable": "bitfit",
}
#: Columns that depend on the clock, and are not part of any promise.
TIMES = {"round_s", "compute_s", "cloud_s", "encode_s", "wait_s", "apply_s", "eval_s"}


class Warnings(list[str]):
    """Collects what a store warns of."""

    def __call__(self, text: str) -> None:
        self.append(text)


def fresh(method: str, store: Store, **changes: Any) -> tuple[Tiny, SaveCheckpoint]:
    tiny = Tiny(make(method, CHANGES | changes, evaluated=8))
    return tiny, SaveCheckpoint(store, tiny.runner, tiny.metrics, 1)


def store_for(method: str, folder: Path, warn: Warnings | None = None) -> Store:
    return Store(folder, config_sha256(make_job(method, CHANGES).tree), warn if warn is not None else Warnings())


def without_times(rows: list[dict[str, Any]]) -> str:
    return json.dumps([{k: np.asarray(v).tolist() for k, v in row.items() if k not in TIMES} for row in rows])


@pytest.mark.parametrize("method", METHODS)
def test_a_stop_and_a_resume_give_the_straight_runs_bits(method: str, tmp_path: Path) -> None:
    straight, _ = fresh(method, store_for(method, tmp_path / "unused"))
    assert straight.run() == "rounds"

    store = store_for(method, tmp_path / "ckpt")
    for stop in (1, 3):  # two stops, each in what stands for a new process
        tiny, saver = fresh(method, store)
        found = store.newest()
        if found is not None:
            take_up(found, tiny.runner, tiny.metrics)
        assert tiny.run(saver, wants_to_stop=lambda tiny=tiny, stop=stop: tiny.runner.next_round >= stop) == "stopped"
        assert tiny.runner.next_round == stop

    last, saver = fresh(method, store)
    found = store.newest()
    assert found is not None
    take_up(found, last.runner, last.metrics)
    assert last.run(saver) == "rounds"
    assert same(weights(last.built.trainable), weights(straight.built.trainable))
    assert last.runner.trajectory.digest == straight.runner.trajectory.digest
    assert without_times(last.metrics.rows) == without_times(straight.metrics.rows)
    assert without_times(last.metrics.device_rows) == without_times(straight.metrics.device_rows)
    for name, kept in straight.runner.traffic.state().items():
        np.testing.assert_array_equal(last.runner.traffic.state()[name], kept)
    assert last.metrics.probe_accuracy == straight.metrics.probe_accuracy


@pytest.mark.parametrize("method", METHODS)
def test_the_trajectory_is_a_function_of_the_job_and_of_nothing_else(method: str, tmp_path: Path) -> None:
    digests = {}
    for name, changes in (
        ("once", {}),
        ("twice", {}),
        ("lz4", {"comm.lz4": True}),
        ("seed", {"run.seed": 1}),
        ("rate", {f"method.{method}.lr": 0.011}),
    ):
        tiny, _ = fresh(method, store_for(method, tmp_path), **{"run.rounds": 2}, **changes)
        tiny.run()
        digests[name] = tiny.runner.trajectory.digest
    assert digests["once"] == digests["twice"] == digests["lz4"]
    assert len(set(digests.values())) == 3


def test_the_trajectory_is_a_chain() -> None:
    chain = Trajectory()
    chain.join(b"a", b"b")
    assert chain.digest == hashlib.sha256(b"ab").digest()
    first = chain.digest
    chain.join(b"c")
    assert chain.digest == hashlib.sha256(first + b"c").digest()


def test_the_weights_hash_follows_names_and_bits() -> None:
    built = make("fedmezo", {"model.trainable": "head"})
    first = weights_sha256(built.trainable)
    assert weights_sha256(built.trainable) == first
    built.trainable.tensors[0].flat[3] = np.nextafter(built.trainable.tensors[0].flat[3], np.float32(9))
    assert weights_sha256(built.trainable) != first


def a_checkpoint(number: int) -> Checkpoint:
    arrays = {"weights/a": np.arange(8, dtype=np.float32) + number, "method/b": np.array([number], np.int64)}
    return Checkpoint(arrays, {"next_round": number, "metrics": {"rows": [{"dev_loss": float("nan"), "lr": 0.1}]}})


@pytest.fixture
def warned() -> Warnings:
    return Warnings()


@pytest.fixture
def store(tmp_path: Path, warned: Warnings) -> Store:
    """Return a store with the generations of rounds 1 (b), 2 (a, an older one) and 3 (b, the newest)."""
    kept = Store(tmp_path / "ckpt", "config", warned)
    for number in (1, 2, 3):
        kept.save(a_checkpoint(number))
    return kept


def next_round(store: Store) -> int | None:
    found = store.newest()
    return None if found is None else int(found.state["next_round"])


def newest_files(folder: Path) -> tuple[Path, Path]:
    name = (folder / "LATEST").read_text()
    return folder / f"{name}.safetensors", folder / f"{name}.json"


def test_the_newest_of_two_generations_comes_back_whole(store: Store, tmp_path: Path, warned: Warnings) -> None:
    found = store.newest()
    assert found is not None
    assert found.state["next_round"] == 3
    assert np.isnan(found.state["metrics"]["rows"][0]["dev_loss"])
    for name, array in a_checkpoint(3).arrays.items():
        assert (found.arrays[name].dtype, found.arrays[name].tobytes()) == (array.dtype, array.tobytes())
    names = {path.name for path in (tmp_path / "ckpt").iterdir()}
    assert names == {"LATEST", "a.json", "a.safetensors", "b.json", "b.safetensors"}
    assert not warned


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


DAMAGE = {
    "arrays cut": lambda arrays, head: truncated(arrays),
    "arrays gone": lambda arrays, head: arrays.unlink(),
    "arrays empty": lambda arrays, head: arrays.write_bytes(b""),
    "head cut": lambda arrays, head: truncated(head),
    "head empty": lambda arrays, head: head.write_text(""),
    "head not text": lambda arrays, head: head.write_bytes(b"\xff\xfe\x00"),
    "head a list": lambda arrays, head: head.write_text("[1]"),
    "head a number": lambda arrays, head: head.write_text("3"),
    "head without keys": lambda arrays, head: head.write_text("{}"),
    "head a folder": lambda arrays, head: (head.unlink(), head.mkdir()),
    "other arrays": lambda arrays, head: arrays.write_bytes(
        (arrays.parent / ({"a": "b", "b": "a"}[arrays.stem] + ".safetensors")).read_bytes()
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_generation_falls_back_with_a_warning(
    damage: str, store: Store, tmp_path: Path, warned: Warnings
) -> None:
    DAMAGE[damage](*newest_files(tmp_path / "ckpt"))
    assert next_round(store) == 2
    assert len(warned) == 1
    assert "is damaged" in warned[0]
    assert "falling back to the other one" in warned[0]


def test_no_flipped_bit_of_a_checkpoint_is_believed(store: Store, tmp_path: Path, warned: Warnings) -> None:
    draw = np.random.default_rng(3)
    for path in newest_files(tmp_path / "ckpt"):
        whole = path.read_bytes()
        bits = np.arange(len(whole) * 8) if len(whole) < 40 else draw.integers(0, len(whole) * 8, 150)
        for bit in map(int, bits):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            assert next_round(store) == 2, (path.name, bit)
        path.write_bytes(whole)
    assert next_round(store) == 3
    assert len(warned) == 300


def test_two_damaged_generations_are_a_fresh_start_with_two_warnings(
    store: Store, tmp_path: Path, warned: Warnings
) -> None:
    for path in (tmp_path / "ckpt").glob("*.safetensors"):
        truncated(path)
    assert store.newest() is None
    assert len(warned) == 2


def test_a_lost_pointer_still_finds_a_generation(store: Store, tmp_path: Path) -> None:
    pointer = tmp_path / "ckpt" / "LATEST"
    for content in (b"", b"c", b"../a", b"\xff\xfe"):
        pointer.write_bytes(content)
        assert next_round(store) in (2, 3)
    pointer.unlink()
    assert next_round(store) in (2, 3)


def test_a_lost_head_is_told(store: Store, tmp_path: Path, warned: Warnings) -> None:
    newest_files(tmp_path / "ckpt")[1].unlink()
    assert next_round(store) == 2
    assert len(warned) == 1
    newest_files(tmp_path / "ckpt")[0].unlink()
    for path in (tmp_path / "ckpt").glob("*.json"):
        path.unlink()
    assert next_round(store) is None
    assert len(warned) == 3
    assert "is damaged" in warned[2]


def test_a_pointer_that_can_not_be_read_is_told_and_a_generation_found(
    store: Store, tmp_path: Path, warned: Warnings
) -> None:
    pointer = tmp_path / "ckpt" / "LATEST"
    pointer.unlink()
    pointer.mkdir()
    assert next_round(store) in (2, 3)
    assert len(warned) == 1
    assert "LATEST can't be read (Is a directory)" in warned[0]


def test_no_checkpoint_is_none_and_a_cleared_store_leaves_nothing(store: Store, tmp_path: Path) -> None:
    assert Store(tmp_path / "nothing", "config", Warnings()).newest() is None
    store.clear()
    assert not (tmp_path / "ckpt").exists()
    store.clear()
    assert store.newest() is None


def test_what_others_left_in_the_folder_stays(store: Store, tmp_path: Path) -> None:
    (tmp_path / "ckpt" / "notes.txt").write_text("mine")
    store.clear()
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == ["notes.txt"]


def test_another_jobs_checkpoint_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="belongs to another job"):
        Store(tmp_path / "ckpt", "another config", Warnings()).newest()


def test_a_changed_setting_makes_it_another_job(tmp_path: Path) -> None:
    _, saver = fresh("fedmezo", store_for("fedmezo", tmp_path))
    saver.save()
    assert store_for("fedmezo", tmp_path).newest() is not None
    for changes in ({"run.seed": 5}, {"method.fedmezo.lr": 0.5}, {"run.rounds": 9}):
        other = Store(tmp_path, config_sha256(make_job("fedmezo", CHANGES | changes).tree), Warnings())
        with pytest.raises(ResultError, match="another job"):
            other.newest()
    for changes in ({"results.dir": "elsewhere"}, {"comm.deadline_s": 1.0}, {"results.checkpoint_every": 7}):
        same_job = Store(tmp_path, config_sha256(make_job("fedmezo", CHANGES | changes).tree), Warnings())
        assert same_job.newest() is not None


@pytest.mark.parametrize(("every", "saved"), [(0, 0), (1, 4), (2, 2), (3, 1), (9, 0)])
def test_checkpoints_are_written_every_so_many_rounds(
    every: int, saved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, _ = fresh("fedmezo", store_for("fedmezo", tmp_path), **{"model.trainable": "head"})
    calls: list[int] = []
    saver = SaveCheckpoint(store_for("fedmezo", tmp_path), tiny.runner, tiny.metrics, every)
    monkeypatch.setattr(saver, "save", lambda: calls.append(tiny.runner.next_round))
    tiny.run(saver)
    assert len(calls) == saved
    assert calls == [every * (i + 1) for i in range(saved)]


@pytest.mark.parametrize(
    ("round_s", "save_s", "saved"), [(25.0, 0.0, [3]), (70.0, 0.0, [1, 2, 3, 4]), (25.0, 4.0, [3]), (70.0, 7.0, [1, 3])]
)
def test_checkpoints_are_written_after_so_many_seconds_and_take_little_of_the_time(
    round_s: float, save_s: float, saved: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: now_s))
    tiny, _ = fresh("fedmezo", store_for("fedmezo", tmp_path), **{"model.trainable": "head"})
    store, calls = store_for("fedmezo", tmp_path), list[int]()

    def save(kept: Checkpoint) -> None:
        nonlocal now_s
        now_s += save_s
        calls.append(int(kept.state["next_round"]))

    def a_round() -> bool:
        nonlocal now_s
        now_s += round_s
        return False

    monkeypatch.setattr(store, "save", save)
    slow = SimpleNamespace(started=lambda: None, played=lambda outcome: a_round())
    tiny.run(slow, SaveCheckpoint(store, tiny.runner, tiny.metrics, 0, 60.0))
    assert calls == saved


def test_a_checkpoint_is_due_each_minute_unless_the_job_says_otherwise() -> None:
    said = {"": 60.0, "model.mapped": 0.0}
    for key, seconds in said.items():
        assert make_job("fedmezo", {key: True} if key else {}).config.checkpoint_s == seconds
    assert make_job("fedmezo", {"model.mapped": True, "results.checkpoint_s": 5.0}).config.checkpoint_s == 5.0
    assert make_job("fedmezo", {"results.checkpoint_s": 0.0}).config.checkpoint_s == 0.0


def play(folder: Path, *, resume: bool = False, force: bool = False) -> int:
    job = make_job("cooperllm", CHANGES | {"run.target_accuracy": 0.3, "model.trainable": "head"})
    execution = execute.Execution(Loopback(), Memory())
    return execution(lambda _: job, execute.Options(folder, resume, force))


class _NoThreads(Loopback):
    takes_threads = False


def test_a_library_without_threads_is_the_users_to_mend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job("cooperllm", CHANGES | {"comm.progress": "thread"})
    assert execute.Execution(_NoThreads(), Memory())(lambda _: job, execute.Options(tmp_path)) == EXIT_USER
    assert "comm.progress: found 'thread'" in capsys.readouterr().err


@pytest.mark.usefixtures("own_run")
def test_a_signal_stops_a_run_at_a_round_and_resume_ends_in_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert play(tmp_path / "straight") == EXIT_OK
    (path,) = (tmp_path / "straight" / "runs").glob("*.h5")
    assert capsys.readouterr().out == f"{path}\n"

    played = SaveCheckpoint.played

    def kill_after_two(self: SaveCheckpoint, outcome: Any) -> bool:
        if outcome.number == 1:
            signal.raise_signal(signal.SIGUSR2)
        return played(self, outcome)

    with monkeypatch.context() as patch:
        patch.setattr(SaveCheckpoint, "played", kill_after_two)
        assert play(tmp_path / "stopped") == EXIT_STOPPED
    told = capsys.readouterr()
    assert told.out == ""
    assert "stopped after round 2; go on with --resume" in told.err
    assert not list((tmp_path / "stopped").rglob("*.lock"))
    assert not list((tmp_path / "stopped").rglob("*.h5"))

    buffers: list[set[object]] = []
    run = Runner.run

    def look_and_run(self: Runner, *arguments: Any) -> str:
        buffers.append({slot[1] for slot in self.star._mail._buffers})  # type: ignore[attr-defined]
        return run(self, *arguments)

    monkeypatch.setattr(Runner, "run", look_and_run)
    assert play(tmp_path / "stopped", resume=True) == EXIT_OK
    assert buffers == [set()], "what a resume brought is held twice"
    (resumed,) = (tmp_path / "stopped" / "runs").glob("*.h5")
    told = capsys.readouterr()
    assert told.out == f"{resumed}\n"
    assert "resumed after round 2" in told.err
    assert "another surrounding" not in told.err
    assert not (tmp_path / "stopped" / "ckpt").exists()
    left, right = (reader.read(file) for file in (path, resumed))
    varying = {"round_s_median", "unaccounted_fraction"}
    assert left.summary.model_dump(exclude=varying) == right.summary.model_dump(exclude=varying)
    for name in set(left.rounds) - TIMES:
        np.testing.assert_array_equal(left.rounds[name], right.rounds[name], err_msg=name)


@pytest.mark.usefixtures("own_run")
def test_resume_without_a_checkpoint_starts_fresh_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert play(tmp_path, resume=True) == EXIT_OK
    assert "no checkpoint to resume from; starting fresh" in capsys.readouterr().err
