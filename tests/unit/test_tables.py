"""Tables over runs: the same numbers as in the files, from a sweep, a folder, an all.h5 or one file, each run once."""

from __future__ import annotations

import builtins
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sweep_files import finished
from synthetic_runs import make_codec, make_run

from fedbench.__main__ import main
from fedbench.base import records
from fedbench.base.errors import EXIT_OK, EXIT_USER, ConfigError, ResultError
from fedbench.batch import sweep
from fedbench.batch.manifest import Sweep
from fedbench.report.arms import group
from fedbench.results import Tables, open_sweep, schema, writer

pd = pytest.importorskip("pandas")


@pytest.fixture
def runs() -> list[records.Run]:
    """Three runs: two seeds of one method, one of another, with a codec table and a null."""
    return [
        make_run("fedmezo", rounds=4, seed=1, settings={"lr": 0.5, "momentum": "none"}),
        make_run("fedmezo", rounds=4, seed=0, target=None, peak=None),
        make_run("cooperllm", rounds=3, seed=0, codec=make_codec(3), settings={"lr": 0.1, "momentum": 0.9}),
    ]


@pytest.fixture
def folder(tmp_path: Path, runs: list[records.Run]) -> Path:
    for run in runs:
        writer.write(tmp_path / "s" / "runs" / f"{run.summary.run_id}.h5", run)
    return tmp_path / "s"


def test_the_numbers_are_those_of_the_files(folder: Path, runs: list[records.Run]) -> None:
    found = open_sweep(folder)
    ordered = [runs[2], runs[1], runs[0]]
    assert list(found.runs["run_id"]) == [run.summary.run_id for run in ordered]
    for row, run in zip(found.runs.to_dict("records"), ordered, strict=True):
        for name, value in run.summary.model_dump().items():
            assert np.isnan(row[name]) if value is None else row[name] == value, name
        assert row["config.run.rounds"] == run.config["run"]["rounds"]
        assert row["config.method.settings.lr"] == run.config["method"]["settings"]["lr"]
    assert found.runs.attrs["units"]["uplink_bytes"] == "B"
    for name in schema.TABLES:
        table = found.table(name)
        assert table is found.table(name)
        for run in ordered:
            own = table[table["run_id"] == run.summary.run_id]
            stored = getattr(run, name)
            assert len(own) == (next(iter(stored.values())).size if stored else 0), name
            for column, values in stored.items():
                np.testing.assert_array_equal(own[column], values.reshape(-1), f"{name}/{column}")
            assert set(own["seed"]) <= {run.summary.seed}
    assert list(found.rounds["rounds_done"][:5]) == [0, 1, 2, 3, 0]
    assert list(found.devices["round"][:9]) == [0] * 4 + [1] * 4 + [2]
    assert found.devices.attrs["units"]["loss"] == "nat"


def test_groups_and_joins_work_as_pandas_users_write_them(folder: Path) -> None:
    found = open_sweep(str(folder))
    means = found.runs.groupby("method")["final_accuracy"].mean()
    assert list(means.index) == ["cooperllm", "fedmezo"]
    joined = found.rounds.merge(found.runs[["run_id", "config.method.settings.lr"]], on="run_id")
    assert len(joined) == len(found.rounds) == 4 + 5 + 5


def test_what_is_saved_is_what_the_runs_hold_whatever_was_added(folder: Path) -> None:
    found = open_sweep(folder)
    columns = {name: list(getattr(found, name)) for name in ("runs", "rounds", "devices")}
    for name in columns:
        getattr(found, name)["mine"] = 1
    for path in found.save(folder / "tables"):
        assert list(pd.read_csv(path)) == columns[path.stem]


def test_arms_are_named_as_a_report_names_them(runs: list[records.Run]) -> None:
    more = [
        make_run("fedmezo", rounds=4, seed=1, settings={"lr": lr}, ranks=ranks) for lr, ranks in ((0.1, 1), (1e-3, 2))
    ]
    more += [make_run("cooperllm", rounds=3, seed=seed, public_labels="shuffled") for seed in (0, 1)]
    for some in (runs, more, [*runs, *more], [make_run("fedavg", rounds=rounds) for rounds in (3, 4)]):
        told = {run.summary.run_id: arm.label for arm in group(some) for run in arm.runs}
        found = Tables(tuple(some)).runs
        assert dict(zip(found["run_id"], found["arm"], strict=True)) == told


@pytest.fixture
def swept(tmp_path: Path) -> Sweep:
    return finished(tmp_path)


def test_sweep_folder_collection_and_file_give_the_same_runs_once(swept: Sweep, tmp_path: Path) -> None:
    whole = sweep.collect(swept)
    swept.run_file(swept.lines[0]).unlink()
    shutil.copy(swept.run_file(swept.lines[1]), swept.folder / "runs" / "a copy.h5")
    for path in (swept.folder, whole):
        assert list(open_sweep(path).runs["seed"]) == [0, 1, 2], path
    assert list(open_sweep(swept.folder / "runs").runs["seed"]) == [1, 2]
    assert list(open_sweep(swept.run_file(swept.lines[2])).runs["seed"]) == [2]


def test_what_can_not_be_read_is_left_out_with_a_warning(swept: Sweep) -> None:
    bad = swept.run_file(swept.lines[1])
    bad.write_bytes(bad.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=f"left out: .*{bad.name}.*seal"):
        found = open_sweep(swept.folder)
    assert list(found.runs["seed"]) == [0, 2]
    assert len(found.skipped) == 1
    with pytest.raises(ResultError, match="seal"):
        open_sweep(bad)
    (swept.folder / "logs").mkdir()
    with pytest.raises(ResultError, match="no finished run there"):
        open_sweep(swept.folder / "logs")


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_what_is_saved_comes_back(folder: Path, form: str) -> None:
    found = open_sweep(folder)
    paths = found.save(folder / "tables", form)  # type: ignore[arg-type]
    assert [path.name for path in paths] == [f"{name}.{form}" for name in ("runs", "rounds", "devices")]
    for path, table in zip(paths, (found.runs, found.rounds, found.devices), strict=True):
        back = pd.read_csv(path) if form == "csv" else pd.read_parquet(path)
        assert list(back) == list(table)
        empty = {"": np.nan, None: np.nan}  # CSV knows one kind of nothing
        pd.testing.assert_frame_equal(back.replace(empty), table.replace(empty), check_dtype=False)


def test_collect_exports(swept: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "collect", str(swept.folder), "--csv", "--parquet"]) == EXIT_OK
    printed = [Path(line) for line in capsys.readouterr().out.split()]
    names = ["all.h5", *(f"{name}.{form}" for form in ("csv", "parquet") for name in ("runs", "rounds", "devices"))]
    assert [path.name for path in printed] == names
    assert len(pd.read_csv(swept.folder / "runs.csv")) == 3


def test_a_missing_package_and_a_wrong_word_are_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, swept: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    found = open_sweep(folder)
    with pytest.raises(ConfigError, match="form: found 'xls'; allowed: csv, parquet"):
        found.save(folder, "xls")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="table: found 'roundz'; allowed: rounds, devices"):
        found.table("roundz")
    imported = builtins.__import__

    def without(name: str, *more: Any) -> Any:
        if name.split(".", maxsplit=1)[0] in ("pandas", "pyarrow"):
            raise ImportError(name)
        return imported(name, *more)

    for name in [name for name in sys.modules if name.split(".")[0] in ("pandas", "pyarrow")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(ConfigError, match=r"tables need pandas.*fedbench\[analysis\]"):
        _ = found.rounds
    assert main(["sweep", "collect", str(swept.folder), "--csv"]) == EXIT_USER
    assert "fedbench[analysis]" in capsys.readouterr().err
