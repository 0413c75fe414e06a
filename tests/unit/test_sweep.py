"""Sweeps: what a manifest holds, that only what is not done runs, and that a worker's runs are those of a fresh process."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sweep_files

from fedbench.__main__ import main
from fedbench.base import identity
from fedbench.base.errors import EXIT_FAILURE, EXIT_OK, EXIT_STOPPED, EXIT_USER, ConfigError
from fedbench.batch import done, failures, grid, lanes, local, lock, manifest, sweep
from fedbench.batch.grid import Factor
from fedbench.batch.lanes import Outcome
from fedbench.batch.manifest import Line, Sweep
from fedbench.results import reader

SMALL_PROCESS = str(Path(__file__).with_name("small_process.py"))

JOB = """
[run]
rounds = 2
eval_every = 100
seed = 5
[federation]
devices = 3
batch_size = 2
[data]
public_per_class = 4
[method]
name = "fedmezo"
[method.fedmezo]
lr = 0.0022
"""


@pytest.fixture(scope="module", autouse=True)
def _small_workers() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr(lanes, "WORKER", (SMALL_PROCESS,))
    patch.delenv("FEDBENCH_DATA", raising=False)
    yield
    patch.undo()


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(JOB)
    return path


GRIDS: list[tuple[str, list[Any]]] = [
    ("run.rounds=10,20", [10, 20]),
    ("method.lr=x0.46, x1,x2.2e1", [Factor(0.46), Factor(1.0), Factor(22.0)]),
    ('data.label_words=["a, b", "c"],["d"]', [["a, b", "c"], ["d"]]),
    ("data.private=trec,'a,b'", ["trec", "a,b"]),
    ('data.public="x2",xy', ["x2", "xy"]),
    ("run.stop_at_target=true", [True]),
    ("data.template={text}, it was {mask}", ["{text}", "it was {mask}"]),
]


@pytest.mark.parametrize(("text", "values"), GRIDS)
def test_a_grid_is_toml_values_words_and_factors(text: str, values: list[Any]) -> None:
    key = text.partition("=")[0]
    assert grid.parse_grid(text) == [{key: value} for value in values]


@pytest.mark.parametrize("text", ["run.rounds", "=1", "run..rounds=1", "run.rounds=", "run.rounds=1,,2"])
def test_what_is_no_grid_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--grid .*expected key=v1,v2"):
        grid.parse_grid(text)


def test_a_product_varies_the_last_grid_fastest_and_no_key_twice() -> None:
    arms = grid.product(grid.parse_grid("a=1,2"), grid.parse_grid("b=3,4"))
    assert arms == [{"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4}]
    with pytest.raises(ConfigError, match="a: varied twice"):
        grid.product(grid.parse_grid("a=1"), grid.parse_grid("a=2"))


def test_a_file_of_arms_has_dotted_and_nested_keys_and_factors(tmp_path: Path) -> None:
    path = tmp_path / "arms.toml"
    path.write_text('[[arm]]\n"run.rounds" = 3\n[arm.method]\nlr = "x2"\n[[arm]]\nmethod.name = "fedavg"\n')
    assert grid.read_arms(path) == [{"run.rounds": 3, "method.lr": Factor(2.0)}, {"method.name": "fedavg"}]


def values(lines: tuple[Line, ...], *keys: str) -> list[tuple[Any, ...]]:
    """Return the overrides of lines under some keys."""
    return [tuple(line.overrides.get(key) for key in keys) for line in lines]


def test_one_grid_serves_several_methods_by_multiples_of_their_own_step_sizes(job: Path) -> None:
    arms = grid.product(grid.parse_grid("method.name=fedmezo,fedavg"), grid.parse_grid("method.lr=x0.46,x1"))
    lines = sweep.plan(job, arms, [5, 6], None, {"method.fedavg.lr": 0.3, "run.rounds": 4})
    found = values(lines, "run.seed", "method.fedmezo.lr")[:4], values(lines, "run.seed", "method.fedavg.lr")[4:]
    assert found == (
        [(5, 0.001), (6, 0.001), (5, 0.0022), (6, 0.0022)],
        [(5, 0.14), (6, 0.14), (5, 0.3), (6, 0.3)],
    )
    assert [line.number for line in lines] == list(range(8))
    assert [line.method for line in lines] == ["fedmezo"] * 4 + ["fedavg"] * 4
    assert {line.config["run"]["rounds"] for line in lines} == {4}
    assert lines[0].config["method"]["settings"]["lr"] == 0.001
    whole = sweep.plan(job, [{"run.rounds": Factor(2.6)}], [], 3, {})
    assert values(whole, "run.rounds", "run.ranks") == [(5, 3)]
    assert whole[0].ranks == 3


#: arm -> what the error says beside it
BAD_ARMS: list[tuple[dict[str, Any], list[str]]] = [
    ({"zo.epsilon": -1.0}, ["zo.epsilon: found -1.0", "job.toml with zo.epsilon=-1.0"]),
    ({"zo.epsilom": 1.0}, ["zo.epsilom: unknown key", "Nearest: zo.epsilon"]),
    ({"method.lrr": 1.0}, ["method.fedmezo.lrr: unknown key", "Nearest: method.fedmezo.lr"]),
    ({"method.name": "fedmez"}, ["method.name: found 'fedmez'", "Nearest: fedmezo"]),
    ({"model.name": Factor(2.0)}, ["model.name: found x2; only a number can be multiplied", "'embedded'"]),
    ({"run.sed": Factor(2.0)}, ["run.sed: found x2", "no such key"]),
    ({"run.seed.x": 1}, ["run.seed.x: seed is a value, not a table", "run.seed.x=1"]),
    ({"run.seed": 4}, ["run.seed: varied twice"]),
]


@pytest.mark.parametrize(("arm", "parts"), BAD_ARMS, ids=lambda value: str(value)[:30])
def test_every_line_is_checked_and_the_error_names_the_grid_value(
    job: Path, tmp_path: Path, arm: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        sweep.make(job, [{}, arm], [0], None, tmp_path / "out")
    for part in parts:
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_manifest_is_never_changed_and_a_line_outlives_its_job_file(job: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = sweep.make(job, [{}, {"method.name": "fedavg"}], [0, 1], None, out)
    text = (out / manifest.NAME).read_text()
    assert sweep.make(job, [{}, {"method.name": "fedavg"}], [0, 1], None, out) == made
    with pytest.raises(ConfigError, match="a manifest is never changed"):
        sweep.make(job, [{}], [0, 1], None, out)
    assert (out / manifest.NAME).read_text() == text
    assert (out / "job.toml").read_text() == JOB
    job.unlink()
    (out / "job.toml").unlink()
    read = manifest.read(out)
    assert [(line.run_id, line.job().run_id) for line in read.lines] == [(line.run_id,) * 2 for line in made.lines]
    assert [json.loads(line)["seed"] for line in text.splitlines()] == [0, 1, 0, 1]
    replace(out, text.replace('"lr":0.0022', '"lr":0.0023'))
    with pytest.raises(ConfigError, match=r"line 0: names fedmezo-\w+, its config gives fedmezo-"):
        manifest.read(out)


def replace(out: Path, text: str) -> None:
    """Put another manifest and its hash in place of those of a sweep."""
    (out / manifest.NAME).write_text(text)
    (out / manifest.HASH_NAME).write_text(f"{manifest.sha256(out)}  {manifest.NAME}\n")


CUTS = {"its first line": lambda lines: lines[1:], "its last line": lambda lines: lines[:-1], "all lines": lambda _: []}


@pytest.mark.parametrize("what", CUTS)
def test_a_manifest_without_a_line_that_it_had_is_refused(job: Path, tmp_path: Path, what: str) -> None:
    """All line numbers, and with them the logs of Slurm's tasks, would tell of other runs."""
    out = tmp_path / "out"
    swept = sweep.make(job, [{}], [0, 1, 2], None, out)
    path = out / manifest.NAME
    whole = path.read_text()
    path.write_text("".join(CUTS[what](whole.splitlines(keepends=True))))
    for read in (lambda: manifest.read(out), lambda: manifest.read_line(out, 0)):
        with pytest.raises(
            ConfigError, match=r"manifest.jsonl: not as it was made: its SHA-256 is \w+, manifest.sha256"
        ):
            read()
    path.write_text(whole)
    assert manifest.read(out) == swept


def test_a_sweep_without_a_hash_is_given_one_by_the_same_make(job: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    swept = sweep.make(job, [{}], [0, 1], None, out)
    (out / manifest.HASH_NAME).unlink()
    with pytest.raises(ConfigError, match=r"manifest.sha256: missing.*sha256sum manifest.jsonl > manifest.sha256"):
        manifest.read(out)
    sweep.make(job, [{}], [0, 1], None, out)
    assert manifest.read(out) == swept
    told = subprocess.run(["sha256sum", manifest.NAME], cwd=out, capture_output=True, text=True, check=True).stdout
    assert (out / manifest.HASH_NAME).read_text() == told


@pytest.mark.parametrize(("key", "value"), [("overrides", 3), ("config", 3), ("config", []), ("run_id", 3)])
def test_a_line_of_another_form_is_refused(job: Path, tmp_path: Path, key: str, value: Any) -> None:
    out = tmp_path / "out"
    sweep.make(job, [{}], [0], None, out)
    tree = json.loads((out / manifest.NAME).read_text())
    replace(out, json.dumps({**tree, key: value}) + "\n")
    with pytest.raises(ConfigError, match=rf"line 0: no line of a manifest \({key}: found "):
        manifest.read(out)


def test_a_value_may_hold_what_else_ends_lines(job: Path, tmp_path: Path) -> None:
    arms = [{"data.template": f"{{text}} it{end}was {{mask}}"} for end in ("\u2028", "\x85", "\r", "\x1c")]
    swept = sweep.make(job, arms, [0], None, tmp_path / "out")
    assert manifest.read(swept.folder) == swept
    assert manifest.read_line(swept.folder, 3) == swept.lines[3]


CLI: list[tuple[list[str], list[str]]] = [
    (["sweep"], ["SUB_VERB"]),
    (["sweep", "mak"], ["sweep 'mak' is no verb", "make, submit, status, collect, tune", "Nearest: make."]),
    (["sweep", "make", "job.toml"], ["--out"]),
    (["sweep", "make", "none.toml", "--out", "out"], ["none.toml: no such job file"]),
    (["sweep", "make", "job.toml", "--grid", "x", "--out", "out"], ["--grid x: expected key=v1,v2"]),
    (["sweep", "make", "job.toml", "--seeds", "0", "--out", "out"], ["--seeds", "found '0'"]),
    (
        ["sweep", "make", "job.toml", "--grid", "run.seed=1,2", "--seeds", "2", "--out", "out"],
        ["run.seed: varied twice"],
    ),
    (["sweep", "make", "job.toml", "--grid", "run.ranks=1,2", "-n", "2", "--out", "out"], ["run.ranks: varied twice"]),
    (
        ["sweep", "make", "job.toml", "--grid", "zo.epsilon=1,-1", "--out", "out"],
        ["zo.epsilon: found -1", "zo.epsilon=-1"],
    ),
    (["sweep", "make", "job.toml", "--grid-file", "no.toml", "--out", "out"], ["no.toml: no such file"]),
    (["sweep", "make", "job.toml", "--out", "job.toml"], ["--out job.toml: job.toml is a file; allowed: a folder"]),
    (["sweep", "make", "job.toml", "--out", "job.toml/x", "--dry-run"], ["--out job.toml/x: job.toml is a file"]),
    (["sweep", "make", "job.toml", "--set", "run.seed=true", "--out", "out"], ["run.seed: found True; allowed"]),
    (["sweep", "make", "job.toml", "--grid-file", "job.toml", "--out", "out"], ["unknown key run. Allowed: [[arm]]"]),
    (["sweep", "submit", "out", "--local"], ["out/manifest.jsonl: no such sweep", "sweep make"]),
    (["sweep", "submit", "made"], ["no such command, so there is no Slurm here", "--local"]),
    (["sweep", "submit", "made", "--site", "none.env"], ["--site none.env: can't be read"]),
    (["sweep", "submit", "made", "--local", "--time", "1"], ["--time: found beside --local"]),
    (["sweep", "submit", "made", "--local", "--parallel", "0"], ["found '0'"]),
    (["sweep", "status", "out"], ["no such sweep"]),
    (["sweep", "collect", "out"], ["no such sweep"]),
    (["sweep", "tune", "out"], ["no such sweep"]),
    (["sweep", "tune", "made"], ["missing", "sweep submit made --local"]),
    (["sweep", "tune", "made", "--by", "luck"], ["'luck'", "accuracy", "loss"]),
]


@pytest.mark.parametrize(("words", "parts"), CLI, ids=lambda value: " ".join(value)[:50])
def test_wrong_words_are_one_line_and_exit_2(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], parts: list[str]
) -> None:
    monkeypatch.chdir(job.parent)
    monkeypatch.setenv("PATH", "/nowhere")
    sweep.make(job, [{}], [0], None, Path("made"))
    try:
        code = main(words)
    except SystemExit as left:
        code = int(str(left.code))
    told = capsys.readouterr()
    assert (code, told.out, told.err.count("\n")) == (EXIT_USER, "", 1), told.err
    for part in parts:
        assert part in told.err
    assert not Path("out").exists()


@pytest.mark.parametrize("verb", ["", "make", "submit", "status", "collect", "tune"])
def test_every_sub_verb_has_help_with_an_example(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["sweep", *verb.split(), "--help"])
    assert f"example:\n  fedbench sweep {verb}" in capsys.readouterr().out


def test_make_says_what_is_named_twice_and_a_dry_run_writes_nothing(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sweep", "make", str(job), "--grid", "method.fedavg.lr=1,2", "--seeds", "2", "--out", str(tmp_path / "o")]
    assert main([*words, "--dry-run"]) == EXIT_OK
    told = capsys.readouterr()
    assert told.out == ""
    assert "4 combinations name 2 different runs" in told.err
    assert "2 run(s) would go to" in told.err
    assert not (tmp_path / "o").exists()
    assert main(words) == EXIT_OK
    assert capsys.readouterr().out == f"{tmp_path / 'o' / manifest.NAME}\n"
    assert [line.seed for line in manifest.read(tmp_path / "o").lines] == [5, 6]
    assert main(["sweep", "submit", str(tmp_path / "o"), "--local", "--dry-run"]) == EXIT_OK
    assert "2 of 2 run(s) would start" in capsys.readouterr().err
    assert not (tmp_path / "o" / "logs").exists()


def fresh_run(folder: Path, line: Line) -> str:
    """Return the trajectory's hash of a line that `fedbench run` runs in a process of its own."""
    job = folder / "line.json"
    job.write_text(json.dumps(manifest.as_job_file(line.config)))
    words = [sys.executable, SMALL_PROCESS, "run", str(job), "--results", str(folder / "fresh")]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode == 0, ran.stderr
    return reader.read(Path(ran.stdout.strip())).summary.trajectory_sha256


class Seen:
    """What a progress was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def planned(self, runs: int) -> None:
        self.runs = runs

    def started(self, line: Line) -> None:
        self.told.append(("started", line.number))

    def ended(self, outcome: Outcome) -> None:
        self.told.append((outcome.state, outcome.line.number))


ARMS: list[dict[str, Any]] = [
    {"method.name": "cooperllm", "zo.distribution": "gaussian"},
    {"method.lr": 1e20},
    {"run.seed": 8},
    {"method.name": "fedavg", "model.trainable": "lora"},
    {"run.seed": 7},
]


def test_one_lane_runs_all_lines_though_one_diverges_and_one_kills_its_worker(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swept = sweep.make(job, ARMS, [], None, tmp_path / "out")
    (swept.folder / "die").write_text(swept.lines[2].run_id)
    seen = Seen()
    results = local.run_local(swept, 1, seen)
    assert seen.told == [
        (word, number)
        for number, state in enumerate(["done", "diverged", "failed", "done", "done"])
        for word in ("started", state)
    ]
    assert (seen.runs, results.stopped) == (5, False)
    assert [(o.line.number, o.reason) for o in results.failed] == [(2, "ended by SIGKILL")]
    counted = sweep.status(swept)
    counts = {state: counted[state] for state in ("planned", *sweep.STATES)}
    assert counts == {"planned": 5, "done": 3, "running": 0, "queued": 0, "diverged": 1, "failed": 1} | {
        "resumable": 0,
        "missing": 0,
    }
    assert "not a finite number" in counted["runs"][1]["reason"]
    assert [line.number for line in sweep.to_run(swept)] == [2]
    assert [line.number for line in sweep.to_run(swept, retry=True)] == [1, 2]
    before = [reader.read(swept.run_file(swept.lines[i])).provenance["runs_before"] for i in (0, 3, 4)]
    assert before == [0, 0, 1], "a new worker follows the one that was killed"
    done = reader.read(swept.run_file(swept.lines[4])).summary
    assert done.trajectory_sha256 == fresh_run(tmp_path, swept.lines[4])
    assert "dev accuracy" in swept.log(swept.lines[4]).read_text()

    written = swept.run_file(swept.lines[0]).stat().st_mtime_ns
    assert main(["sweep", "submit", str(swept.folder), "--local"]) == EXIT_OK
    told = capsys.readouterr()
    assert "1 of 1" in told.err
    assert "5 planned, 4 done, 0 running, 0 queued, 1 diverged" in told.err
    assert swept.run_file(swept.lines[0]).stat().st_mtime_ns == written
    assert main(["sweep", "status", str(swept.folder), "--json"]) == EXIT_OK
    assert json.loads(capsys.readouterr().out) == sweep.status(swept)
    assert main(["sweep", "status", str(swept.folder)]) == EXIT_OK
    assert f"{swept.lines[1].run_id}  diverged: " in capsys.readouterr().out


def wait_for(words: str, log: Path) -> None:
    """Return when a log has some words; fail after a minute without them."""
    end = time.monotonic() + 60
    while not (log.exists() and words in log.read_text()):
        assert time.monotonic() < end, f"{log} never said {words!r}"
        time.sleep(0.05)


def test_a_signal_stops_resumably_and_the_next_submit_goes_on(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swept = sweep.make(job, [{"run.rounds": 80}], [], None, tmp_path / "out")
    line = swept.lines[0]
    before = signal.getsignal(signal.SIGINT)  # ignored where a shell runs the tests in its background
    said: list[dict[str, Any]] = []

    def interrupt() -> None:
        wait_for("start, dev", swept.log(line))
        said.append(sweep.status(swept))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert main(["sweep", "submit", str(swept.folder), "--local"]) == EXIT_STOPPED
    assert said[0]["running"] == 1
    assert [run["state"] for run in sweep.status(swept)["runs"]] == ["resumable"]
    assert "the same command goes on" in capsys.readouterr().err
    stopped = swept.log(line).read_text()
    assert "stopped after round" in stopped
    assert swept.options(line).resume
    assert signal.getsignal(signal.SIGINT) is before
    assert main(["sweep", "submit", str(swept.folder), "--local"]) == EXIT_OK
    assert sweep.status(swept)["done"] == 1
    assert swept.log(line).read_text().count("round 80 of 80") == 1


def test_a_killed_submit_leaves_resumable_runs(job: Path, tmp_path: Path) -> None:
    swept = sweep.make(job, [{"run.rounds": 400}], [], None, tmp_path / "out")
    line = swept.lines[0]
    submit = [sys.executable, SMALL_PROCESS, "sweep", "submit", str(swept.folder), "--local"]
    with subprocess.Popen(submit, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for("start, dev", swept.log(line))
        process.kill()
    wait_for("stopped after round", swept.log(line))
    assert [run["state"] for run in sweep.status(swept)["runs"]] == ["resumable"]


def test_a_failure_that_is_no_result_makes_submit_fail_and_is_tried_again(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    swept = sweep.make(job, [{"model.name": "no/where/here"}], [], None, tmp_path / "out")
    line = swept.lines[0]
    assert main(["sweep", "submit", str(swept.folder), "--local"]) == EXIT_FAILURE
    assert f"{line.run_id} failed: model.name = 'no/where/here': no folder" in capsys.readouterr().err
    assert [failure.kind for failure in failures.read(swept.folder).values()] == [failures.FAILED]
    assert sweep.to_run(swept) == [line]
    monkeypatch.setattr(lanes, "WORKER_BYTES", 1)
    lane = lanes.Lane(swept)
    assert lane.run(line).state == failures.FAILED
    assert lane._child is None, "a worker that has grown is kept"


def test_one_submit_at_a_time(job: Path, tmp_path: Path) -> None:
    swept = sweep.make(job, [{}], [], None, tmp_path / "out")
    with lock.held(swept.folder), pytest.raises(ConfigError, match="another submit is at work"):
        local.run_local(swept, 1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_process_at_a_time_is_at_a_run_whoever_started_it(job: Path, tmp_path: Path, ranks: int) -> None:
    swept = sweep.make(job, [{"run.ranks": ranks}], [], None, tmp_path / "out")
    (line,) = swept.lines
    with lock.lease(swept.folder, line.run_id) as lease:
        assert lease is not None
        assert sweep.status(swept)["running"] == 1
        assert sweep.to_run(swept) == []
        lane = lanes.Lane(swept)
        assert lane.run(line)[:3] == (line, "running", "another process is at it")
        lane.close()
        child = subprocess.Popen(["sleep", "600"], pass_fds=(lease,))
    assert sweep.status(swept)["running"] == 1, "the lease did not live as long as the run"
    child.kill()
    child.wait()
    assert sweep.status(swept)["running"] == 0
    assert not swept.run_file(line).exists()
    with lock.lease(swept.folder, line.run_id) as lease:
        assert lease is not None
    assert not list((swept.folder / "leases").iterdir()), "what nobody holds any more was left"


def test_where_files_can_not_be_locked_everyone_goes_without(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept = sweep.make(job, [{}], [], None, tmp_path / "out")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock.held(swept.folder), lock.lease(swept.folder, swept.lines[0].run_id) as lease:
        assert lease is not None
        assert sweep.status(swept)["running"] == 0


def test_a_sweep_that_was_sent_to_slurm_is_known_by_its_leases_where_there_is_no_slurm(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    swept = sweep.make(job, [{}], [], None, tmp_path / "out")
    monkeypatch.setenv("PATH", "/nowhere")
    (swept.folder / "slurm").mkdir()
    with lock.lease(swept.folder, swept.lines[0].run_id):
        assert main(["sweep", "status", str(swept.folder)]) == EXIT_OK
        told = capsys.readouterr()
        assert "1 running" in told.out
        assert told.err.count("what waits or runs in Slurm is not known here") == told.err.count("\n") == 1
        assert sweep.to_run(swept) == []


def test_a_run_that_ends_during_the_look_is_done_and_a_damaged_file_is_told_before_an_older_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept = sweep_files.finished(tmp_path)
    ends, damaged, _ = swept.lines
    path = swept.run_file(ends)
    path.rename(tmp_path / "whole")

    def in_queue(_: Sweep) -> dict[int, Any]:
        """It is in the queue no more, and its file is there only now."""
        (tmp_path / "whole").rename(path)
        return {}

    monkeypatch.setattr(sweep.arrays, "in_queue", in_queue)
    failures.add(swept.folder, failures.Failure(damaged.run_id, failures.FAILED, "an old reason", time.time()))
    swept.run_file(damaged).write_bytes(b"torn")
    found = sweep.states(swept)
    assert [at.state for at in found] == ["done", "missing", "done"]
    assert "old reason" not in found[1].reason
    assert found[1].reason


NO_FAILURES = [
    '{"run_id":[1]}',
    '{"run_id":"b","at":"x"}',
    '{"run_id":"c","reason":1}',
    '{"run_id":"d","kind":"x"}',
    "7",
]


def test_a_failure_is_read_as_it_was_written_and_a_damaged_one_is_left_out(tmp_path: Path) -> None:
    kept = failures.Failure("a", failures.FAILED, "line\u2028break", 3.0)
    failures.add(tmp_path, kept)
    with (tmp_path / failures.NAME).open("a") as handle:
        for text in NO_FAILURES:
            whole = {"kind": "failed", "reason": "r", "at": 1.0}
            given = json.loads(text)
            handle.write(json.dumps({**whole, **given} if isinstance(given, dict) else given) + "\n")
    assert failures.read(tmp_path) == {"a": kept}


#: Delivers INT at the first import of a module that a verb needs.
INTERRUPTED = """
import builtins, sys
from fedbench.__main__ import main
own = builtins.__import__
def interrupting(name, *more, **named):
    if name.startswith("rich"):
        raise KeyboardInterrupt
    return own(name, *more, **named)
builtins.__import__ = interrupting
sys.exit(main(sys.argv[1:]))
"""


def test_an_interrupt_before_anything_runs_is_one_line(job: Path, tmp_path: Path) -> None:
    swept = sweep.make(job, [{}], [], None, tmp_path / "out")
    words = [sys.executable, "-c", INTERRUPTED, "sweep", "submit", str(swept.folder), "--local"]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    assert (ran.returncode, ran.stderr) == (EXIT_STOPPED, "fedbench: stopped by INT; the same command goes on.\n")


RULE = "-" * 74 + "\n"
BANNER = f"{RULE}prterun noticed that process rank 1 with PID 7 on node h exited on\nsignal 9 (Killed).\n{RULE}"

#: what was printed, exit code -> kind and reason
LOGS: list[tuple[str, int, tuple[str, str]]] = [
    ("", 3, ("failed", "ended with status 3")),
    ("fedbench: the memory is not enough: x.\n", 1, ("failed", "the memory is not enough: x.")),
    ("a\nTraceback\n  x\nValueError: y\n", 1, ("failed", "ValueError: y")),
    ("fedbench: rank 1 of 2 on h, round 3: NumericsError: nan.\nfedbench: rank 0 left\n", 1, ("diverged", "nan.")),
    ("fedbench: NumericsError: nan.\n", 1, ("diverged", "nan.")),
    ("fedbench: starting fresh.\na: round 3 of 9\n", -9, ("failed", "ended by SIGKILL")),
    (f"fedbench: starting fresh.\na: round 3 of 9\n{BANNER}", 137, ("failed", "rank 1 on h exited on signal 9")),
    (f"{RULE}the cause\n{RULE}", 1, ("failed", "the cause")),
    (RULE, 4, ("failed", "ended with status 4")),
]


@pytest.mark.parametrize(("text", "code", "found"), LOGS)
def test_what_a_log_says_of_a_failure(text: str, code: int, found: tuple[str, str]) -> None:
    assert failures.of_log(text, code) == found


def test_lanes_fill_the_cores_with_the_widest_run(job: Path) -> None:
    cores = len(os.sched_getaffinity(0))

    def width(arm: dict[str, Any]) -> int:
        return local.lanes_for(sweep.plan(job, [arm], [], None, {}))

    assert width({}) == cores
    assert width({"run.ranks": cores, "run.threads": 2}) == 1
    assert local.lanes_for(()) == cores


LINES = 10_000


def test_the_state_of_ten_thousand_lines_is_told_in_two_seconds_of_one_core(job: Path, tmp_path: Path) -> None:
    """Half the lines have run files that an earlier status found done; processor time, since other tests run beside."""
    (first,) = sweep.plan(job, [{}], [0], None, {})
    lines = []
    for number in range(LINES):
        config = {**first.config, "run": {**first.config["run"], "seed": number}}
        lines.append(Line(number, identity.run_id(config), {"run.seed": number}, config))
    swept = manifest.write(tmp_path / "out", lines)
    (swept.folder / "runs").mkdir()
    stamps = {}
    for line in swept.lines[::2]:
        swept.run_file(line).write_bytes(b"run")
        stat = swept.run_file(line).stat()
        stamps[line.run_id] = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    (swept.folder / done.NAME).write_text(json.dumps(stamps))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [sys.executable, "-m", "fedbench", "sweep", "status", str(swept.folder)]
    told = subprocess.run(words, capture_output=True, text=True, timeout=100, check=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert told.startswith(f"{LINES} planned, {LINES // 2} done, 0 running")
    spent_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent_s < 2.0, f"{spent_s:.2f} s"
