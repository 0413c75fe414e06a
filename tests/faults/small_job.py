"""The tiny job of the fault tests, and the environment that injects a fault into it."""

from __future__ import annotations

from pathlib import Path

INJECT = Path(__file__).with_name("inject")

#: From the fault to the end of the last process.
FAULT_DEADLINE_S = 10.0

ROUNDS = 3
TEXT = """
[run]
rounds = {rounds}
seed = 5
[federation]
devices = 4
batch_size = 2
[comm]
deadline_s = {deadline_s}
[method]
name = "{method}"
"""


def write_job(folder: Path, rounds: int = ROUNDS, deadline_s: float = 60.0, method: str = "fedmezo") -> Path:
    """Write the job file and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.toml"
    path.write_text(TEXT.format(rounds=rounds, deadline_s=deadline_s, method=method), encoding="utf-8")
    return path


def faulty(kind: str | None = None, rank: int = 0, place: str = "round", mark: Path | None = None) -> dict[str, str]:
    """Return the environment that makes `rank` misbehave; without `kind` only the evaluation splits are made small."""
    environment = {"PYTHONPATH": str(INJECT), "FEDBENCH_FAULT_SMALL": "1"}
    if kind is not None:
        environment["FEDBENCH_FAULT"] = f"{kind}:{rank}:{place}"
    if mark is not None:
        environment["FEDBENCH_FAULT_MARK"] = str(mark)
    return environment


def strikes(mark: Path) -> int:
    """Return how often the fault has struck so far."""
    return len(mark.read_text().splitlines()) if mark.exists() else 0


def run_files(folder: Path) -> list[Path]:
    """Return everything in the place of run files, temporaries included."""
    runs = folder / "runs"
    return sorted(path for path in runs.rglob("*") if path.is_file()) if runs.is_dir() else []
