"""What a run finds in its results folder before its first round and leaves there: everything else than damage to files."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tinyruns import make_job, never, shrunk

from fedbench.__main__ import main
from fedbench.base import fsio, provenance
from fedbench.base.errors import EXIT_FAILURE, EXIT_OK, EXIT_STOPPED, EXIT_USER, ResultError, StorageError
from fedbench.base.records import Run
from fedbench.comm.loopback import Loopback
from fedbench.results import reader, seal, writer
from fedbench.run import execute, launch, supervise
from fedbench.run.build import Built, Job, construct
from fedbench.run.callbacks.checkpoint import SaveCheckpoint
from fedbench.run.ckpt import Checkpoint, Store
from fedbench.run.claim import claimed
from fedbench.run.memory import Memory
from fedbench.run.runner import Runner

SMALL = {"run.rounds": 4, "run.eval_every": 1, "model.trainable": "head", "federation.devices": 2}
STOPPING = SMALL | {"run.target_accuracy": 0.01, "run.stop_at_target": True}

pytestmark = pytest.mark.usefixtures("own_run")


def play(folder: Path, *, resume: bool = False, force: bool = False, **changes: Any) -> int:
    """Return the exit code of a run, as one process of it sees it."""
    job = make_job("fedmezo", SMALL | changes)
    execution, transport = execute.Execution(Loopback(), Memory()), Loopback()
    return launch.guard(transport, lambda: execution(lambda _: job, execute.Options(folder, resume, force)), str)


def stopped(folder: Path, after: int = 2) -> Path:
    """Stop a run after some rounds and return the folder of its checkpoint."""
    played = SaveCheckpoint.played

    def stop(self: SaveCheckpoint, outcome: Any) -> bool:
        if outcome.number + 1 == after:
            signal.raise_signal(signal.SIGUSR2)
        return played(self, outcome)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SaveCheckpoint, "played", stop)
        assert play(folder) == EXIT_STOPPED
    (latest,) = (folder / "ckpt").glob("*/LATEST")
    return latest.parent


def run_of(folder: Path) -> Run:
    (path,) = (folder / "runs").glob("*.h5")
    return reader.read(path)


def run_file(folder: Path, **changes: Any) -> Path:
    return execute.Options(folder).run_file(make_job("fedmezo", SMALL | changes))


@pytest.mark.parametrize("every", [0, 1])
def test_a_target_that_was_reached_stays_reached_after_a_resume(
    every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last write fails: all rounds are in a checkpoint, whether one was due or not."""
    assert play(tmp_path / "straight", **STOPPING) == EXIT_OK

    def no_room(path: Path, run: Run) -> None:
        raise StorageError(f"{path}: can't be written: injected.")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write", no_room)
        assert play(tmp_path / "again", **STOPPING, **{"results.checkpoint_every": every}) == EXIT_FAILURE
    assert "all rounds are in a checkpoint; go on with --resume" in capsys.readouterr().err
    monkeypatch.setattr(Runner, "play", never)
    assert play(tmp_path / "again", resume=True, **STOPPING, **{"results.checkpoint_every": every}) == EXIT_OK
    left, right = (run_of(tmp_path / name).summary for name in ("straight", "again"))
    varying = {"round_s_median", "unaccounted_fraction"}
    assert left.model_dump(exclude=varying) == right.model_dump(exclude=varying)
    assert (right.rounds, right.stop_reason) == (1, "target")


def other_data(built: Built) -> Built:
    return replace(built, splits=replace(built.splits, source=built.splits.source | {"train_sha256": "0" * 64}))


def other_start(built: Built) -> Built:
    built.trainable.tensors[0].flat[3] += 1
    return built


def other_body(built: Built) -> Built:
    trained = {id(parameter) for parameter in built.trainable.parameters}
    frozen = next(p for p in built.cut.parameters() if id(p) not in trained)
    with torch.no_grad():
        frozen.view(-1)[0] += 1
    return built


@pytest.mark.parametrize(
    ("change", "told"),
    [(other_data, "data.train_sha256"), (other_start, "weights.trainable"), (other_body, "weights.frozen")],
)
def test_a_checkpoint_of_other_data_or_weights_is_refused(
    change: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = stopped(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(execute, "construct", lambda job: change(shrunk(construct(job), 16)))
    assert play(tmp_path, resume=True) == EXIT_USER
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{place}: the checkpoint was made from other data or weights ({told}: found " in line
    assert (place / "LATEST").exists()


def test_the_provenance_tells_every_segment_and_a_resume_what_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(provenance, "cpu_model", lambda: "another one")
    assert play(tmp_path, resume=True) == EXIT_OK
    told = capsys.readouterr().err.splitlines()
    assert (
        sum("it goes on in another surrounding than it began in: cpu: found another one, before" in x for x in told)
        == 1
    )
    found = run_of(tmp_path).provenance
    first, second = found["segments"]
    assert [(s["first_round"], s["last_round"]) for s in (first, second)] == [(0, 1), (2, 3)]
    assert (found["started"], found["ended"]) == (first["started"], second["ended"])
    assert (first["cpu"] != "another one", second["cpu"]) == (True, "another one")
    assert {"host", "commit", "packages", "python"} <= first.keys()


def rewritten(place: Path, change: Any) -> None:
    """Change the newest checkpoint as another version of fedbench would have written it."""
    name = (place / "LATEST").read_text()
    head = json.loads((place / f"{name}.json").read_text())["head"]
    store = Store(place, head["config_sha256"], print)
    store.inputs = head["inputs"]
    found = store.newest()
    assert found is not None
    store.save(change(Checkpoint(dict(found.arrays), dict(found.state))))


def without_weights(found: Checkpoint) -> Checkpoint:
    return Checkpoint({k: v for k, v in found.arrays.items() if not k.startswith("weights/")}, found.state)


OTHERS = {
    "no weights": without_weights,
    "more weights": lambda found: Checkpoint(
        found.arrays | {"weights/x": next(iter(found.arrays.values()))}, found.state
    ),
    "shorter weights": lambda found: Checkpoint(
        {k: v[:-1] if k.startswith("weights/") else v for k, v in found.arrays.items()}, found.state
    ),
    "no traffic": lambda found: Checkpoint(
        {k: v for k, v in found.arrays.items() if not k.startswith("traffic/")}, found.state
    ),
    "no rows": lambda found: Checkpoint(found.arrays, found.state | {"metrics": {}}),
    "no trajectory": lambda found: Checkpoint(
        found.arrays, {k: v for k, v in found.state.items() if k != "trajectory"}
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_version_is_refused_in_one_line(
    other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = stopped(tmp_path)
    rewritten(place, OTHERS[other])
    capsys.readouterr()
    assert play(tmp_path, resume=True) == EXIT_USER
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{place}: the checkpoint does not fit: another version of fedbench made it" in line


def test_a_second_process_at_a_run_is_refused_and_takes_nothing_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = execute.Options(tmp_path).lock(make_job("fedmezo", SMALL))
    temporary = run_file(tmp_path).with_name(f".{run_file(tmp_path).name}.0badf00d.tmp")
    temporary.parent.mkdir()
    temporary.touch()
    with claimed(lock) as sole:
        assert sole
        assert play(tmp_path) == EXIT_USER
        assert temporary.exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"another process is at {lock.stem} (pid " in line
    assert not lock.exists()
    assert play(tmp_path) == EXIT_OK
    assert not temporary.exists()


def test_the_lock_of_a_killed_process_blocks_nobody(tmp_path: Path) -> None:
    lock = tmp_path / "ckpt" / "x.lock"
    holding = (
        "import sys, time; from pathlib import Path; from fedbench.run.claim import claimed\n"
        "with claimed(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", holding, str(lock)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ResultError, match=rf"another process is at x \(pid {holder.pid} on "), claimed(lock):
            never()
        holder.kill()
    assert lock.exists()
    with claimed(lock) as sole:
        assert sole
    assert not lock.parent.exists()


def test_a_run_goes_without_a_lock_where_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.lock").mkdir()
    with claimed(tmp_path / "x.lock") as sole:
        assert not sole


@pytest.mark.parametrize("name", ["runs", "ckpt", "."])
def test_a_results_folder_that_can_not_be_written_is_told_before_the_first_round(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Runner, "run", never)
    results = tmp_path / "results"
    blocked = results / name
    blocked.parent.mkdir(exist_ok=True)
    blocked.touch()
    assert play(results) == EXIT_USER
    (line,) = capsys.readouterr().err.splitlines()
    assert "can't be written: Not a directory" in line
    assert str(results) in line


def test_a_dry_run_finds_a_results_folder_that_can_not_be_written_and_makes_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, blocked = tmp_path / "job.toml", tmp_path / "blocked"
    job.write_text('[run]\nrounds = 2\n[method]\nname = "fedmezo"\n')
    blocked.touch()
    assert main(["run", str(job), "--dry-run", "--results", str(blocked)]) == EXIT_USER
    assert "can't be written: Not a directory" in capsys.readouterr().err
    assert main(["run", str(job), "--dry-run", "--results", str(tmp_path / "new")]) == EXIT_OK
    assert not (tmp_path / "new").exists()


def test_what_a_kill_left_of_a_run_that_is_done_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Store, "clear", lambda self: None)
        assert play(tmp_path, **{"results.checkpoint_every": 1, "results.save_weights": True}) == EXIT_OK
    path = run_file(tmp_path)
    for target in (path, tmp_path / "weights" / f"{path.stem}.safetensors", tmp_path / "ckpt" / path.stem / "a.json"):
        target.with_name(f".{target.name}.0badf00d.tmp").touch()
    assert play(tmp_path) == EXIT_OK
    left = sorted(str(found.relative_to(tmp_path)) for found in tmp_path.rglob("*") if found.is_file())
    assert left == [f"runs/{path.name}", f"weights/{path.stem}.safetensors"]
    assert not (tmp_path / "ckpt").exists()


def a_job() -> Job:
    return make_job("fedmezo", SMALL)


def test_a_run_file_that_can_not_be_opened_now_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert play(tmp_path) == EXIT_OK
    for error in (OSError(errno.EMFILE, "Too many open files"), OSError(errno.ESTALE, "Stale"), MemoryError()):

        def unread(_: Path, error: BaseException = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(seal, "check", unread)
            with pytest.raises(ResultError, match=r"can't be read: .*Move it away, or write over it with --force"):
                execute.already_done(a_job(), execute.Options(tmp_path))
    assert execute.already_done(a_job(), execute.Options(tmp_path))


def test_a_run_file_of_another_schema_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert play(tmp_path) == EXIT_OK
    monkeypatch.setattr(reader, "SCHEMA_VERSION", 99)
    with pytest.raises(ResultError, match="found schema version 2; needed: 99"):
        execute.already_done(a_job(), execute.Options(tmp_path))
    assert run_file(tmp_path).exists()


def test_a_damaged_run_file_that_can_not_be_moved_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run_file(tmp_path)
    fsio.write_text(path, "no run")

    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(reader.os, "rename", read_only)
    told = f"{path} is not a complete run and can't be moved to {path.parent / 'bad'}: Read-only file system"
    with pytest.raises(ResultError, match=told):
        execute.already_done(a_job(), execute.Options(tmp_path))


def test_the_file_of_an_earlier_run_does_not_vouch_for_a_forced_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job.toml"
    job.write_text(
        '[run]\nrounds = 2\n[federation]\ndevices = 2\n[model]\ntrainable = "head"\n[method]\nname = "fedmezo"\n'
    )
    words = ["run", str(job), "-n", "2", "--results", str(tmp_path)]
    alone = ["run", str(job), "--set", "run.ranks=2", "--results", str(tmp_path), "--dry-run"]
    assert main(alone) == EXIT_OK
    path = Path(capsys.readouterr().err.split("  (")[0])
    assert play(tmp_path / "other") == EXIT_OK
    made = run_file(tmp_path / "other")
    monkeypatch.setattr(reader, "is_done", lambda path, run_id: path.exists())
    monkeypatch.setattr(supervise, "on_ranks", lambda *_: EXIT_OK)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(made.read_bytes())
    assert main([*words, "--force"]) == EXIT_FAILURE
    assert "there is no complete run file" in capsys.readouterr().err
    monkeypatch.setattr(supervise, "on_ranks", lambda *_: fsio.write_bytes(path, b"new") or EXIT_OK)
    assert main([*words, "--force"]) == EXIT_OK
