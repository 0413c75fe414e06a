"""`bench scaling`: which runs it makes, efficiencies from their rounds, the flag on too few cores, table and figure."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_runs import make_run

from fedbench.__main__ import main
from fedbench.base.errors import EXIT_OK, EXIT_USER, FedbenchError
from fedbench.base.records import Run
from fedbench.bench import scaling, scaling_figure
from fedbench.bench.scaling import DEVICES, Point
from fedbench.report import table
from fedbench.report.looks import DARK


def took(seconds: float, *, ranks: int = 1, trajectory: str = "b") -> Run:
    """Return a run whose rounds took so long, its first ones much longer."""
    run = make_run("cooperllm", rounds=8, ranks=ranks, spans=False)
    rounds = {**run.rounds, "round_s": np.array([0.0] + [9.0] * scaling.WARM_UP + [seconds] * (8 - scaling.WARM_UP))}
    return replace(run, rounds=rounds, summary=run.summary.model_copy(update={"trajectory_sha256": trajectory * 64}))


def test_ranks_double_up_to_the_most_and_devices_follow_those_that_host_them() -> None:
    for most, sizes in ((1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])):
        kinds = scaling.points(most)
        assert kinds["strong"] == [Point(ranks, DEVICES) for ranks in sizes]
        assert kinds["weak"] == [Point(ranks, DEVICES * max(1, ranks - 1)) for ranks in sizes]


@pytest.fixture
def result() -> dict[str, object]:
    """Return figures of a job that took 1.2, 1.0, 0.5 s on 1, 2, 4 ranks, and 1.5 s with three times the devices."""
    seconds = {Point(1, 8): 1.2, Point(2, 8): 1.0, Point(4, 8): 0.5, Point(4, 24): 1.5}
    runs = {
        p: [took(s * f, ranks=p.ranks, trajectory="c" if p.devices > 8 else "b") for f in (1, 1, 1, 1.5, 0.5, 1)]
        for p, s in seconds.items()
    }
    return scaling.figures(scaling.points(4), runs, cores=2, threads=1)


def test_efficiency_is_devices_a_second_over_those_of_ranks(result: dict[str, dict[str, dict[str, float]]]) -> None:
    assert result["efficiency"]["strong"] == pytest.approx({"1": 1.0, "2": 0.6, "4": 0.6})
    assert result["efficiency"]["weak"] == pytest.approx({"1": 1.0, "2": 0.6, "4": 0.6})
    assert result["efficiency_of_device_ranks"]["strong"] == pytest.approx({"1": 1.0, "2": 1.2, "4": 0.8})
    assert result["speedup"]["weak"] == pytest.approx({"1": 1.0, "2": 1.2, "4": 2.4})
    assert result["round_s"]["strong"] == pytest.approx({"1": 1.2, "2": 1.0, "4": 0.5})
    assert result["oversubscribed"] == [4]
    assert all(len(s) == 6 for own in result["samples_s"].values() for s in own.values())
    json.dumps(result)


def test_ranks_that_change_a_result_are_no_benchmark() -> None:
    runs = {Point(1, 8): [took(1.0)], Point(2, 8): [took(1.0, ranks=2, trajectory="d")]}
    with pytest.raises(FedbenchError, match="2 trajectories"):
        scaling.figures(scaling.points(2), runs, cores=8, threads=1)


def test_the_table_has_intervals_from_six_samples_on(result: dict[str, object]) -> None:
    text = table.to_markdown(scaling_figure.grid(result))
    assert "| strong, 4 rank(s) * | 8 | 500 ms | 2.40 | 0.60 | 0.60 to 0.60 | 0.80 |" in text
    assert "the 2 cores here" in text
    runs = {Point(1, 8): [took(1.0)], Point(2, 8): [took(0.5, ranks=2)]}
    few = scaling.figures(scaling.points(2), runs, cores=2, threads=1)
    assert "| strong, 2 rank(s) | 8 | 500 ms | 2.00 | 1.00 | - | 2.00 |" in table.to_markdown(scaling_figure.grid(few))


def test_the_figure_is_written_as_its_name_says(result: dict[str, object], tmp_path: Path) -> None:
    for name, start in (("a.png", b"\x89PNG"), ("b.svg", b"<?xml")):
        scaling_figure.write(result, tmp_path / "new" / name)
        assert (tmp_path / "new" / name).read_bytes().startswith(start)
    panels = scaling_figure.draw(result, DARK).axes
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["1", "2", "4 *"]
    assert panels[0].get_ylabel() == "efficiency (bars: 95 % interval)"
    assert [text.get_text() for text in panels[0].texts] == ["ideal"]


def test_the_figures_legend_has_markers_and_its_bars_are_the_intervals(result: dict[str, Any]) -> None:
    result["samples_intervals"]["strong"]["4"] |= {"low": 2.0, "high": 3.2}
    result["samples_intervals"]["strong"]["2"] |= {"low": None, "high": None}
    figure = scaling_figure.draw(result, DARK)
    assert [line.get_marker() for line in figure.legends[0].get_lines()] == ["o", "s"]
    bars = [bar.get_segments()[0] for bar in figure.axes[0].collections]
    spans = [(float(bar[0][1]), float(bar[1][1])) for bar in bars]
    assert len(spans) == 4  # 1 and 4 ranks, two lines
    assert spans[1] == pytest.approx((0.5, 0.8))  # of 4 ranks
    assert spans[3] == pytest.approx((2 / 3, 3.2 / 3))  # of 3 ranks with devices


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["scaling", "--model", "opt-125m"], "--model: found 'opt-125m'; allowed for scaling: embedded"),
        (["scaling", "--out", "x.pdf"], "--out: found x.pdf; allowed: a file that ends in .png or .svg"),
        (["codec", "--out", "x.png"], "--out: a figure is drawn by `fedbench bench scaling` alone"),
    ],
)
def test_nonsense_is_the_users_error(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == EXIT_USER
    assert said in capsys.readouterr().err


def test_one_rank_is_a_real_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling, "ROUNDS", scaling.WARM_UP + 1)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    figure = tmp_path / "figure.svg"
    words = ["bench", "scaling", "-n", "1", "--repeats", "1", "--batch", "2", "--json", "--out", str(figure)]
    assert main(words) == EXIT_OK
    told = json.loads(capsys.readouterr().out)
    assert told["efficiency"] == {"strong": {"1": 1.0}, "weak": {"1": 1.0}}
    assert told["samples_s"]["strong"]["1"][0] > 0
    assert figure.exists()
