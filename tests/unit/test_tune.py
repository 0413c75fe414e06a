"""Tuning: the best point by the dev split, curves apart by setting, and grids that grow where their best is on the edge."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sweep_files import JOB, finish

from fedbench.__main__ import main
from fedbench.base.errors import EXIT_OK, ConfigError
from fedbench.batch import command, curves, manifest, sweep, tune
from fedbench.batch.local import Results
from fedbench.batch.manifest import Line, Sweep

Accuracy = Callable[[Line], float | None]
LRS = (0.01, 0.022, 0.046)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(JOB)
    return path


def lr_of(line: Line) -> float:
    return float(line.config["method"]["settings"]["lr"])


def peak(lr: float, *, limit: float = math.inf) -> Accuracy:
    """Return an accuracy that is best near one step size and diverges above a limit."""
    return lambda line: None if lr_of(line) > limit else 0.9 - 0.1 * abs(math.log10(lr_of(line) / lr))


def grid_over(job: Path, lrs: tuple[float, ...] = LRS, seeds: tuple[int, ...] = (1000,), **arm: Any) -> Sweep:
    """Return a sweep over step sizes."""
    return sweep.make(job, [{"method.lr": lr, **arm} for lr in lrs], seeds, None, job.parent / "lr")


def tuned(swept: Sweep, accuracy: Accuracy, by: curves.By = "accuracy") -> dict[str, Any]:
    """Return the only curve of a grid whose runs have fabricated accuracies."""
    finish(swept, accuracy)
    trees = tune.tune(swept, by, lambda wide: (finish(wide, accuracy), None)[1])
    assert len(trees) == 1
    assert json.loads((swept.folder / "tune.json").read_text()) == trees
    return trees[0]


#: accuracy -> best step size, widenings, whether the best is on the edge after all
CASES: list[tuple[str, Accuracy, float, int, bool]] = [
    ("inside", peak(0.02), 0.022, 0, False),
    ("above", peak(0.1), 0.099, 1, False),
    ("far above", peak(3.0), 2.1, 3, False),
    ("below", peak(0.004), 0.0047, 1, False),
    ("beyond the bound", peak(1e9), 21.0, 4, True),
    ("diverges beyond the best", peak(1e9, limit=0.03), 0.022, 0, False),
    ("all diverged at first", peak(1e-3, limit=0.009), 0.001, 2, False),
]


@pytest.mark.parametrize(
    ("accuracy", "best", "widenings", "on_edge"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_the_grid_grows_until_its_best_is_inside(
    job: Path, accuracy: Accuracy, best: float, widenings: int, on_edge: bool
) -> None:
    swept = grid_over(job)
    tree = tuned(swept, accuracy)
    assert (tree["best"]["lr"], tree["widenings"], tree["on_edge"]) == (
        pytest.approx(best, rel=0.06),
        widenings,
        on_edge,
    )
    wide = sorted(path.name for path in job.parent.glob("lr-wide*"))
    assert wide == ["lr-wide", *(f"lr-wide-{n}" for n in range(2, 9))][:widenings]
    for name in wide:
        assert [line.seed for line in manifest.read(job.parent / name).lines] == [1000, 1000]
    assert len(tree["points"]) == 3 + 2 * widenings
    assert [p["score"] is None for p in tree["points"]] == sorted(p["score"] is None for p in tree["points"])
    assert tuned(swept, accuracy) == tree, "tuning again does it all again"


def test_scores_are_means_over_evaluations_and_seeds_and_one_diverged_seed_rules_a_point_out(job: Path) -> None:
    swept = grid_over(job, seeds=(1, 2))
    scores: dict[tuple[float, int], float | None] = {
        (0.01, 1): 0.5, (0.01, 2): 0.6, (0.022, 1): 0.7, (0.022, 2): 0.72, (0.046, 1): 0.9, (0.046, 2): None,
    }  # fmt: skip
    tree = tuned(swept, lambda line: scores[lr_of(line), line.seed])
    assert [p["score"] for p in tree["points"]] == [pytest.approx(0.55), pytest.approx(0.71), None]
    assert [p["seeds"] for p in tree["points"]] == [2, 2, 2]
    assert tree["best"]["lr"] == 0.022
    assert tuned(swept, lambda line: None, by="loss")["points"][1]["score"] == pytest.approx(-0.29)


def test_the_probing_step_is_tuned_too_where_the_grid_varies_it(job: Path) -> None:
    arms = [{"method.lr": lr, "zo.epsilon": e} for lr in LRS for e in (1e-4, 1e-3)]
    swept = sweep.make(job, arms, [1], None, job.parent / "lr")
    tree = tuned(swept, lambda line: peak(0.02)(line) - 0.01 * abs(math.log10(line.config["zo"]["epsilon"] / 0.01)))
    assert tree["best"] == {"lr": 0.022, "epsilon": 0.01}
    assert (tree["widenings"], tree["on_edge"]) == (1, False)
    assert "# with zo.epsilon = 0.01" in tune.as_toml(tree)


def test_methods_and_public_sets_are_curves_of_their_own(job: Path) -> None:
    arms = [
        {"method.name": name, "method.lr": lr, "data.public": public, "data.public_labels": labels}
        for name, public, labels in (
            ("fedmezo", "embedded", "given"),
            ("cooperllm", "embedded", "given"),
            ("cooperllm", "embedded:poor", "given"),
            ("cooperllm", "embedded", "shuffled"),
        )
        for lr in LRS
    ]
    swept = sweep.make(job, arms, [1], None, job.parent / "lr")
    finish(swept, peak(0.02))
    settings = [tree["setting"] for tree in tune.tune(swept, "accuracy", lambda wide: None)]
    assert [(s["method.name"], s["data.public"], s.get("data.public_labels")) for s in settings] == [
        ("fedmezo", "embedded", None),
        ("cooperllm", "embedded", "given"),
        ("cooperllm", "embedded:poor", "given"),
        ("cooperllm", "embedded", "shuffled"),
    ]


def test_what_can_not_be_tuned_is_refused(job: Path) -> None:
    swept = grid_over(job, lrs=(0.01,))
    with pytest.raises(ConfigError, match=r"missing\. A grid is tuned when all of its runs are done"):
        tune.tune(swept, "accuracy", lambda wide: None)
    finish(swept, peak(1.0))
    with pytest.raises(ConfigError, match="nothing to tune"):
        tune.tune(swept, "accuracy", lambda wide: None)


def test_the_command_prints_tables_of_the_job_file_and_runs_the_wider_grid(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    swept = grid_over(job)
    finish(swept, peak(0.1))

    def run_shown(wide: Sweep, parallel: int | None, *, retry: bool = False) -> Results:
        finish(wide, peak(0.1))
        return Results((), False)

    monkeypatch.setattr(command, "run_shown", run_shown)
    assert main(["sweep", "tune", str(swept.folder)]) == EXIT_OK
    told = capsys.readouterr()
    assert tomllib.loads(told.out) == {"method": {"fedmezo": {"lr": 0.099}}}
    assert "# accuracy on dev by lr: 0.01: 0.8, 0.022: 0.8342" in told.out
    assert "lr-wide widens it" in told.err
    assert main(["sweep", "tune", str(swept.folder), "--json"]) == EXIT_OK
    assert json.loads(capsys.readouterr().out) == json.loads((swept.folder / "tune.json").read_text())


@pytest.mark.parametrize(
    ("axis", "best", "found"),
    [
        ([1.0, 2.2, 4.6], 4.6, [9.9, 21.0]),
        ([1.0, 2.2, 4.6], 1.0, [0.22, 0.47]),
        ([1.0, 2.2, 4.6], 2.2, []),
        ([1.0], 1.0, []),
    ],
)
def test_an_axis_goes_on_geometrically_behind_its_end(axis: list[float], best: float, found: list[float]) -> None:
    assert curves.beyond(axis, best) == found


@pytest.mark.parametrize(("above", "best"), [(0.002, 0.022), (0.004, 0.046)])
def test_of_accuracies_as_good_as_equal_the_smallest_step_is_taken(job: Path, above: float, best: float) -> None:
    scores = {0.01: 0.7, 0.022: 0.9, 0.046: 0.9 + above, 0.1: 0.6}
    assert tuned(grid_over(job, tuple(scores)), lambda line: scores[lr_of(line)])["best"]["lr"] == best
