"""Reports: arms and their names, exact tables, and a page that stands on its own."""

from __future__ import annotations

import csv
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from synthetic_runs import make_codec, make_run

from fedbench.__main__ import main
from fedbench.base import records
from fedbench.base.errors import EXIT_OK, ResultError
from fedbench.report import about, arms, bars, build, canvas, compare, looks, over_rounds, plot, summary, table, units
from fedbench.results import folder, writer

QUANTITIES = [
    (None, "B", "-"),
    (float("nan"), "B", "-"),
    (0, "B", "0 B"),
    (4, "B", "4 B"),
    (999.6, "B", "1 kB"),
    (1276000, "B", "1.28 MB"),
    (31_000_000, "B", "31 MB"),
    (2.46e10, "FLOP", "24.6 GFLOP"),
    (0.1253, "s", "125 ms"),
    (59.96, "s", "60 s"),
    (1.5e-7, "s", "0.15 µs"),
    (6e7, "", "60 M"),
]


@pytest.fixture(scope="module")
def runs() -> list[records.Run]:
    methods = ("fedavg", "fedspzo", "public_only", "fedmezo", "cooperllm")
    plain = [make_run(m, seed=s, rounds=40) for m in methods for s in (1, 0)]
    return [*plain, *(make_run("cooperllm", seed=s, rounds=40, public_labels="shuffled", peak=None) for s in (0, 1))]


@pytest.fixture(scope="module")
def report(runs: list[records.Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    for run in runs:
        writer.write(folder / "runs" / f"{run.summary.run_id}.h5", run)
    written = build.build([folder], folder / "report")
    assert all(path.stat().st_size > 0 for path in written)
    return folder / "report"


def fixed(run: records.Run, **figures: object) -> records.Run:
    """Return a run with figures of its summary replaced by round ones."""
    return records.Run(**{**vars(run), "summary": run.summary.model_copy(update=figures)})


def test_quantities_have_three_digits_and_a_prefix() -> None:
    for value, unit, text in QUANTITIES:
        assert units.quantity(value, unit) == text


def test_arms_are_method_and_what_differs_without_the_seed(runs: list[records.Run]) -> None:
    found = [(arm.label, [run.summary.seed for run in arm.runs]) for arm in arms.group([*runs, runs[0]])]
    names = ["cooperllm", "cooperllm (public_labels = shuffled)", "public_only", "fedmezo", "fedspzo", "fedavg"]
    assert found == [(name, [0, 1]) for name in names]


def test_numbers_that_differ_are_shown_for_every_arm_in_order() -> None:
    grid = [make_run("fedmezo", settings={"lr": lr, "schedule": "constant"}, rounds=4) for lr in (0.1, 1e-3, 0.01)]
    labels = [arm.label for arm in arms.group([*grid, make_run("cooperllm", rounds=4)])]
    assert labels == ["cooperllm", "fedmezo (lr = 0.001)", "fedmezo (lr = 0.01)", "fedmezo (lr = 0.1)"]
    labels = [arm.label for arm in arms.group([make_run("fedmezo", ranks=ranks, rounds=4) for ranks in (2, 1)])]
    assert labels == ["fedmezo (ranks = 1)", "fedmezo (ranks = 2)"]


def test_curves_are_means_with_the_range_over_seeds_at_rounds_that_all_evaluated() -> None:
    pair = [make_run("fedmezo", seed=seed, rounds=8, eval_every=every) for seed, every in ((0, 2), (1, 4))]
    first, second = pair[0].rounds["dev_accuracy"][[0, 4, 8]], pair[1].rounds["dev_accuracy"][[0, 4, 8]]
    line = arms.curve(arms.Arm("x", "fedmezo", {}, tuple(pair)), "round", "dev_accuracy")
    np.testing.assert_allclose(line.x, [0, 4, 8])
    np.testing.assert_allclose(line.mean, (first + second) / 2)
    np.testing.assert_allclose(line.low, np.minimum(first, second))


def test_seeds_that_spend_differently_are_compared_at_the_same_cost() -> None:
    pair = [make_run("fedmezo", seed=seed, rounds=4, eval_every=1) for seed in (0, 1)]
    for run, seconds in zip(pair, (1.0, 2.0), strict=True):
        run.rounds["round_s"] = np.where(run.rounds["round"] >= 0, seconds, 0.0)
        run.rounds["test_accuracy"] = 0.1 * np.cumsum(run.rounds["round_s"])  # both the same function of time
    line = arms.curve(arms.Arm("x", "fedmezo", {}, tuple(pair)), "round_s", "test_accuracy")
    np.testing.assert_allclose(line.x, [0, 1, 2, 3, 4])  # as far as the seed that took 4 s
    np.testing.assert_allclose(line.mean, 0.1 * line.x)
    np.testing.assert_allclose([line.low, line.high], [line.mean, line.mean])
    pair[0].rounds["test_accuracy"][:] = np.nan
    assert len(arms.curve(arms.Arm("x", "fedmezo", {}, tuple(pair)), "round_s", "test_accuracy").x) == 0


EXACT = """\
| arm | rounds | rounds to target | best accuracy | final accuracy | uplink per device and round | peak device memory \
| median round time | device FLOPs |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| cooperllm | 40 | 6 | 0.934 | 0.930 | 4 B | 31 MB | 125 ms | 16.4 G |
| fedmezo | 40 | > 40 | 0.750 | 0.750 | 4 B | - | 1.5 s | 16.4 G |

Accuracy on the test split: best is at the evaluation that is best on dev, final at the last one. The target is on the \
dev split.
"""


def test_the_table_is_exact() -> None:
    guided = fixed(
        make_run("cooperllm", rounds=40),
        **{"rounds_to_target": 6, "best_accuracy": 0.934, "final_accuracy": 0.93, "round_s_median": 0.125},
    )
    never = fixed(
        make_run("fedmezo", rounds=40, peak=None),
        **{"rounds_to_target": None, "best_accuracy": 0.75, "final_accuracy": 0.75, "round_s_median": 1.5},
    )
    pair = arms.group([never, guided])
    assert table.to_markdown(table.demo_grid(pair)) == EXACT
    assert table.demo_grid(pair).title == "Comparison (target 0.8 on dev)"
    lines = list(csv.DictReader(io.StringIO(table.to_csv(pair))))
    assert [line["rounds_to_target"] for line in lines] == ["6.0", ""]
    assert lines[1]["peak_device_bytes"] == ""
    assert float(lines[0]["round_s_median"]) == 0.125
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(table.demo_table([never, guided]))
    text = console.export_text()
    assert all(word in text for word in ("cooperllm", "> 40", "16.4 G", "target 0.8", "accuracy", "final at the last"))


def test_arms_that_ran_different_rounds_are_told_apart() -> None:
    runs = [make_run("fedmezo", rounds=40), make_run("fedavg", rounds=8), make_run("fedavg", rounds=6, seed=1)]
    grid = table.demo_grid(arms.group(runs))
    assert [row[2] for row in grid.rows] == ["40", "6 to 8"]
    assert "Where rounds differ, final accuracies and device FLOPs are not those of equal training." in grid.note


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "narrow terminal"])
def test_the_table_on_stderr_loses_no_column(
    report: Path, terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert main(["report", str(report.parent / "runs"), "--out", str(report.parent / "again")]) == EXIT_OK
    told = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().err)
    (line,) = [line for line in told.splitlines() if line.lstrip().startswith("fedavg")]
    assert [word in line for word in ("± ", "1.28 MB", "31 MB", " ms", "24.8 G")] == [True] * 5
    assert "FLOPs" in told


REACHED = [
    ((6,), "6"),
    ((None,), "> 40"),
    ((6, 9), "7.5 (6 to 9)"),
    ((6, 8, None), "8 (6 to > 40)"),
    ((6, None, None), "> 40 (6 to > 40)"),
]


def test_rounds_to_target_over_seeds_counts_never_as_larger_than_all() -> None:
    for reached, text in REACHED:
        own = tuple(fixed(make_run("fedmezo", rounds=40, seed=i), rounds_to_target=r) for i, r in enumerate(reached))
        assert table.rounds_to_target(arms.Arm("fedmezo", "fedmezo", {}, own)) == text
    free = make_run("fedmezo", rounds=4, target=None)
    assert table.rounds_to_target(arms.Arm("fedmezo", "fedmezo", {}, (free,))) == "-"


def test_ratios_count_rounds_at_equal_device_flops() -> None:
    guided = fixed(make_run("cooperllm", rounds=60), rounds_to_target=5)
    plain = fixed(make_run("fedmezo", rounds=60), rounds_to_target=50)
    double = fixed(make_run("fedmezo", rounds=60), rounds_to_target=25)
    double.rounds["device_flops"] = double.rounds["device_flops"] * 2
    never = fixed(make_run("fedmezo", rounds=60), rounds_to_target=None)
    free = fixed(make_run("public_only", rounds=60), rounds_to_target=15)
    other = fixed(make_run("fedmezo", rounds=60), target_accuracy=0.7)
    cases = [(plain, 10, ""), (double, 10, ""), (never, 12, "> "), (free, 3, ""), (other, None, "")]
    for baseline, ratio, bound in cases:
        (pair,) = compare.pairs_of(_arm(guided), _arm(baseline))
        assert (pair.ratio, pair.bound) == (pytest.approx(ratio) if ratio else None, bound)


#: Rounds to target of the guided arm and of the baseline, seed by seed, of 30 rounds; seeds at target, ratio.
FAILED = [
    ([(2, 20), (None, 20), (None, 20)], "1 and 3", "< 0.667 (< 0.667 to 10)"),
    ([(2, 20), (2, 20), (None, 20)], "2 and 3", "10 (< 0.667 to 10)"),
    ([(2, 20), (2, None), (2, None)], "3 and 1", "> 15 (10 to > 15)"),
    ([(2, 20), (2, 30), (2, None)], "3 and 2", "15 (10 to > 15)"),
    ([(2, 20), (None, 20)], "1 and 2", "< 5.33 (< 0.667 to 10)"),
    ([(2, None), (None, 20)], "1 and 1", "- (< 0.667 to > 15)"),
    ([(None, None), (2, 20)], "1 and 1", "10, 1 of 2 seeds"),
    ([(None, None)], "0 and 0", "-"),
    ([(2, 20)] * 5 + [(None, 20)] * 5, "5 and 10", "< 5.33 [< 0.667, 10]"),
]


def test_seeds_of_the_guided_arm_that_fail_count_against_it() -> None:
    for seeds, reached, ratio in FAILED:
        ends = zip(*seeds, strict=True)
        pair = [
            arms.Arm(
                m, m, {}, tuple(fixed(make_run(m, rounds=30, seed=s), rounds_to_target=r) for s, r in enumerate(own))
            )
            for m, own in zip(("cooperllm", "fedmezo"), ends, strict=True)
        ]
        (row,) = compare.compare_grid(pair[0], pair).rows
        assert row[1:4] == (str(len(seeds)), reached, ratio), seeds


def test_seeds_that_have_not_converged_are_counted() -> None:
    steady, rising = (make_run("cooperllm", rounds=60, seed=seed) for seed in (0, 1))
    rising.rounds["dev_accuracy"] = np.linspace(0.1, 0.9, 61)
    guided = arms.Arm("cooperllm", "cooperllm", {}, (steady, rising))
    plain = arms.Arm("fedmezo", "fedmezo", {}, tuple(make_run("fedmezo", rounds=60, seed=seed) for seed in (0, 1)))
    assert compare.compare_grid(guided, [plain]).rows[0][-1].endswith(", 1 of 2 seeds")
    assert (
        "±: standard deviation over seeds; ( ): smallest to largest; [ ]: 95 %"
        in compare.compare_grid(guided, [plain]).note
    )


def test_accuracies_are_compared_where_the_guided_arm_has_converged() -> None:
    guided, plain = make_run("cooperllm", rounds=60), make_run("fedmezo", rounds=60)
    number = guided.rounds["round"]
    guided.rounds["dev_accuracy"] = np.where(number < 9, 0.5 + 0.03 * (number + 1), 0.9)
    guided.rounds["test_accuracy"] = np.full(61, 0.9)
    plain.rounds["test_accuracy"] = np.where(number == 9, 0.7, np.nan)
    (pair,) = compare.pairs_of(_arm(guided), _arm(plain))
    assert (pair.converged, pair.points) == (9, pytest.approx(20))
    plain.rounds["test_accuracy"] = np.select([number == 5, number == 13], [0.6, 0.75], np.nan)
    (sparse,) = compare.pairs_of(_arm(guided), _arm(plain))
    assert sparse.points == pytest.approx(15)  # the baseline's next evaluation, not the one before
    plain.rounds["device_flops"] = plain.rounds["device_flops"] / 100
    (short,) = compare.pairs_of(_arm(guided), _arm(plain))
    assert short.points is None


def test_the_comparison_is_against_the_best_guided_arm_with_given_labels(runs: list[records.Run]) -> None:
    grouped = arms.group(runs)
    (reference,) = compare.references(grouped)
    assert reference.label == "cooperllm"
    grid = compare.compare_grid(reference, grouped)
    assert [row[0] for row in grid.rows] == [arm.label for arm in grouped if arm.label != "cooperllm"]
    assert {row[1] for row in grid.rows} == {"2"}


def test_the_summary_of_one_run_names_each_figure() -> None:
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(summary.summary_table(fixed(make_run(rounds=40, peak=None), rounds_to_target=None)))
    text = console.export_text()
    assert re.search(r"rounds to target\s+not in 40 rounds", text)
    assert re.search(r"peak device memory\s+not known", text)
    assert re.search(r"device FLOPs\s+16.4 GFLOP", text)


def test_figures_are_the_same_bytes_each_time_and_leave_out_what_has_no_cost(runs: list[records.Run]) -> None:
    grouped = arms.group(runs[4:])
    flops = plot.COSTS[1]
    first, second = (plot.accuracy(grouped, flops, looks.LIGHT) for _ in range(2))
    assert first is not None
    assert second is not None
    assert "not drawn: public_only" in first.caption
    assert canvas.png(first.figure) == canvas.png(second.figure)
    assert canvas.svg(first.figure) == canvas.svg(second.figure)
    only_public = [arm for arm in grouped if arm.method == "public_only"]
    assert plot.accuracy(only_public, flops, looks.LIGHT) is None


def ranked(seeds: tuple[int, ...], ranks: tuple[int, ...], trajectory: str = "b") -> list[arms.Arm]:
    """Return arms of one method that differ by `run.ranks`, those on more ranks faster."""
    found = []
    for number in ranks:
        for seed in seeds:
            run = fixed(make_run("cooperllm", seed=seed, rounds=8, ranks=number), trajectory_sha256=trajectory * 64)
            run.rounds["round_s"] = run.rounds["round_s"] / number
            found.append(run)
    return arms.group(found)


def test_arms_that_went_the_same_way_are_one_line_where_they_cost_the_same() -> None:
    same = ranked((0, 1), (1, 2, 4))
    by_rounds, by_time = (plot.accuracy(same, plot.COSTS[i], looks.LIGHT) for i in (0, 4))
    assert by_rounds is not None
    assert by_time is not None
    told = "cooperllm (ranks = 1) = (ranks = 2) = (ranks = 4)"
    assert [text.get_text() for text in by_rounds.figure.legends[0].get_texts()] == [told]
    assert f"went the same way bit by bit: {told}." in by_rounds.caption
    assert [text.get_text() for text in by_time.figure.legends[0].get_texts()] == [arm.label for arm in same]
    others = [*ranked((0, 1), (1,)), *ranked((0, 1), (2,), "c")]
    apart = [arms.Arm(f"{arm.label} {i}", arm.method, {}, arm.runs) for i, arm in enumerate(others)]
    drawing = plot.accuracy(apart, plot.COSTS[0], looks.LIGHT)
    assert drawing is not None
    assert len(drawing.figure.legends[0].get_texts()) == 2


def test_markers_stand_at_points_of_a_line_and_at_its_last() -> None:
    drawing = plot.accuracy(arms.group([make_run(rounds=60)]), plot.COSTS[0], looks.LIGHT)
    assert drawing is not None
    (drawn,) = [line for line in drawing.figure.axes[0].lines if len(np.asarray(line.get_xdata())) > 2]
    at = drawn.get_markevery()
    assert at == sorted(set(at))
    assert {0, len(np.asarray(drawn.get_xdata())) - 1} <= set(at)
    assert 5 < len(at) < 12


def test_memory_over_the_rounds_is_above_the_imports_as_its_bars_are() -> None:
    drawing = over_rounds.memory(arms.group([make_run(rounds=9, ranks=2)]), looks.LIGHT)
    assert drawing is not None
    assert "At the end: cooperllm 25.1 MB" in drawing.alt  # 235.08 MB at the end, 210 MB after the imports
    assert "above that right after its imports" in drawing.caption


def test_rows_of_bits_that_never_change_have_their_number() -> None:
    varied = make_codec(4)
    varied["bits"][-1] = 2.0  # the last unit in the last round
    for codec, written in ((make_codec(4), ["2", "4", "8"]), (varied, ["2", "4"])):
        drawing = over_rounds.bits(arms.group([make_run(rounds=4, codec=codec)]), looks.LIGHT)
        assert drawing is not None
        assert [text.get_text() for text in drawing.figure.axes[0].texts] == written
        assert "in every round" in drawing.caption


def test_memory_of_a_shared_process_is_marked() -> None:
    drawing = bars.memory(arms.group([make_run(rounds=4, peak=None)]), looks.LIGHT)
    assert drawing is not None
    assert "34 MB (cloud included)" in drawing.alt
    assert "Hatched" in drawing.caption


def test_memory_says_what_the_model_has_of_it_and_how_seeds_differ() -> None:
    runs = [make_run(rounds=4, seed=seed, peak=peak) for seed, peak in ((0, 31_000_000), (1, 39_000_000))]
    drawing = bars.memory(arms.group(runs), looks.LIGHT)
    assert drawing is not None
    assert "weights (inner bar) are 1.3 MB" in drawing.caption
    assert "`bench memory`" in drawing.caption
    (axes,) = drawing.figure.axes
    assert [patch.get_width() for patch in axes.patches] == [35e6, 1.3e6]
    (spread,) = axes.collections
    assert np.ptp(spread.get_paths()[0].vertices[:, 0]) == 8e6
    for run in runs:
        run.memory["weights_bytes"] *= 20
    large = bars.memory(arms.group(runs), looks.LIGHT)
    assert large is not None
    assert "`bench memory`" not in large.caption


def test_memory_of_a_process_that_made_runs_before_is_left_out() -> None:
    first, second = (make_run(rounds=4, seed=seed, peak=None, runs_before=seed) for seed in (0, 1))
    second.memory["above_import_bytes"] *= 3
    drawing = bars.memory(arms.group([first, second]), looks.LIGHT)
    assert drawing is not None
    assert "34 MB (cloud included)" in drawing.alt
    assert "had made others before are left out, since its heap is theirs too: cooperllm." in drawing.caption
    assert bars.memory(arms.group([second]), looks.LIGHT) is None
    assert over_rounds.memory(arms.group([second]), looks.LIGHT) is None


def test_the_split_of_time_is_of_rounds_that_were_computed() -> None:
    run = make_run(rounds=9)
    trained = run.rounds["trained"]
    trained[1:] = np.arange(9) % 4 == 0
    for column, seconds in {"round_s": 2.0, "compute_s": 1.5}.items():
        run.rounds[column][trained == 1] = seconds
        run.rounds[column][trained == 0] = 0.01
        run.rounds[column][1] = 100.0  # warm-up
    parts = bars._parts(*arms.group([run]))
    assert (parts[bars.PARTS.index("devices compute")], parts.sum()) == (1.5, pytest.approx(2.0))


#: Ranks, and seconds of a round, of the slowest devices, of the cloud's waiting; then devices compute, wait and the rest.
ROUNDS = [
    (2, (1.0, 0.6, 0.7), (0.6, 0.1, 0.2)),
    (2, (1.0, 0.9, 0.7), (0.7, 0.0, 0.2)),  # devices compute while the cloud does something else
    (1, (1.0, 0.6, 0.0), (0.6, 0.0, 0.3)),
    (1, (1.0, 0.95, 0.0), (0.9, 0.0, 0.0)),
]


@pytest.mark.parametrize(("ranks", "seconds", "parts"), ROUNDS)
def test_a_bar_of_the_time_split_is_as_long_as_the_round(
    ranks: int, seconds: tuple[float, ...], parts: tuple[float, ...]
) -> None:
    run = make_run(rounds=4, ranks=ranks)
    own = {**dict(zip(("round", "compute", "wait"), seconds, strict=True)), "cloud": 0.1, "encode": 0.0, "apply": 0.0}
    for name, value in own.items():
        run.rounds[f"{name}_s"][1:] = value
    found = dict(zip(bars.PARTS, bars._parts(*arms.group([run])), strict=True))
    assert [found[name] for name in ("devices compute", "wait", "decode, send, account")] == pytest.approx(list(parts))
    (axes,) = bars.time_split(arms.group([run]), looks.LIGHT).figure.axes
    assert max(patch.get_x() + patch.get_width() for patch in axes.patches) == pytest.approx(1.0)


def test_arms_look_different_and_a_method_keeps_its_colour(runs: list[records.Run]) -> None:
    grouped = arms.group(runs)
    found = looks.looks(grouped)
    assert len({(look.colour, look.dash) for look in found.values()}) == len(grouped)
    assert found["cooperllm"].colour == found["cooperllm (public_labels = shuffled)"].colour
    alone = looks.looks([arm for arm in grouped if arm.method == "fedmezo"] + [grouped[0]])
    assert alone["fedmezo"].colour == found["fedmezo"].colour


class Page(HTMLParser):
    """Collects tags with their attributes and the text of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else_and_every_picture_has_words(report: Path, runs: list[records.Run]) -> None:
    content = (report / "index.html").read_text()
    page = Page()
    page.feed(content)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 10
    assert all(len(image["alt"] or "") > 40 for image in images)
    links = [v or "" for _, attributes in page.tags for k, v in attributes.items() if k in ("src", "srcset", "href")]
    outer = [link for link in links if not link.startswith("#")]
    assert len(outer) == 20
    assert all(link.startswith("data:image/svg+xml;base64,") for link in outer)
    named = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {link[1:] for link in links if link.startswith("#")} == named
    assert not re.search(r"https?:|@import|url\(", content)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    keys = {attributes["style"]: attributes for tag, attributes in page.tags if tag == "svg"}
    assert set(keys) == {f"color:var(--arm{look.colour})" for look in looks.looks(arms.group(runs)).values()}
    assert "prefers-color-scheme: dark" in content
    assert "Example CPU & Co <v3>" in page.text
    assert "0123456789ab" in page.text
    names = [name for _, attributes in page.tags if (name := attributes.get("id"))]
    assert names[:3] == ["accuracy_rounds", "pareto", "comparison-target-0-8-on-dev"]
    assert (
        "12 runs of 6 arms over 2 seeds: embedded (335 k trainable parameters), 8 devices (4 a round), partition iid, "
        "batch 16, 1 rank, 2026-01-02, commit 012345678. Careful: only 2 seeds per arm"
    ) in page.text


def test_the_first_words_tell_what_all_runs_share_and_where_seeds_are_few() -> None:
    runs = [make_run(m, rounds=4, seed=seed, ranks=1 + seed) for m in ("fedmezo", "fedavg") for seed in (0, 1, 2)]
    for run in runs:
        run.config["federation"] |= {"partition": "dirichlet", "sampled": None}
        run.config["run"]["ranks"] = 1
    runs[0].provenance["commit"] = {"hash": "f" * 40, "dirty": True}
    runs[0].provenance["ended"] = "2026-01-01T00:00:00Z"
    told = "8 devices, Dirichlet 0.5, batch 16, 2026-01-01 to 2026-01-02, 2 commits."
    assert about.lead(arms.group(runs), []).endswith(told)
    assert about.lead(arms.group(runs[:4]), ["x"]).endswith(
        "Careful: only 1 seed for some arms, so differences may be chance. Left out: x"
    )
    runs[0].provenance.clear()
    assert "model embedded, 8 devices" in about.lead(arms.group(runs[:1]), [])


def test_the_report_has_tables_figures_and_provenance(report: Path, runs: list[records.Run]) -> None:
    text = (report / "report.md").read_text()
    pictures = re.findall(r"\]\(([\w.]+)\)", text)
    assert pictures == [
        *("accuracy_rounds.png", "pareto.png", "accuracy_flops.png", "accuracy_uplink.png", "accuracy_downlink.png"),
        *("accuracy_time.png", "memory.png", "memory_rounds.png", "time_split.png", "timeline.png"),
    ]
    assert all((report / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert "| commit.hash | 0123456789abcdef |" in text
    assert all((report / name).with_suffix(".svg").read_bytes().startswith(b"<?xml") for name in pictures)
    lines = list(csv.DictReader((report / "rounds.csv").open()))
    assert len(lines) == len(runs) * 41
    assert {line["rounds_done"] for line in lines} == {str(i) for i in range(41)}
    last = [line for line in lines if line["run_id"] == runs[0].summary.run_id][-1]
    assert float(last["total_device_flops"]) == pytest.approx(runs[0].summary.device_flops)
    assert [line for line in lines if line["dev_accuracy"] == ""]


def test_a_bad_file_in_a_folder_is_named_and_left_out_but_not_one_asked_for(tmp_path: Path) -> None:
    good, bad = make_run(rounds=4), tmp_path / "runs" / "cut.h5"
    writer.write(tmp_path / "runs" / "good.h5", good)
    bad.write_bytes(b"cut")
    (tmp_path / "runs" / "bad").mkdir()
    (tmp_path / "runs" / "bad" / "worse.h5").write_bytes(b"not a run")
    found, skipped = folder.load([tmp_path])
    assert [run.summary.run_id for run in found] == [good.summary.run_id]
    assert len(skipped) == 1
    assert "cut.h5: not an HDF5 file" in skipped[0]
    with pytest.raises(ResultError, match=r"cut\.h5"):
        build.build([bad], tmp_path / "report")
    with pytest.raises(ResultError, match="no run file in"):
        build.build([tmp_path / "runs" / "bad"], tmp_path / "report")


@pytest.mark.parametrize("rounds", [1, 3])
def test_short_runs_without_target_make_a_report(tmp_path: Path, rounds: int) -> None:
    run = make_run("fedmezo", rounds=rounds, eval_every=5, target=None, spans=False)
    writer.write(tmp_path / "a.h5", run)
    written = build.build([tmp_path / "a.h5"], tmp_path / "report")
    assert {path.name for path in written} >= {"index.html", "report.md", "table.csv", "memory.png"}


def _arm(run: records.Run) -> arms.Arm:
    return arms.Arm(run.summary.method, run.summary.method, {}, (run,))
