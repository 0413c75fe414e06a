"""A sweep on disk: `DIR/manifest.jsonl`, one run a line, and where each run's files lie.

A line holds the whole resolved config, so that it determines its run even after the job file or a default has
changed. A manifest is written once and never edited; its line numbers are the task numbers of the sweep. Its hash lies
beside it, in the form of sha256sum, and is compared whenever it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbench.base import config, fsio, identity
from fedbench.base.errors import ConfigError

if TYPE_CHECKING:  # the state of a sweep is asked often, and what builds a run takes seconds to import
    from fedbench.run.build import Job
    from fedbench.run.execute import Options

NAME = "manifest.jsonl"
HASH_NAME = "manifest.sha256"


@dataclass(frozen=True)
class Line:
    """One planned run: `overrides` maps dotted keys to the values laid over the job, `config` is the resolved whole."""

    number: int
    run_id: str
    overrides: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.config["method"]["name"])

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config["run"]["seed"])

    @property
    def ranks(self) -> int:
        """Processes of the run."""
        return int(self.config["run"]["ranks"])

    @property
    def threads(self) -> int:
        """Threads of a process."""
        return int(self.config["run"]["threads"])

    def job(self, source: str = NAME) -> Job:
        """Return the job to run; ConfigError where this version of fedbench makes another run of the line."""
        from fedbench.run.build import resolve

        job = resolve(config.check(as_job_file(self.config), source=source), source)
        if job.run_id != self.run_id:
            raise ConfigError(
                f"{source}: this version of fedbench makes {job.run_id} of the line of {self.run_id}: its keys or "
                f"defaults have changed. Make the sweep anew in another folder."
            )
        return job

    def text(self) -> str:
        """Return the line as compact JSON."""
        return identity.canonical_json(
            {
                "run_id": self.run_id,
                "method": self.method,
                "seed": self.seed,
                "ranks": self.ranks,
                "overrides": dict(self.overrides),
                "config": dict(self.config),
            }
        )


@dataclass(frozen=True)
class Sweep:
    """A folder and its planned runs, in line order."""

    folder: Path
    lines: tuple[Line, ...]

    def options(self, line: Line) -> Options:
        """Return what the run is started with: it goes on from a checkpoint where there is one."""
        from fedbench.run.execute import Options

        return Options(self.folder, resume=self.has_checkpoint(line))

    def run_words(self, line: Line) -> list[str]:
        """Return the words of `fedbench` that run a line in processes of its own, its job file written."""
        job = self.folder / "jobs" / f"{line.run_id}.json"
        fsio.write_text(job, identity.canonical_json(as_job_file(line.config)))
        resume = ["--resume"] if self.has_checkpoint(line) else []
        return ["run", str(job), "-n", str(line.ranks), "--results", str(self.folder), *resume]

    def run_file(self, line: Line) -> Path:
        """Return where the run's file goes."""
        return self.folder / "runs" / f"{line.run_id}.h5"

    def has_checkpoint(self, line: Line) -> bool:
        """Return whether the run can go on from a checkpoint."""
        return (self.folder / "ckpt" / line.run_id / "LATEST").exists()

    def log(self, line: Line) -> Path:
        """Return where everything goes that the run prints."""
        return self.folder / "logs" / f"{line.number}-{line.run_id}.log"


def as_job_file(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resolved config in the form of a job file, the method's settings in a table of its name."""
    method = tree["method"]
    return {**tree, "method": {"name": method["name"], method["name"]: dict(method["settings"])}}


def write(folder: Path, lines: Iterable[Line]) -> Sweep:
    """Put a manifest and its hash into `folder`; one that is there already must be the same (ConfigError)."""
    sweep = Sweep(folder, tuple(lines))
    content = "".join(f"{line.text()}\n" for line in sweep.lines).encode()
    path = folder / NAME
    there = path.exists()
    if there and path.read_bytes() != content:
        raise ConfigError(
            f"{path}: there is a manifest of another sweep, and a manifest is never changed. Allowed: the same "
            f"sweep again, or another --out."
        )
    fsio.write_text(folder / HASH_NAME, f"{hashlib.sha256(content).hexdigest()}  {NAME}\n")
    if not there:
        fsio.write_bytes(path, content)
    return sweep


def read(folder: Path) -> Sweep:
    """Return the sweep in `folder`; ConfigError where there is none or a line is not as it was written."""
    path, texts = folder / NAME, _texts(folder)
    return Sweep(folder, tuple(_line(number, text, f"{path} line {number}") for number, text in enumerate(texts)))


def read_line(folder: Path, number: int) -> Line:
    """Return one line of the sweep in `folder`; ConfigError where there is no such line, or it was changed."""
    path, texts = folder / NAME, _texts(folder)
    if not 0 <= number < len(texts):
        raise ConfigError(f"{path}: has no line {number}; allowed: 0 to {len(texts) - 1}.")
    return _line(number, texts[number], f"{path} line {number}")


def sha256(folder: Path) -> str:
    """Return the hex SHA-256 of the manifest in `folder`."""
    return hashlib.sha256((folder / NAME).read_bytes()).hexdigest()


def _texts(folder: Path) -> list[str]:
    """Return the lines; ConfigError where the manifest is not the one whose hash lies beside it."""
    path = folder / NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such sweep; `fedbench sweep make` makes one.") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error}.") from None
    found, made = hashlib.sha256(content).hexdigest(), _made(folder)
    if found != made:
        raise ConfigError(
            f"{path}: not as it was made: its SHA-256 is {found}, {HASH_NAME} has {made}. A manifest is never edited."
        )
    return content.decode("utf-8", "replace").removesuffix("\n").split("\n")


def _made(folder: Path) -> str:
    """Return the SHA-256 that the manifest had when it was made; ConfigError where that is not there."""
    path = folder / HASH_NAME
    try:
        return path.read_text(encoding="utf-8", errors="replace").partition(" ")[0]
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: missing, so whether {NAME} is as it was made is not known. The same `fedbench sweep make` writes "
            f"it again; so does `sha256sum {NAME} > {HASH_NAME}` there."
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error}.") from None


def _line(number: int, text: str, where: str) -> Line:
    try:
        tree = json.loads(text)
        for key, form in (("run_id", str), ("overrides", dict), ("config", dict)):
            if not isinstance(tree[key], form):
                raise TypeError(f"{key}: found {tree[key]!r}")
        line = Line(number, tree["run_id"], tree["overrides"], tree["config"])
        named = identity.run_id(line.config)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: no line of a manifest ({error}).") from None
    if named != line.run_id:
        raise ConfigError(f"{where}: names {line.run_id}, its config gives {named}; manifests are not edited.")
    return line
