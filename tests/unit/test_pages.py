"""Pages that must stay true: every column of a real file is in docs/run_file.md, and docs/analysis.md runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import pytest
from sweep_files import JOB, finish
from synthetic_runs import make_codec, make_run

from fedbench.base.records import SCHEMA_VERSION
from fedbench.batch import sweep
from fedbench.results import Tables, writer

ROOT = Path(__file__).parents[2]
RUN_FILE, ANALYSIS = (ROOT / "docs" / name for name in ("run_file.md", "analysis.md"))

pytestmark = pytest.mark.skipif(not RUN_FILE.is_file(), reason="the package is installed without its sources")


def rows(page: str) -> set[str]:
    return {line.strip() for line in page.splitlines() if line.startswith("|")}


def test_every_attribute_group_and_column_of_a_real_file_is_in_the_page(tmp_path: Path) -> None:
    writer.write(tmp_path / "a.h5", make_run(rounds=3, codec=make_codec(3)))
    page = RUN_FILE.read_text(encoding="utf-8")
    found, missing = rows(page), []
    with h5py.File(tmp_path / "a.h5") as file:
        missing += [name for name in file.attrs if not re.search(rf"^\| `{name}` \|", page, re.MULTILINE)]
        columns = {f"{group}/{name}": file[group][name] for group in file for name in file[group]}
        for place, dataset in columns.items():
            group, _, name = place.partition("/")
            kind = "str" if h5py.check_string_dtype(dataset.dtype) else dataset.dtype.str.lstrip("<|")
            told = f"{dataset.attrs['unit']} | {dataset.attrs['meaning']} |"
            row = f"| `{name}` | {told}" if group == "summary" else f"| `{name}` | {kind} | {told}"
            section = page.split(f"### `{group}`\n")[-1].split("\n#")[0] if f"### `{group}`\n" in page else ""
            if " ".join(row.split()) not in {" ".join(r.split()) for r in rows(section)}:
                missing.append(row)
        assert len(columns) > 90
    assert missing == []
    assert f"the schema of version {SCHEMA_VERSION}." in page
    assert len(found) > 100


def test_what_collecting_adds_is_in_the_page(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(JOB)
    swept = sweep.make(tmp_path / "job.toml", [{}], [0], None, tmp_path / "out")
    finish(swept, lambda line: 0.5)
    page = RUN_FILE.read_text(encoding="utf-8")
    with h5py.File(sweep.collect(swept)) as file:
        names = [*file.attrs, *(name for run in file["runs"].values() for name in run.attrs)]
    assert len(names) > 4
    assert [name for name in names if f"`{name}`" not in page] == []


@pytest.fixture
def lr_sweep(tmp_path: Path) -> Path:
    """The sweep that the page speaks of."""
    pytest.importorskip("pandas")
    for method in ("cooperllm", "fedmezo"):
        for seed in (0, 1, 2):
            for lr in (0.01, 0.02):
                run = make_run(method, rounds=6, seed=seed, settings={"lr": lr})
                lost = 0.05 if lr == 0.01 else 0.0
                for split in ("dev_accuracy", "test_accuracy"):
                    run.rounds[split] -= lost
                worse = {"best_accuracy": run.summary.best_accuracy - lost, "rounds_to_target": None if lost else 4}
                run = replace(run, summary=run.summary.model_copy(update=worse))
                writer.write(tmp_path / "sweeps" / "lr" / "runs" / f"{run.summary.run_id}.h5", run)
    return tmp_path


def test_the_blocks_of_the_analysis_page_run_in_order(lr_sweep: Path) -> None:
    page = ANALYSIS.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    shown = re.findall(r"^```python\n.*?^```\n\n```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 8
    code = "\nprint('---')\n".join(blocks)
    ran = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        cwd=lr_sweep,
        env={**os.environ, "MPLBACKEND": "svg"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    printed = ran.stdout.split("---\n")
    assert len(printed) == len(blocks)
    assert all(text.strip() for text in printed)
    assert [text.rstrip() for text in shown] == [text.rstrip() for text in printed]
    assert (lr_sweep / "analysis.svg").is_file()
    assert (ANALYSIS.parent / "analysis.svg").is_file()
    assert {path.name for path in (lr_sweep / "tables").iterdir()} == {
        f"{name}.{form}" for name in ("runs", "rounds", "devices") for form in ("csv", "parquet")
    }


def test_the_example_script_prints_its_tables(lr_sweep: Path) -> None:
    words = [sys.executable, str(ROOT / "jobs" / "analysis.py"), "sweeps/lr", "--csv", "out"]
    ran = subprocess.run(words, cwd=lr_sweep, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("12 runs")
    assert "cooperllm" in ran.stdout.partition("minus that of fedmezo")[2]
    assert (lr_sweep / "out" / "runs.csv").is_file()
    missing = subprocess.run([*words[:2], "nowhere"], cwd=lr_sweep, capture_output=True, text=True, check=False)
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    unknown = subprocess.run(
        [*words[:3], "--against", "nope"], cwd=lr_sweep, capture_output=True, text=True, check=False
    )
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr.startswith(
        "analysis: --against: found 'nope'; allowed: cooperllm, fedmezo, cooperllm (lr = 0.01)"
    )


def test_the_example_script_counts_never_as_inf_and_chooses_arms_by_dev(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    sys.path.insert(0, str(ROOT / "jobs"))
    import analysis

    own = [
        make_run("fedmezo", rounds=6, seed=s, settings={"lr": lr}, target=None)
        for s in (0, 1, 2)
        for lr in (0.01, 0.02)
    ]
    guided = [make_run("cooperllm", rounds=6, seed=s) for s in (0, 1, 2)]
    for run in own:
        better_on_dev = run.config["method"]["settings"]["lr"] == 0.02
        run.rounds["dev_accuracy"] += 0.1 * better_on_dev
        run.rounds["test_accuracy"] -= 0.1 * better_on_dev
    figures = [{"best_accuracy": 0.6 if r.config["method"]["settings"]["lr"] == 0.02 else 0.7} for r in own]
    never = [{"rounds_to_target": 1 if r.summary.seed == 0 else None} for r in own]
    runs = [replace(r, summary=r.summary.model_copy(update=f | n)) for r, f, n in zip(own, figures, never, strict=True)]
    runs += [replace(r, summary=r.summary.model_copy(update={"best_accuracy": 0.9})) for r in guided]
    sweep = Tables(tuple(runs))
    (row,) = [line for line in analysis.accuracies(sweep).splitlines() if "fedmezo (lr = 0.02)" in line]
    assert row.split()[-5:-1] == ["0.6", "0.0", "3", "inf"]
    told = analysis.differences(sweep, "fedmezo").splitlines()
    assert [line.split() for line in told[2:]] == [["0", "0.3"], ["1", "0.3"], ["2", "0.3"]]
    assert "0.2" in analysis.differences(sweep, "fedmezo (lr = 0.01)")
