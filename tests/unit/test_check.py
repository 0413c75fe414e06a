"""`fedbench check`: verdicts of fit and unfit machines, each unfit one made by hand; nothing is left in the results folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sys
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedbench.__main__ import main
from fedbench.base import fsio
from fedbench.base.errors import EXIT_FAILURE, EXIT_OK, FedbenchError, WireError
from fedbench.bench import check, fit, fit_disk, fit_host, fit_slurm, fit_world, ranks
from fedbench.bench.fit import Row
from fedbench.run import launch


def by_name(rows: list[Row]) -> dict[str, Row]:
    """Return rows by the name of their check; every row that is not ok says what to do."""
    assert all(bool(row.advice) == (row.verdict != "ok") for row in rows)
    return {row.check: row for row in rows}


def found(**changes: Any) -> dict[str, Any]:
    """Return what two ranks on two hosts find of each other, all well."""
    pair = {"peer": 1, "host": "b", "latency_s": 2e-6, "bytes_per_s": 5e9, "transfer_s": 0.01}
    good = {"ranks": 2, "hosts": ["a", "b"], "cores_of_ranks": [4, 4], "gpus_of_ranks": [0, 0], "library": "Some MPI"}
    good |= {"thread_level": "MPI_THREAD_MULTIPLE", "takes_threads": True}
    good["pairs"] = [pair | {"overlap": 0.9, "overlap_silent": 0.1}]
    return good | changes


def with_pair(**changes: Any) -> dict[str, Any]:
    """Return the same with one measurement of the pair changed."""
    tree = found()
    return tree | {"pairs": [tree["pairs"][0] | changes]}


def test_a_good_folder_is_fit_and_left_as_it_was(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "new" / "deep"):
        rows = by_name(fit_disk.rows(folder))
        assert {row.verdict for name, row in rows.items() if name != "free space"} == {"ok"}
        assert set(rows) == {"replace + fsync", "locks", "free space", "file time stamps"}
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_not_be_written_fails_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file" / "results", Path("/proc/fedbench"), Path("/sys/kernel")):
        (row,) = fit_disk.rows(folder)
        assert (row.verdict, str(folder) in row.value) == ("fail", True)
        assert "--results" in row.advice


def refuses(error: int) -> Any:
    """Return a function that always raises OSError."""

    def refuse(*_: Any) -> None:
        raise OSError(error, os.strerror(error))

    return refuse


#: What is broken -> (where, name, stand-in, the row that tells, verdict)
DISK_FAULTS: dict[str, tuple[Any, str, Any, str, str]] = {
    "read-only": (fsio, "write_bytes", refuses(errno.EROFS), "results folder", "fail"),
    "full": (fsio, "write_bytes", refuses(errno.ENOSPC), "results folder", "fail"),
    "stale reads": (Path, "read_bytes", lambda _: b"old", "replace + fsync", "fail"),
    "no locks": (fcntl, "flock", refuses(errno.ENOLCK), "locks", "warn"),
    "locks without effect": (fcntl, "flock", lambda *_: None, "locks", "warn"),
    "no room": (shutil, "disk_usage", lambda _: SimpleNamespace(free=1000), "free space", "fail"),
    "little room": (shutil, "disk_usage", lambda _: SimpleNamespace(free=2**29), "free space", "warn"),
    "another clock": (time, "time", lambda: 1e9, "file time stamps", "warn"),
}


@pytest.mark.parametrize("fault", DISK_FAULTS)
def test_a_broken_file_system_is_told(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, stand_in, check_, verdict = DISK_FAULTS[fault]
    monkeypatch.setattr(where, name, stand_in)
    rows = by_name(fit_disk.rows(tmp_path))
    assert rows[check_].verdict == verdict


#: What ranks found -> (what it is, the row that tells, its verdict)
WORLDS: list[tuple[dict[str, Any], str, str]] = [
    (found(ranks=1), "world", "fail"),
    (found(takes_threads=False, thread_level="MPI_THREAD_SERIALIZED"), "thread level", "warn"),
    (found(cores_of_ranks=[4, 1]), "cores of a rank", "warn"),
    (found(gpus_of_ranks=[1, 0]), "GPU of a rank", "warn"),
    (found(gpus_of_ranks=[0, 2]), "GPU of a rank", "ok"),
    (with_pair(latency_s=0.01), "ping-pong", "warn"),
    (with_pair(bytes_per_s=1e6), "ping-pong", "warn"),
    (with_pair(overlap=0.1), "overlap", "warn"),
    (with_pair(overlap=0.1) | {"hosts": ["a", "a"]}, "overlap", "ok"),
]


def test_verdicts_on_a_world_are_those_of_its_worst_part() -> None:
    assert {row.verdict for row in fit_world.rows(found(), 2, 2)} == {"ok"}
    for tree, name, verdict in WORLDS:
        assert by_name(fit_world.rows(tree, 2, 2))[name].verdict == verdict, name


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that alone is on PATH, for made-up commands of Slurm."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def command(folder: Path, name: str, said: str, code: int = 0) -> None:
    """Put a command there that prints some lines and ends with a code."""
    path = folder / name
    path.write_text(f"#!/bin/sh\ncase \"$1\" in --mpi=*|show) printf '%s\\n' '{said}';; esac\nexit {code}\n")
    path.chmod(0o755)


CONFIG = "SLURM_VERSION          = 22.05.8\nMaxArraySize            = {}\nMpiDefault              = none"


def test_slurm_is_absent_silent_or_told_with_its_limits(slurm: Path) -> None:
    assert [row.verdict for row in fit_slurm.rows()] == ["ok"]
    command(slurm, "sbatch", "")
    assert [row.verdict for row in fit_slurm.rows()] == ["warn"]  # no scontrol
    command(slurm, "scontrol", "no answer", code=1)
    assert [row.verdict for row in fit_slurm.rows()] == ["warn"]
    for size, plugins, verdicts in (
        (1001, "MPI plugin types are...\n\tpmi2\n\tpmix_v4\n\tpmix", ["ok", "ok"]),
        (1001, "MPI plugin types are...\n\tnone", ["ok", "warn"]),
        (1, "MPI plugin types are...\n\tpmi2", ["warn", "ok"]),
    ):
        command(slurm, "scontrol", CONFIG.format(size))
        command(slurm, "srun", plugins)
        rows = fit_slurm.rows()
        assert [row.verdict for row in rows] == verdicts
        assert f"22.05.8: MaxArraySize {size}" in rows[0].value


def test_packages_are_compared_with_what_is_asked_for_and_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit_host.unmet() == []
    numpy = metadata.version("numpy")
    asked = ["numpy>=999", "fedbench-nothing>=1", "rich", 'fedbench-extra; extra == "text"']
    monkeypatch.setattr(metadata, "requires", lambda _: asked)
    assert fit_host.unmet() == [f"numpy {numpy} (needs >=999)", "fedbench-nothing absent (needs >=1)"]
    assert by_name(fit_host.rows(1, 1))["versions"].verdict == "fail"
    pins = tmp_path / "constraints.txt"
    pins.write_text(f"# pins\nnumpy=={numpy}\nrich==0.0.1\nfedbench-nothing==1\n")
    assert fit_host.unlike(pins) == [f"rich {metadata.version('rich')} (tested: 0.0.1)"]
    assert fit_host.unlike(tmp_path / "none") == []


#: What is wrong with a host -> (where, name, stand-in, the row that tells)
HOST_FAULTS: dict[str, tuple[Any, str, Any, str]] = {
    "no cores": (os, "sched_getaffinity", lambda _: {0}, "cores"),
    "no memory": (fit_host, "available_bytes", lambda: 1000, "memory"),
    "no time server": (fit_host, "synchronised", lambda: False, "time of day"),
    "full shared memory": (shutil, "disk_usage", lambda _: SimpleNamespace(free=1000), "shared memory"),
}


@pytest.mark.parametrize("fault", HOST_FAULTS)
def test_a_short_host_is_a_warning(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, stand_in, row = HOST_FAULTS[fault]
    monkeypatch.setattr(where, name, stand_in)
    assert by_name(fit_host.rows(2, 1))[row].verdict == "warn"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher, and a world that answers at once."""
    for name in launch.SIZE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ranks, "measured", lambda module, options: found(hosts=["a", "a"]))


@pytest.mark.usefixtures("small")
def test_the_exit_code_says_whether_the_machine_is_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--results", str(tmp_path), "--json"]) == EXIT_OK
    told = json.loads(capsys.readouterr().out)
    assert told["fit"]
    assert {tuple(row) for row in told["rows"]} == {Row._fields}
    (tmp_path / "file").write_text("x")
    assert main(["check", "--results", str(tmp_path / "file" / "x"), "--json"]) == EXIT_FAILURE
    assert not json.loads(capsys.readouterr().out)["fit"]
    assert main(["check", "--results", str(tmp_path / "file" / "x")]) == EXIT_FAILURE
    assert "fail results folder: name another folder by --results" in capsys.readouterr().out
    assert main(["check", "--results", str(tmp_path), "-n", "1", "--json"]) == EXIT_OK
    row = json.loads(capsys.readouterr().out)["rows"][0]
    assert (row["verdict"], row["advice"]) == ("warn", "start 2 or more: -n 2")


def test_what_is_the_same_everywhere_is_one_number() -> None:
    rows_ = by_name(fit_world.rows(found(gpus_of_ranks=[1, 1]), 2, 2))
    assert (rows_["cores of a rank"].value, rows_["GPU of a rank"].value) == ("4", "1 seen by a rank")
    assert by_name(fit_world.rows(found(cores_of_ranks=[4, 2]), 2, 2))["cores of a rank"].value == "2 to 4"


def test_a_folder_of_data_sets_that_is_not_there_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for named, verdict in ((str(tmp_path), "ok"), ("", "ok"), (str(tmp_path / "gone"), "warn")):
        monkeypatch.setenv("FEDBENCH_DATA", named)
        row = by_name(fit_host.rows(1, 1))["data sets"]
        assert row.verdict == verdict
        assert named in row.value


def mute_world(*_: Any) -> None:
    """Fail as ranks do whose MPI can't start: the reason is on stderr alone."""
    sys.stderr.writelines(["\n", "-----\n", "*** No component pml of that name\n", "*** on a NULL communicator\n"])
    raise FedbenchError("bench: the ranks of fit_world ended with status 1 and left no numbers.")


@pytest.mark.usefixtures("small")
def test_a_world_that_fails_under_its_own_launcher_has_mpis_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ranks, "measured", mute_world)
    assert main(["check", "--results", str(tmp_path), "--json"]) == EXIT_FAILURE
    told = capsys.readouterr()
    world = json.loads(told.out)["rows"][0]
    assert world["value"].endswith("status 1 and left no numbers. *** No component pml of that name")
    assert "OMPI_MCA_*" in world["advice"]
    assert "pip install" not in world["advice"]
    assert "*** on a NULL communicator" in told.err


@pytest.mark.usefixtures("small")
def test_ranks_of_a_launcher_write_no_colours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(["check", "--results", str(tmp_path)]) == EXIT_OK
    assert "\x1b[" in capsys.readouterr().out
    monkeypatch.setenv(launch.SIZE_VARIABLES[0], "2")
    assert main(["check", "--results", str(tmp_path)]) == EXIT_OK
    assert "\x1b[" not in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_a_missing_launcher_and_a_broken_world_are_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise WireError("the world has 1 rank(s), expected 2.")

    with monkeypatch.context() as patch:
        patch.setattr(ranks, "measured", broken)
        assert main(["check", "--results", str(tmp_path)]) == EXIT_FAILURE
        assert "fail world: the launcher is there, but its ranks became no world" in capsys.readouterr().out
        patch.setenv(launch.SIZE_VARIABLES[0], "2")
        assert main(["check", "--results", str(tmp_path)]) == EXIT_FAILURE
        assert "fail world: use the launcher of the MPI library" in capsys.readouterr().out
    alone = tmp_path / "bin" / "python"  # an interpreter without an mpirun beside it
    alone.parent.mkdir()
    alone.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(alone))
    assert main(["check", "--results", str(tmp_path), "--json"]) == EXIT_FAILURE
    told = json.loads(capsys.readouterr().out)
    assert "there is no mpirun beside python" in told["rows"][0]["value"]
    assert told["rows"][0]["advice"].startswith("pip install 'fedbench[mpi]'")
    assert fit.is_fit([Row(**row) for row in told["rows"][1:]])


def test_a_world_that_does_not_end_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    for name in launch.SIZE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "kill", lambda pid, number: asked.append(number))
    with check._ended_after(0.01):
        end = time.monotonic() + 10
        while not asked and time.monotonic() < end:
            time.sleep(0.005)
    assert asked
