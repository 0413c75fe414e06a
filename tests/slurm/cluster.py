"""A real Slurm for tests: skipped with a reason where none is up, failed under FEDBENCH_REQUIRE_SLURM=1.

Runs have few rows to evaluate and a quarter of a second of sleep in every round of the first rank, so that there is
time to strike while they run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedbench.batch import arrays
from fedbench.results import reader

HERE = Path(__file__).parent
INJECT = HERE.parent / "faults" / "inject"
REQUIRE_VARIABLE = "FEDBENCH_REQUIRE_SLURM"
DEADLINE_S = 300.0

JOB = """
[run]
rounds = 40
eval_every = 1000
seed = 5
[federation]
devices = 4
batch_size = 2
[data]
public_per_class = 4
[method]
name = "fedmezo"
"""

#: The fault of a run that shall last; see tests/faults/inject.
PACED = "pause:0:rounds"

_FOREIGN = ("OMPI_", "PMI_", "PMIX_", "PRTE_", "SLURM_", "FEDBENCH_FAULT", "FEDBENCH_SLURM", "FEDBENCH_DATA")
_SMALL = {"PYTHONPATH": os.pathsep.join([str(INJECT), str(HERE.parents[1])]), "FEDBENCH_FAULT_SMALL": "1"}
_sent: list[str] = []


def require() -> None:
    """Skip the test where no Slurm is up; fail it where one must be."""
    checked = subprocess.run([HERE / "slurm_up.sh", "--check"], capture_output=True, text=True, check=False)
    if checked.returncode != 0:
        reason = f"no Slurm is up ({checked.stdout.strip()}); tests/slurm/slurm_up.sh makes one, as root on Debian"
        if os.environ.get(REQUIRE_VARIABLE) == "1":
            pytest.fail(f"{reason} ({REQUIRE_VARIABLE}=1)")
        pytest.skip(reason)


def fedbench(
    *words: str | Path,
    folder: Path,
    python: str = sys.executable,
    small: bool = True,
    fault: str = PACED,
    deadline_s: float = DEADLINE_S,
) -> str:
    """Run a command line of fedbench in `folder` and return all that it prints; it must succeed.

    `small`: with few rows to evaluate and a fault of the campaign's, by default sleep in every round.
    """
    ran = subprocess.run(
        [python, "-m", "fedbench", *map(str, words)],
        cwd=folder,
        env=_environment(_SMALL | {"FEDBENCH_FAULT": fault} if small else {}),
        capture_output=True,
        text=True,
        timeout=deadline_s,
        check=False,
    )
    assert ran.returncode == 0, f"{words}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout + ran.stderr


def single(folder: Path) -> str:
    """Send single.sbatch with JOB on two ranks and return the job's number; it prints to where `log` looks."""
    (folder / "logs").mkdir()
    (folder / "job.toml").write_text(JOB)
    options = ["--parsable", "-n", "2", "--time=10", f"--output={folder}/logs/slurm-0-0.log"]
    ran = subprocess.run(
        ["sbatch", *options, arrays.SCRIPTS / "single.sbatch", "job.toml", "--results", "results"],
        cwd=folder,
        env=_environment(_SMALL | {"FEDBENCH_FAULT": PACED, "FEDBENCH_PYTHON": sys.executable}),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    _sent.append(ran.stdout.strip())
    return _sent[-1]


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
    return {**inherited, **more, "OMP_NUM_THREADS": "1"}


def make(folder: Path, name: str, *words: str, python: str = sys.executable) -> Path:
    """Return the folder of a new sweep of JOB, two ranks a run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.toml").write_text(JOB)
    fedbench("sweep", "make", "job.toml", "-n", "2", *words, "--out", name, folder=folder, python=python)
    return folder / name


def status(sweep: Path) -> dict[str, Any]:
    """Return what `sweep status --json` says."""
    ran = subprocess.run(
        [sys.executable, "-m", "fedbench", "sweep", "status", str(sweep), "--json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return dict(json.loads(ran.stdout))


def array_of(told: str) -> str:
    """Return the number of the one array that a submit sent, and remember what it sent."""
    _sent.extend(re.findall(r"job (\d+)", told))
    (job,) = re.findall(r"job (\d+): \d+ run\(s\)", told)
    return str(job)


def log(sweep: Path, line: int) -> str:
    """Return what the tasks of a line printed so far."""
    path = sweep / "logs" / f"slurm-0-{line}.log"
    return path.read_text() if path.exists() else ""


def slurm(*words: str) -> str:
    """Run a command of Slurm's and return what it prints."""
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout


def limit(job: str, *, minutes: int) -> None:
    """Give a job another time limit; the smallest that Slurm knows is a minute."""
    slurm("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")


def until(true: Callable[[], object], what: str, sweep: Path, deadline_s: float = DEADLINE_S) -> None:
    """Wait until `true()`; fail with the sweep's logs where it takes too long."""
    end = time.monotonic() + deadline_s
    while not true():
        if time.monotonic() > end:
            logs = "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(sweep.glob("logs/*")))
            pytest.fail(f"never came to this: {what}\n{slurm('squeue', '--array')}\n{logs}")
        time.sleep(0.5)


def cancel_all() -> None:
    """Cancel what tests sent and left behind."""
    subprocess.run(["scancel", "--quiet", *_sent], check=False, timeout=60)


def over(job: str) -> bool:
    """Return whether nothing of an array waits or runs."""
    return not [row for row in slurm("squeue", "-h", "-r", "-o", "%F").split() if row == job]


def trajectories(path: Path) -> dict[str, str]:
    """Return run_id -> trajectory of what a sweep collected."""
    return {run.summary.run_id: run.summary.trajectory_sha256 for run in reader.read_all(path)}


def by_hand(folder: Path, config: Mapping[str, Any], name: str) -> str:
    """Return the trajectory of the same run made by hand: one process, no sweep, no Slurm, no pauses."""
    method = config["method"]
    tree = {**config, "method": {"name": method["name"], method["name"]: method["settings"]}}
    (folder / f"{name}.json").write_text(json.dumps(tree))
    fedbench("run", f"{name}.json", "-n", "1", "--results", f"hand-{name}", folder=folder, fault="")
    (path,) = (folder / f"hand-{name}" / "runs").glob("*.h5")
    return reader.read(path).summary.trajectory_sha256


def configs(sweep: Path) -> dict[str, dict[str, Any]]:
    """Return run_id -> config of a sweep's lines, in line order."""
    lines = map(json.loads, (sweep / "manifest.jsonl").read_text().splitlines())
    return {line["run_id"]: line["config"] for line in lines}
