"""Arrays, tasks and scripts against fakes on PATH: split arrays, lost jobs, refused requeues, site.env; no Slurm is needed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedbench.__main__ import main
from fedbench.base.errors import EXIT_FAILURE, EXIT_OK, EXIT_STOPPED, EXIT_USER, ConfigError
from fedbench.batch import arrays, done, local, lock, manifest, scheduler, site, sweep, task, tasklog
from fedbench.batch.manifest import Sweep
from fedbench.results import reader
from fedbench.run import supervise

FAKE = Path(__file__).with_name("fake")
INJECT = Path(__file__).parents[1] / "faults" / "inject"
JOB = '[run]\nrounds = 2\n[method]\nname = "fedmezo"\n'


class Fake:
    """The state of the fakes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def set(self, **config: Any) -> None:
        """Say how the fakes behave from now on."""
        (self.folder / "config").write_text(json.dumps(config))

    def queue(self, *jobs: list[Any]) -> None:
        """Put jobs in the queue in place of those that are there."""
        (self.folder / "queue").write_text(json.dumps(jobs))

    def calls(self, name: str) -> list[list[str]]:
        """Return the command lines of one command so far."""
        path = self.folder / "calls"
        return [call for call in json.loads(path.read_text()) if call[0] == name] if path.exists() else []

    def arrays(self) -> list[str]:
        """Return the --array of every sbatch so far, or the --dependency of one that has none."""
        return [next(w for w in call if w.startswith(("--array", "--dep"))) for call in self.calls("sbatch")]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "FEDBENCH_SLURM_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{FAKE}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path / "fake"))
    monkeypatch.chdir(tmp_path)
    return Fake(tmp_path / "fake")


def make(folder: Path, arms: list[dict[str, Any]], seeds: int = 1) -> Sweep:
    """Return a new sweep."""
    job = folder / "job.toml"
    job.write_text(JOB)
    return sweep.make(job, arms, range(seeds), None, folder / "s")


def test_a_sweep_that_is_larger_than_an_array_is_split_and_resources_come_from_the_job(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swept = make(tmp_path, [{}, {"run.ranks": 6, "run.threads": 2}], seeds=5)
    Path("site.env").write_text(
        'module load mpi\nFEDBENCH_SLURM_SBATCH="--account=me -p short" # mine\nexport FEDBENCH_SLURM_CPUS_PER_NODE=4\n'
        "FEDBENCH_SLURM_TIME=00:30:00\nFEDBENCH_SLURM_WARN_S=60\nexport FEDBENCH_DATA=/scratch/$USER\n"
    )
    fake.set(limit=4)
    assert main(["sweep", "submit", "s", "--parallel", "3", "--dry-run"]) == EXIT_OK
    told = capsys.readouterr()
    assert fake.calls("sbatch") == []
    assert "10 of 10 run(s) would be sent, in 4 array(s)" in told.err
    rows = told.out.splitlines()
    name, sha = arrays.name_of(swept), manifest.sha256(swept.folder)
    home, scripts = tmp_path.resolve() / "s", arrays.SCRIPTS
    assert rows[2] == (
        f"sbatch --parsable --job-name={name}-4 --array=1-3%3 --nodes=3 --ntasks=6 --cpus-per-task=2 --time=00:30:00 "
        f"--signal=B:USR1@60 --output={home}/logs/slurm-4-%a.log --account=me -p short {scripts}/sweep.sbatch "
        f"{sys.executable} {tmp_path.resolve()}/site.env {home} 4 {sha}"
    )
    shapes = [[w for w in row.split() if w.startswith(("--array", "--nodes", "--ntasks"))] for row in rows]
    assert shapes == [
        ["--array=0-3%3", "--nodes=1", "--ntasks=1"],
        ["--array=0%3", "--nodes=1", "--ntasks=1"],
        ["--array=1-3%3", "--nodes=3", "--ntasks=6"],
        ["--array=0-1%3", "--nodes=3", "--ntasks=6"],
        ["--ntasks=1"],
    ]
    assert (
        "--dependency=afterany:ARRAY_0:ARRAY_1:ARRAY_2:ARRAY_3,singleton --ntasks=1 --time=00:30:00 --output="
        in rows[4]
    )


def test_only_what_is_neither_done_nor_in_the_queue_is_sent_and_what_slurm_loses_is_sent_again(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swept = make(tmp_path, [{}], seeds=5)
    fake.set(lose=[3])
    assert main(["sweep", "submit", "s"]) == EXIT_OK
    assert fake.arrays() == ["--array=0-4%64", "--dependency=afterany:100,singleton"]
    assert [at.state for at in sweep.states(swept)] == ["queued", "queued", "queued", "missing", "queued"]
    assert main(["sweep", "submit", "s"]) == EXIT_OK
    assert fake.arrays()[2:3] == ["--array=3%64"]

    name = arrays.name_of(swept)
    held = [f"{name}-0", "7", 2, "PENDING", "JobHeldAdmin"]
    fake.queue([f"{name}-0", "7", 1, "RUNNING", "None"], held, ["fedbench-0123456789-0", "8", 0, "RUNNING", "None"])
    fake.set()
    capsys.readouterr()
    assert main(["sweep", "status", "s"]) == EXIT_OK
    told = capsys.readouterr().out
    assert "5 planned, 0 done, 1 running, 1 queued" in told
    assert f"2  {swept.lines[2].run_id}  queued: JobHeldAdmin" in told
    assert main(["sweep", "submit", "s"]) == EXIT_OK
    assert fake.arrays()[-2] == "--array=0,3-4%64", "another sweep's jobs were taken for this one's"
    assert [line.number for line in sweep.to_run(swept)] == [], "what a local submit would run is in the queue"


def test_a_submit_that_is_cut_short_is_put_right_by_the_next(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, [{}], seeds=5)
    fake.set(limit=2, fail=[2])
    assert main(["sweep", "submit", "s"]) == EXIT_FAILURE
    told = capsys.readouterr().err
    assert "1 of 3 array(s) were sent; the same command sends the rest" in told
    assert "sbatch failed with status 1: sbatch: error: QOSMaxSubmitJobPerUserLimit" in told
    fake.set(limit=2)
    assert main(["sweep", "submit", "s"]) == EXIT_OK
    sent = [row for row in fake.arrays() if row.startswith("--array")]
    assert sent == ["--array=0-1%64", "--array=0-1%64", "--array=0-1%64", "--array=0%64"]
    fake.set(down=True)
    capsys.readouterr()
    assert main(["sweep", "submit", "s"]) == EXIT_FAILURE, "sent without knowing what is in the queue"
    assert "Unable to contact slurm controller" in capsys.readouterr().err
    assert main(["sweep", "status", "s"]) == EXIT_OK
    assert "what waits or runs in Slurm is not known" in capsys.readouterr().err


def test_where_nothing_that_collects_is_taken_the_first_refusal_is_told_with_what_to_do(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, [{}], seeds=5)
    fake.set(limit=2, fail=[2, 3])
    assert main(["sweep", "submit", "s"]) == EXIT_FAILURE
    *_, unsent, uncollected, cause = capsys.readouterr().err.splitlines()
    assert "1 of 3 array(s) were sent" in unsent
    assert "no job collects when they have ended" in uncollected
    assert "`fedbench sweep collect s`" in uncollected
    assert "fedbench-" in uncollected, "the collector's refusal is not told"
    assert "collect.sbatch" in uncollected
    assert "sweep.sbatch" in cause
    fake.set(fail=[5])
    assert main(["sweep", "submit", "s"]) == EXIT_FAILURE
    *_, uncollected, cause = capsys.readouterr().err.splitlines()
    assert uncollected.endswith("`fedbench sweep collect s` does.")
    assert "collect.sbatch" in cause


def test_the_job_that_collects_has_the_sites_time_and_waits_for_all_arrays_of_the_sweep(
    fake: Fake, tmp_path: Path
) -> None:
    swept = make(tmp_path, [{}], seeds=3)
    name = arrays.name_of(swept)
    (swept.folder / arrays.FOLDER).mkdir()
    fake.queue([f"{name}-0", "9", 1, "RUNNING", "None"], ["fedbench-0123456789-0", "8", 0, "RUNNING", "None"])
    assert main(["sweep", "submit", "s", "--time", "30"]) == EXIT_OK
    *_, collector = fake.calls("sbatch")
    assert "--dependency=afterany:9:100,singleton" in collector
    assert "--time=30" in collector


SITES: list[tuple[str, list[str]]] = [
    ("FEDBENCH_SLURM_TIM=1", ["FEDBENCH_SLURM_TIM: unknown", "Nearest: FEDBENCH_SLURM_TIME.", "site.env"]),
    ("FEDBENCH_SLURM_WARN_S=2m", ["FEDBENCH_SLURM_WARN_S: found '2m'; allowed: a whole number"]),
    ("FEDBENCH_SLURM_THROTTLE=0", ["FEDBENCH_SLURM_THROTTLE: found 0"]),
    ("FEDBENCH_SLURM_RANK_SIGNAL=USR1", ["found 'USR1'; allowed: USR2, TERM"]),
    ('FEDBENCH_SLURM_TIME="1', ["line 1", "no assignment of the shell"]),
    (
        "FEDBENCH_SLURM_SBATCH='--comment=\"a'",
        ["FEDBENCH_SLURM_SBATCH", "no words of the shell (No closing quotation)"],
    ),
    ("FEDBENCH_SLURM_WARN_S=²", ["FEDBENCH_SLURM_WARN_S: found '²'; allowed: a whole number"]),
    ('FEDBENCH_SLURM_SBATCH="--account=$USER"', ["found '--account=$USER'", "write the value out", "site.env line 1"]),
    ("FEDBENCH_SLURM_TIME=`limit`", ["found '`limit`'", "write the value out"]),
    ("FEDBENCH_SLURM_TIME=soon", ["FEDBENCH_SLURM_TIME: found 'soon'; allowed: minutes", "site.env"]),
]


@pytest.mark.parametrize(("text", "parts"), SITES)
def test_a_wrong_site_is_one_sentence(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "site.env"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        site.read(path)
    for part in parts:
        assert part in str(error.value)


def test_assignments_end_where_the_shell_ends_them(tmp_path: Path) -> None:
    path = tmp_path / "site.env"
    path.write_text(
        "FEDBENCH_SLURM_TIME=1-10; export FOO=1 FEDBENCH_SLURM_SBATCH='-p \"a;b\"';FEDBENCH_SLURM_WARN_S=9;\n"
    )
    assert site.read(path) == site.Site(path.resolve(), sbatch=("-p", "a;b"), time="1-10", warn_s=9)


TIMES = ("nonsense", "1:2:3:4", "-5", "1-", "²", "")


@pytest.mark.parametrize("text", TIMES)
def test_a_time_that_sbatch_would_refuse_is_one_line_and_exit_2(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    make(tmp_path, [{}])
    assert main(["sweep", "submit", "s", f"--time={text}"]) == EXIT_USER
    assert f"--time: found {text!r}; allowed: minutes" in capsys.readouterr().err
    assert fake.calls("sbatch") == []


def test_the_example_names_the_defaults_and_a_job_reads_what_submit_read(tmp_path: Path) -> None:
    example = (arrays.SCRIPTS / "site.env.example").read_text()
    path = tmp_path / "site.env"
    path.write_text(example.replace("#FEDBENCH", "FEDBENCH"))
    read = site.read(path)
    assert read.sbatch == ("--account=me", "--partition=short")
    kept = ("warn_s", "throttle", "restarts", "shell_signal", "rank_signal")
    assert [getattr(read, name) for name in kept] == [getattr(site.Site(), name) for name in kept]
    assert site.of_environment({"FEDBENCH_SLURM_RESTARTS": "3", "FEDBENCH_SLURM_JOB": "x"}).restarts == 3
    path.write_text(example)
    assert site.read(path) == site.Site(file=path.resolve())


#: What the scripts were when they were last looked at, so that every change of one is seen.
STORED = sorted(Path(__file__).with_name("stored").glob("*.sbatch"))


@pytest.mark.parametrize("stored", STORED, ids=lambda path: path.name)
def test_scripts_are_short_and_as_stored(stored: Path) -> None:
    script = arrays.SCRIPTS / stored.name
    assert len(script.read_text().splitlines()) < 30
    assert script.read_text() == stored.read_text(), "run them, then copy what was changed on purpose to stored/"


def test_every_script_is_stored_and_is_in_the_folder_at_the_root() -> None:
    assert {path.name for path in arrays.SCRIPTS.glob("*.sbatch")} == {path.name for path in STORED}
    assert (Path(__file__).parents[2] / "slurm").resolve() == arrays.SCRIPTS


def test_a_sweep_goes_its_whole_way_with_a_lost_element_a_warning_and_a_requeue(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch runs the scripts here: of two elements the one that it does not lose, then the job that collects."""
    small_runs(monkeypatch)
    swept = make(tmp_path, [{"run.rounds": 12}], seeds=2)
    Path("site.env").write_text("FEDBENCH_SLURM_SHELL_SIGNAL=HUP\n")
    fake.set(run=True, lose=[0], warn=f"{swept.lines[1].run_id}: start, dev")
    assert main(["sweep", "submit", "s"]) == EXIT_OK
    logs = swept.folder / "logs"
    told = (logs / "slurm-0-1.log").read_text()
    assert "0| fedbench: task ended: stopped: requeued for restart 1" in told, told
    assert "1| fedbench: task ended: done" in told, told
    assert fake.calls("scontrol")[1:] == [["scontrol", "requeue", "100_1"]]
    collected = (logs / "slurm-collect.log").read_text()
    assert "1 of 2 run(s), 1 of them new; 1 are not done." in collected
    assert "2 planned, 1 done" in collected
    assert [run.summary.run_id for run in reader.read_all(swept.folder / "all.h5")] == [swept.lines[1].run_id]


@pytest.mark.slow  # the real Slurm has one of its own
def test_a_single_run_is_warned_requeues_itself_and_takes_its_ranks_from_the_job(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_runs(monkeypatch)
    Path("job.toml").write_text(JOB.replace("rounds = 2", "rounds = 12"))
    fake.set(run=True, warn="start, dev")
    subprocess.run(["sbatch", arrays.SCRIPTS / "single.sbatch", "job.toml", "--results", "r"], check=True)
    told = Path("fedbench-100.log").read_text()
    assert "0| fedbench: task ended: stopped: requeued for restart 1" in told, told
    assert "1| fedbench: task ended: done" in told, told
    assert fake.calls("scontrol") == [["scontrol", "requeue", "100"]]


def test_srun_whose_plugin_fits_no_library_ends_with_that_as_the_cause(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_runs(monkeypatch)
    words = ["run", "job.toml", "-n", "2", "--set", "run.launcher=srun-pmix", "--results", "r"]
    Path("job.toml").write_text(JOB)
    ran = subprocess.run([sys.executable, "-m", "fedbench", *words], capture_output=True, text=True, check=False)
    assert ran.returncode == EXIT_FAILURE, ran.stderr
    assert "the world has 1 rank(s), expected 2" in ran.stderr
    assert not list(Path("r").glob("runs/*.h5"))
    ((*call, _),) = (call[: call.index("-m")] for call in fake.calls("srun"))
    assert call == ["srun", "--mpi=pmix", "--kill-on-bad-exit=1", "--ntasks=2", "--cpus-per-task=1"]


def small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs have few rows to evaluate, and their first rank sleep in every round; the first start of Python is slow."""
    monkeypatch.setattr(scheduler, "_PATIENCE_S", 300.0)
    root = Path(task.__file__).parents[2]
    for name, value in (("SMALL", "1"), ("ALONE", "0"), ("", "pause:0:rounds")):
        monkeypatch.setenv(f"FEDBENCH_FAULT_{name}".rstrip("_"), value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(INJECT), str(root)]))
    monkeypatch.setenv("FEDBENCH_PYTHON", sys.executable)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


#: The environment of a job whose evaluation splits are small.
SMALL = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(INJECT), os.environ.get("PYTHONPATH", "")]),
    "FEDBENCH_FAULT_SMALL": "1",
    "OMP_NUM_THREADS": "1",
}

#: Runs a task that is asked to stop as soon as it has started its child.
EARLY = """
import os, signal, sys
from fedbench.batch import task
started = task.Child._started
def asked(self, *words):
    process = started(self, *words)
    os.kill(os.getpid(), signal.SIGUSR2)
    return process
task.Child._started = asked
sys.exit(task.main(sys.argv[2:]))
"""

STEP = """#!/usr/bin/env bash
echo "got $* with $SITE_WORD"
trap 'echo asked' USR2
echo ready
while :; do sleep 0.1; [ ! -e "$GO" ] || exit 85; done
"""


#: script -> its words, the environment that Slurm gives it, and the words of its task
SENT: list[tuple[str, list[str], dict[str, str], str]] = [
    ("sweep", ["STEP", "SITE", "DIR", "4", "abc"], {"SLURM_ARRAY_TASK_ID": "2"}, "sweep DIR 4 abc 2"),
    ("single", ["JOB", "--set", "a=b c"], {"SLURM_NTASKS": "3"}, "run JOB --set a=b c -n 3 --resume"),
    ("single", ["JOB"], {}, "run JOB --resume"),
]

#: What Slurm may be told to warn with, whatever site.env says of another.
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGTERM)


@pytest.mark.parametrize(("script", "words", "given", "got"), SENT)
def test_a_script_passes_every_warning_on_and_ends_with_the_status_of_its_task(
    tmp_path: Path, script: str, words: list[str], given: dict[str, str], got: str
) -> None:
    step, go, env = tmp_path / "python", tmp_path / "go", tmp_path / "site.env"
    step.write_text(STEP)
    step.chmod(0o755)
    env.write_text("SITE_WORD=sourced\nFEDBENCH_SLURM_SHELL_SIGNAL=HUP\n")
    own = {"GO": str(go), "FEDBENCH_SITE": str(env), "FEDBENCH_PYTHON": str(step), **given}
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    told = [{"STEP": str(step), "SITE": str(env)}.get(word, word) for word in words]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            ["bash", arrays.SCRIPTS / f"{script}.sbatch", *told], env={**inherited, **own}, stdout=out
        )
    try:
        for asked, number in enumerate((*WARNINGS, None)):
            end = time.monotonic() + 20
            while (said := (tmp_path / "out").read_text()).count("asked") < asked or "ready" not in said:
                assert process.poll() is None, f"ended by a signal before its task: {said}"
                assert time.monotonic() < end, f"not asked {asked} times: {said}"
                time.sleep(0.02)
            if number is not None:
                process.send_signal(number)
        assert process.poll() is None, "a signal ended the script before its task"
    finally:
        go.touch()
    assert process.wait(20) == EXIT_STOPPED
    assert said.startswith(f"got -m fedbench.batch.task {got} with sourced\n")


def test_a_ci_run_whose_slurm_comes_up_half_way_takes_it_down_again(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / ".ci" / "run"
    tools = tmp_path / "tests" / "slurm"
    tools.mkdir(parents=True)
    (tmp_path / ".ci").mkdir()
    shutil.copy(script, tmp_path / ".ci" / "run")
    for name, body in (("slurm_up", "exit 1"), ("slurm_down", "touch down")):
        (tools / f"{name}.sh").write_text(f"#!/bin/sh\n{body}\n")
        (tools / f"{name}.sh").chmod(0o755)
    ran = subprocess.run([tmp_path / ".ci" / "run"], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "no Slurm can be brought up here" in ran.stderr
    assert (tmp_path / "down").exists(), "what came up half-way was left"


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.spmd)])
@pytest.mark.parametrize("rank_signal", ["USR2", "TERM"])
def test_a_warning_before_python_is_up_is_not_lost(tmp_path: Path, rank_signal: str, ranks: int) -> None:
    """The task is asked the moment its child exists, long before that has a handler."""
    job = tmp_path / "job.toml"
    job.write_text(JOB.replace("rounds = 2", "rounds = 500\neval_every = 1000"))
    words = ["fedbench.batch.task", "run", str(job), "-n", str(ranks), "--results", str(tmp_path)]
    environment = {**SMALL, "FEDBENCH_SLURM_RANK_SIGNAL": rank_signal}
    with subprocess.Popen(
        [sys.executable, "-c", EARLY, *words], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        out, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED, out
    assert "stopped after round 1;" in out
    assert "task ended: stopped: not requeued: there is no Slurm job here" in out


def test_a_divergence_is_a_result_on_slurm_and_here(tmp_path: Path) -> None:
    swept = make(tmp_path, [{"method.lr": 1e30, "run.rounds": 4}])
    words = ["-m", "fedbench.batch.task", "sweep", str(swept.folder), "0", manifest.sha256(swept.folder), "0"]
    log = swept.folder / "logs" / "slurm-0-0.log"
    log.parent.mkdir()
    with log.open("w") as printed:
        ran = subprocess.run([sys.executable, *words], env=SMALL, stdout=printed, stderr=printed, check=False)
    on_slurm = sweep.states(swept)
    assert (ran.returncode, on_slurm[0].state) == (EXIT_FAILURE, "diverged"), log.read_text()
    assert sweep.to_run(swept) == []
    log.unlink()
    assert [outcome.state for outcome in local.run_local(swept).outcomes] == ["diverged"]
    assert sweep.states(swept) == on_slurm


class Killed(task.Child):
    """A child that is ended by SIGKILL after some progress."""

    def __init__(self) -> None:
        """No signal is handled."""

    def run(self, words: Any, run_id: str, restart: int, lease: int) -> tuple[int, list[str]]:
        return -signal.SIGKILL, ["fedbench: no checkpoint to resume from; starting fresh.\n", "a: round 3 of 9\n"]


def test_a_run_that_was_killed_is_told_as_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swept = make(tmp_path, [{}])
    found = task.of_sweep(swept.folder, 0, manifest.sha256(swept.folder), 0)
    assert task.perform(found, Killed()) == EXIT_FAILURE
    assert "task ended: failed: ended by SIGKILL\n" in capsys.readouterr().out


class Stopped(task.Child):
    """A child that stops resumably at once; with `saves` it leaves a checkpoint."""

    def __init__(self, checkpoints: Path, *, saves: bool) -> None:
        self._checkpoints, self._saves = checkpoints, saves

    def run(self, words: Any, run_id: str, restart: int, lease: int) -> tuple[int, list[str]]:
        if self._saves:
            self._checkpoints.mkdir(parents=True, exist_ok=True)
            (self._checkpoints / "new").write_text("a")
            (self._checkpoints / "new").rename(self._checkpoints / "LATEST")
        return EXIT_STOPPED, []


#: state in the queue, restart count, whether a checkpoint is written -> what the log says, whether it is requeued
REQUEUES: list[tuple[str, str, bool, str, bool]] = [
    ("RUNNING", "", True, "stopped: requeued for restart 1", True),
    ("RUNNING", "4", True, "stopped: requeued for restart 5", True),
    ("RUNNING", "16", True, "not requeued: 16 restarts are the most", False),
    ("RUNNING", "", False, "not requeued: no checkpoint is newer than this start", False),
    ("COMPLETING", "", True, "not requeued: Slurm is ending the job", False),
    ("CANCELLED", "", True, "not requeued: Slurm is ending the job", False),
]


@pytest.mark.parametrize(("state", "count", "saves", "said", "requeued"), REQUEUES)
def test_a_task_is_requeued_under_the_rule_alone_and_never_the_whole_array(
    fake: Fake,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    state: str,
    count: str,
    saves: bool,
    said: str,
    requeued: bool,
) -> None:
    swept = make(tmp_path, [{}], seeds=3)
    for key, value in (("ARRAY_JOB_ID", "70"), ("ARRAY_TASK_ID", "2"), ("JOB_ID", "70"), ("RESTART_COUNT", count)):
        monkeypatch.setenv(f"SLURM_{key}", value)
    fake.queue(["x-0", "70", 2, state, "None"])
    found = task.of_sweep(swept.folder, 0, manifest.sha256(swept.folder), 2)
    found.checkpoints.mkdir(parents=True)
    (found.checkpoints / "LATEST").write_text("a")
    assert task.perform(found, Stopped(found.checkpoints, saves=saves)) == EXIT_STOPPED
    assert said in capsys.readouterr().out
    assert fake.calls("scontrol") == ([["scontrol", "requeue", "70_2"]] if requeued else [])


#: how many calls of squeue and of scontrol fail -> what the log says at last, whether a requeue was heard
DEAF: list[tuple[int, int, str, bool]] = [
    (1, 0, "stopped: requeued for restart 1", True),
    (0, 2, "stopped: requeued for restart 1", True),
    (9, 0, "stopped: not requeued: squeue failed with status 1: squeue: error: Socket timed out", False),
    (0, 9, "stopped: not requeued: scontrol failed with status 1: scontrol: error: Socket timed out", False),
]


@pytest.mark.parametrize(("squeue", "scontrol", "said", "requeued"), DEAF)
def test_slurm_is_asked_again_where_it_has_no_answer_and_the_log_tells_how_that_ended(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squeue: int, scontrol: int, said: str, requeued: bool
) -> None:
    swept = make(tmp_path, [{}])
    monkeypatch.setattr(task, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setenv("SLURM_JOB_ID", "70")
    fake.queue(["x-0", "70", None, "RUNNING", "None"])
    fake.set(deaf={"squeue": squeue, "scontrol": scontrol})
    found = task.of_sweep(swept.folder, 0, manifest.sha256(swept.folder), 0)
    log = tmp_path / "slurm-0-0.log"
    with log.open("w") as printed, contextlib.redirect_stdout(printed):
        assert task.perform(found, Stopped(found.checkpoints, saves=True)) == EXIT_STOPPED
    ended = tasklog.end(log)
    assert f"{ended.state}: {ended.reason}".startswith(said)
    assert len(fake.calls("scontrol")) == (scontrol + 1 if requeued else min(scontrol, 3))


def test_a_task_runs_no_other_manifest_and_no_run_that_another_task_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swept = make(tmp_path, [{}], seeds=3)
    folder, sha = str(swept.folder), manifest.sha256(swept.folder)
    assert task.main(["sweep", folder, "0", "0" * 64, "1"]) == EXIT_USER
    said = "0| fedbench: task ended: failed: "
    told = capsys.readouterr().out
    assert told.startswith(said)
    assert "not the manifest that this task was submitted with; nothing is run" in told
    assert task.main(["sweep", folder, "2", sha, "1"]) == EXIT_USER
    assert "has no line 3; allowed: 0 to 2" in capsys.readouterr().out
    found = task.of_sweep(swept.folder, 0, sha, 1)
    assert found.run_id == swept.lines[1].run_id
    with lock.lease(swept.folder, found.run_id):
        assert task.perform(found, Stopped(found.checkpoints, saves=True)) == EXIT_OK
    assert "another process is at" in capsys.readouterr().err
    assert not found.checkpoints.exists()


START = "0| fedbench: task starts fedmezo-0, job 7_0 on h, restart 0\n"
LOST = "python3: No module named fedbench\n"
LOGS: list[tuple[str, tuple[str, str]]] = [
    (START + "0| fedbench: task ended: done\n", ("done", "")),
    (START + "0| x\n0| fedbench: task ended: stopped: not requeued: y\n", ("stopped", "not requeued: y")),
    (START + "0| fedbench: task ended: diverged: nan: 3\n", ("diverged", "nan: 3")),
    (START, ("failed", "killed, at its start")),
    (START + "0| fedmezo-0: round 3 of 9\n", ("failed", "killed; it last said: fedmezo-0: round 3 of 9")),
    (
        START + "0| a\nslurmstepd-h: error: *** JOB 7 ON h CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***\n",
        ("failed", "ended by Slurm: CANCELLED DUE TO TIME LIMIT; it last said: a"),
    ),
    (
        START + "0| a\nslurmstepd-h: error: *** JOB 7 ON h CANCELLED AT 2026-01-01T00:00:00 ***\n"
        "0| fedbench: task ended: failed: a\n",
        ("failed", "ended by Slurm: CANCELLED; it last said: a"),
    ),
    (START + "0| fedbench: task ended: done\n" + START.replace("0|", "1|"), ("failed", "killed, at its start")),
    ("0| fedbench: task ended: failed: not the manifest\n", ("failed", "not the manifest")),
    (LOST, ("failed", "python3: No module named fedbench")),
    (START + "0| a\n0| fedbench: task ended: failed: old\n" + LOST, ("failed", "python3: No module named fedbench")),
    (START + "0| a\n" + LOST, ("failed", "python3: No module named fedbench")),
    ("env: line 3: module: command not found\n0| fedbench: task ended: failed: b\n", ("failed", "b")),
    (START + '0| a\n/x/sweep.sbatch: line 17:  7 Killed  "$python"\n', ("failed", "killed; it last said: a")),
    ("no mark\n", ("failed", "no mark")),
    ("", ("failed", "ended before it said a word")),
]


@pytest.mark.parametrize(("text", "found"), LOGS)
def test_how_a_task_ended_by_its_log(tmp_path: Path, text: str, found: tuple[str, str]) -> None:
    path = tmp_path / "logs" / "slurm-8-3.log"
    path.parent.mkdir()
    path.write_text(text)
    assert tasklog.newest(tmp_path) == {11: path}
    assert tasklog.end(path)[:2] == found


def test_srun_is_told_to_end_all_ranks_with_one_and_a_restart_of_mpich_goes_without_shared_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    with pytest.raises(ConfigError, match=r"run\.launcher: found 'srun-pmix', but there is no srun here"):
        supervise.start_words("srun-pmix", 2, 1)
    assert supervise._for_srun("srun-pmi2") == {}
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert supervise._for_srun("srun-pmi2") == {"MPIR_CVAR_NOLOCAL": "1"}
    assert supervise._for_srun("srun-pmix") == {}


def test_a_file_that_changes_after_it_was_found_done_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept = make(tmp_path, [{}], seeds=2)
    looked: list[str] = []

    def inspect(path: Path, run_id: str) -> done.reader.Verdict:
        looked.append(run_id)
        good = path.read_text() == "good"
        return done.reader.Verdict(good, not good, "" if good else "damaged")

    monkeypatch.setattr(done.reader, "inspect", inspect)
    first, second = (swept.run_file(line) for line in swept.lines)
    first.parent.mkdir()
    first.write_text("good")
    second.write_text("good")
    ids = [line.run_id for line in swept.lines]
    for _ in range(2):
        assert set(done.DoneRuns(swept).runs) == set(ids)
    assert looked == ids
    second.write_text("evil")
    os.utime(second, ns=(1, 1))
    found = done.DoneRuns(swept)
    assert (set(found.runs), found.reasons, looked) == ({ids[0]}, {ids[1]: "damaged"}, [*ids, ids[1]])
    assert set(done.DoneRuns(swept, fresh=True).runs) == {ids[0]}
    assert looked[-2:] == ids


def test_a_task_of_another_version_of_fedbench_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept = make(tmp_path, [{}])
    words = swept.run_words(swept.lines[0])
    monkeypatch.setenv("FEDBENCH_RUN_ID", "fedmezo-000000000000")
    code = main(words)
    assert code == EXIT_USER
    assert not (swept.folder / "runs").exists()
    monkeypatch.setenv("FEDBENCH_RUN_ID", swept.lines[0].run_id)
    assert main([*words, "--dry-run"]) == EXIT_OK
