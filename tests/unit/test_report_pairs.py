"""What reports say of arms side by side: pairs of equal seeds, memory against accuracy, speed-ups over ranks, the best."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from synthetic_runs import make_run

from fedbench.__main__ import main
from fedbench.base.errors import EXIT_OK, EXIT_USER, ConfigError
from fedbench.base.records import Run
from fedbench.report import arms, highlights, looks, paired, pareto, speedup, table
from fedbench.report.arms import Arm
from fedbench.report.pareto import Place
from fedbench.results import writer


def fixed(run: Run, **figures: object) -> Run:
    """Return a run with figures of its summary replaced by round ones."""
    return Run(**{**vars(run), "summary": run.summary.model_copy(update=figures)})


def family(method: str, count: int, first: int = 0, **figures: float) -> Arm:
    """Return an arm of some seeds with the same figures, accuracies rising by a point from seed to seed."""
    runs = []
    for seed in range(first, first + count):
        own = {"final_accuracy": 0.5 + seed / 100, "best_accuracy": 0.6, "device_flops": 1e9, **figures}
        if "step" in own:
            own["final_accuracy"] += own.pop("step") * (1 + seed)
        runs.append(fixed(make_run(method, seed=seed, rounds=4, spans=False), **own))
    return Arm(method, method, {}, tuple(runs))


def cells(grid: table.Grid) -> dict[str, tuple[str, ...]]:
    """Return the rows of a grid by their arm."""
    return {row[0]: row[1:] for row in grid.rows}


def test_pairs_are_of_equal_seeds_and_have_an_interval_from_six_on() -> None:
    plain = family("fedmezo", 7)
    for count, first, pairs, text in (
        (1, 2, "1", "+3.0"),
        (3, 0, "3", "+2.0 ± 1.0"),
        (5, 0, "5", "+3.0 ± 1.6"),
        (6, 0, "6", "+3.5 ± 1.9 [+1.0, +6.0]"),
        (7, 3, "4", "+5.5 ± 1.3"),  # seeds 3 to 6 are those that both have
    ):
        arm = family("cooperllm", count, first, step=0.01, device_flops=2e9)
        row = cells(paired.paired_grid(plain, [arm, plain]))["cooperllm"]
        assert (row[0], row[1], row[3]) == (pairs, text, "2"), (count, first)
    alone = family("cooperllm", 3, first=20)
    assert paired.paired_grid(plain, [alone, plain]).rows == ()


#: Round times of one seed after the other over those of the baseline (1 s), and what the table says.
RATIOS = [
    ((2.0,), "2"),
    ((2.0, 2.0), "2"),
    ((1.0, 3.0, 2.0), "2 (1 to 3)"),
    ((1.0, 2.0, 3.0, 4.0, 5.0, 6.0), "3.5 [1, 6]"),
]


def test_ratios_of_few_pairs_show_their_smallest_and_largest() -> None:
    for seconds, text in RATIOS:
        plain = family("fedmezo", len(seconds), round_s_median=1.0)
        runs = (
            fixed(run, round_s_median=s) for run, s in zip(family("fedavg", len(seconds)).runs, seconds, strict=True)
        )
        grid = paired.paired_grid(plain, [Arm("fedavg", "fedavg", {}, tuple(runs))])
        assert grid.rows[0][-1] == text
        assert "( ): smallest to largest" in grid.note


def test_costs_are_compared_a_round_and_final_accuracies_of_unequal_rounds_are_marked() -> None:
    long, short = (Arm(m, m, {}, (make_run(m, rounds=n),)) for m, n in (("fedmezo", 80), ("cooperllm", 25)))
    row = cells(paired.paired_grid(long, [short]))["cooperllm"]
    assert (row[3], row[4]) == ("1", "1")
    assert row[1].endswith(" *")
    assert "*: the two ran different numbers of rounds" in paired.paired_grid(long, [short]).note
    assert (
        "*"
        not in cells(paired.paired_grid(long, [Arm("fedavg", "fedavg", {}, (make_run("fedavg", rounds=80),))]))[
            "fedavg"
        ][1]
    )


def test_ratios_are_left_out_where_one_of_a_pair_spends_nothing() -> None:
    free = family("public_only", 2, device_flops=0.0)
    assert cells(paired.paired_grid(family("fedmezo", 2), [free]))["public_only"][3] == "-"
    assert cells(paired.paired_grid(free, [family("fedmezo", 2)]))["fedmezo"][3] == "-"


def test_large_ratios_are_read_without_powers_of_ten() -> None:
    for flops, text in ((2.345e9, "2.35"), (9.99e11, "999"), (3.9421e13, "39,400")):
        arm = family("fedavg", 1, device_flops=flops)
        assert cells(paired.paired_grid(family("fedmezo", 1), [arm]))["fedavg"][3] == text


def test_the_baseline_is_the_plainest_arm_or_the_one_asked_for() -> None:
    both = [family("cooperllm", 1), family("fedspzo", 1), family("fedmezo", 1)]
    for chosen, wanted, label in (
        (both, None, "fedmezo"),
        (both[:2], None, "fedspzo"),
        (both, "cooperllm", "cooperllm"),
        (both[:1], "cooperllm", "cooperllm"),
    ):
        found = paired.baseline_of(chosen, wanted)
        assert found is not None
        assert found.label == label
    assert paired.baseline_of(both[:1]) is None
    with pytest.raises(ConfigError, match=r"found 'fedmzeo'; allowed: cooperllm, fedspzo, fedmezo\. Nearest: fedmezo"):
        paired.baseline_of(both, "fedmzeo")


def test_the_baseline_of_a_method_is_its_best_arm_on_dev_and_is_named() -> None:
    runs = [
        fixed(make_run("fedmezo", rounds=40, settings={"lr": lr}), rounds_to_target=reached)
        for lr, reached in ((0.001, 35), (0.01, 32), (0.1, None))
    ]
    grouped = arms.group([*runs, make_run("fedavg", rounds=40)])
    for wanted in (None, "fedmezo"):
        found = paired.baseline_of(grouped, wanted)
        assert found is not None
        assert found.label == "fedmezo (lr = 0.01)"
    assert "fedmezo (lr = 0.01) is the best on dev of the 3 arms of fedmezo." in paired.paired_grid(found, grouped).note
    named = paired.baseline_of(grouped, "fedmezo (lr = 0.1)")
    assert named is not None
    assert named.label == "fedmezo (lr = 0.1)"
    assert "best on dev of" not in paired.paired_grid(named, grouped).note


#: (memory, accuracy) of each place, and which of them nothing beats, by rising memory.
FRONTIERS = [
    ([(1, 0.5)], [0]),
    ([(1, 0.5), (2, 0.4)], [0]),
    ([(2, 0.4), (1, 0.5)], [1]),
    ([(3, 0.9), (1, 0.5), (2, 0.7)], [1, 2, 0]),
    ([(1, 0.5), (1, 0.6), (2, 0.6)], [1]),
]


def test_the_frontier_is_what_nothing_beats_in_both() -> None:
    for points, best in FRONTIERS:
        places = [Place(str(i), m, m, m, a, a, a) for i, (m, a) in enumerate(points)]
        assert [int(place.label) for place in pareto.frontier(places)] == best


def test_memory_against_accuracy_names_the_frontier_and_what_is_not_a_devices_own() -> None:
    small, large = (family("fedmezo", 2, peak_device_bytes=m, best_accuracy=a) for m, a in ((10**7, 0.7), (10**8, 0.6)))
    large = Arm("fedavg", "fedavg", {}, large.runs)
    shared = Arm("fedspzo", "fedspzo", {}, (make_run("fedspzo", rounds=4, peak=None),))
    idle = Arm("public_only", "public_only", {}, (make_run("public_only", rounds=4),))
    drawing = pareto.pareto([small, large, shared, idle], looks.LIGHT)
    assert drawing is not None
    assert "no other beats in both: fedmezo. " in drawing.caption
    assert "share a process with the cloud: fedspzo, public_only." in drawing.caption
    assert drawing.alt.endswith("fedmezo 0.700 at 10 MB; fedavg 0.600 at 100 MB.")
    assert {text.get_text() for text in drawing.figure.axes[0].texts} == {"fedmezo"}
    assert pareto.pareto([small, shared, idle], looks.DARK) is None, "one arm alone has memory of its own"


#: Smallest and largest memory of the arms; where the axis begins at 0, and whether it is logarithmic.
AXES = [((10, 100), True, False), ((80, 100), False, False), ((100, 100), True, False), ((1, 100), False, True)]


def test_the_memory_axis_is_cut_or_logarithmic_where_arms_would_lie_on_top_of_each_other() -> None:
    for (least, most), whole, log in AXES:
        pair = [family(m, 1, peak_device_bytes=peak) for m, peak in (("fedmezo", least), ("fedavg", most))]
        drawing = pareto.pareto(pair, looks.LIGHT)
        assert drawing is not None
        (axes,) = drawing.figure.axes
        assert (axes.get_xlim()[0] == 0, axes.get_xscale() == "log") == (whole, log), (least, most)
        assert ("does not begin at 0" in drawing.caption) == (not whole and not log)


def test_memory_and_accuracy_have_their_range_over_seeds() -> None:
    runs = family("fedmezo", 2).runs
    wide = Arm(
        "fedmezo", "fedmezo", {}, tuple(fixed(r, peak_device_bytes=m) for r, m in zip(runs, (20, 40), strict=True))
    )
    drawing = pareto.pareto([wide, family("fedavg", 1)], looks.LIGHT)
    assert drawing is not None
    ends = [path.vertices[:, 0].tolist() for lines in drawing.figure.axes[0].collections for path in lines.get_paths()]
    assert [20, 40] in ends


def test_speed_ups_compare_the_same_seeds_on_more_ranks() -> None:
    seconds = {1: 1.2, 2: 0.8, 4: 0.3}
    runs = [
        fixed(make_run("fedmezo", ranks=ranks, seed=seed, rounds=4, spans=False), round_s_median=s * (1 + seed))
        for ranks, s in seconds.items()
        for seed in (0, 1, 2)
    ]
    for run in runs:
        run.provenance["cores"] = 2
    grid = speedup.speedup_grid(arms.group([*runs, make_run("fedavg", rounds=4)]))
    assert grid is not None
    assert cells(grid) == {
        "fedmezo (ranks = 1)": ("1", "3", "2.4 s", "1.00", "1.00", "2"),
        "fedmezo (ranks = 2)": ("2", "3", "1.6 s", "1.50", "0.75", "2"),
        "fedmezo (ranks = 4)": ("4 *", "3", "600 ms", "4.00", "1.00", "2"),
    }
    assert speedup.speedup_grid(arms.group(runs[:3])) is None
    others = [make_run("fedmezo", ranks=ranks, rounds=4, settings={"lr": ranks / 10}) for ranks in (1, 2)]
    assert speedup.speedup_grid(arms.group(others)) is None, "these differ by more than their ranks"


def test_the_best_arms_are_those_with_the_best_means() -> None:
    good = family(
        "cooperllm", 2, best_accuracy=0.9, peak_device_bytes=5 * 10**7, rounds_to_target=3, round_s_median=2.0
    )
    cheap = family("fedmezo", 2, best_accuracy=0.8, peak_device_bytes=10**7, rounds_to_target=9, round_s_median=1.0)
    found = {h.heading: (h.value, h.label) for h in highlights.highlights([good, cheap])}
    assert found["highest accuracy (best on dev)"] == ("0.900", "cooperllm")
    assert found["fewest rounds to target"] == ("3", "cooperllm")
    assert found["least device memory"] == ("10 MB", "fedmezo")
    assert found["shortest round"] == ("1 s", "fedmezo")
    never = Arm("x", "x", {}, (good.runs[0], fixed(good.runs[1], rounds_to_target=None)))
    found = {h.heading: (h.value, h.label) for h in highlights.highlights([never, cheap])}
    assert found["fewest rounds to target"] == ("9", "fedmezo")
    assert highlights.highlights([good]) == []


def test_arms_that_share_a_place_are_counted_and_idle_devices_have_none() -> None:
    arms_ = [family(m, 1, rounds_to_target=3, peak_device_bytes=10**7) for m in ("cooperllm", "fedmezo", "fedspzo")]
    idle = family("public_only", 1, rounds_to_target=4, peak_device_bytes=10**6, device_flops=0.0)
    found = {h.heading: (h.value, h.label) for h in highlights.highlights([*arms_, idle])}
    assert found["least device memory"] == ("10 MB", "cooperllm and 2 others")
    assert found["fewest rounds to target"] == ("3", "cooperllm and 2 others")
    assert found["least sent in a round"] == ("4 B", "cooperllm and 1 other")


def test_the_command_line_chooses_the_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("fedmezo", "fedavg"):
        run = make_run(method, rounds=4, spans=False)
        writer.write(tmp_path / "runs" / f"{run.summary.run_id}.h5", run)
    words = ["report", str(tmp_path / "runs"), "--out", str(tmp_path / "report")]
    assert main([*words, "--baseline", "fedavg"]) == EXIT_OK
    assert "## Paired with fedavg" in (tmp_path / "report" / "report.md").read_text()
    assert main([*words, "--baseline", "nobody"]) == EXIT_USER
    assert "--baseline: found 'nobody'; allowed: fedmezo, fedavg" in capsys.readouterr().err


def test_labels_of_arms_that_lie_close_stand_one_above_the_other() -> None:
    figures = {"cooperllm": (29, 0.928), "cooperllm_plus": (30, 0.929), "fedavg": (90, 0.94)}
    near = [family(m, 1, peak_device_bytes=peak, best_accuracy=best) for m, (peak, best) in figures.items()]
    drawing = pareto.pareto(near, looks.LIGHT)
    assert drawing is not None
    drawing.figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in drawing.figure.axes[0].texts]
    assert len(boxes) == 3
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
