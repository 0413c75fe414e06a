"""Claims: the arithmetic of each on made-up runs, the rule of verdicts, the verb, and one claim from end to end."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbench.__main__ import main
from fedbench.base import config
from fedbench.base.errors import EXIT_OK, EXIT_USER, DataError
from fedbench.base.records import Run
from fedbench.batch import lanes, manifest
from fedbench.run.build import Built, Job
from fedbench.verify import catalogue, command, cooperllm, fedspzo, memory, page, plus, run, table, tasks, traffic
from fedbench.verify.claims import (
    NOT_REPRODUCED,
    PARTLY,
    REPRODUCED,
    UNTESTED,
    Claim,
    Found,
    Goal,
    Measured,
    Untold,
    judge,
)
from fedbench.verify.tasks import EMBEDDED, GUIDED, POOR, Scale, Task
from tests.unit.synthetic_runs import make_run

SMALL_PROCESS = str(Path(__file__).with_name("small_process.py"))
TARGET = 0.8


def made(
    accuracies: Sequence[float],
    *,
    seed: int = 2000,
    flops: float = 1.0,
    up: int = 4,
    down: int = 8,
    method: str = "fedmezo",
) -> Run:
    """Return a run with these accuracies (start, then one a round) on dev and test, and these costs of each round."""
    rounds = len(accuracies) - 1
    base = make_run(method, rounds=rounds, seed=seed, eval_every=1, target=TARGET, spans=False)
    values = np.array(accuracies)
    done = np.arange(rounds + 1) > 0
    columns = base.rounds | {
        "dev_accuracy": values,
        "test_accuracy": values,
        "device_flops": np.where(done, flops, 0.0),
        "uplink_bytes": np.where(done, up, 0),
        "downlink_bytes": np.where(done, down, 0),
    }
    reached = np.flatnonzero(values >= TARGET)
    summary = base.summary.model_copy(
        update={
            "rounds": rounds,
            "device_flops": flops * rounds,
            "rounds_to_target": int(reached[0]) if len(reached) else None,
            "final_accuracy": float(values[-1]),
        }
    )
    return dataclasses.replace(base, rounds=columns, summary=summary)


def ramp(reach: int, rounds: int, *, flops: float = 1.0, seed: int = 2000, top: float = 0.85) -> Run:
    """Return a run that is at .6 until it reaches `top` after `reach` rounds and stays there."""
    return made(([0.6] * reach + [top] * (rounds + 1))[: rounds + 1], flops=flops, seed=seed)


def found(task: Task = EMBEDDED, lost: Mapping[str, Mapping[int, str]] | None = None, **arms: Sequence[Run]) -> Found:
    """Return what was run of a task; `_` in names of arms stands for a space where the task has such an arm."""
    names = {arm.name.replace(" ", "_").replace("-", "_"): arm.name for arm in task.arms}
    runs = {names.get(name, name): {one.summary.seed: one for one in own} for name, own in arms.items()}
    return Found(task, runs, lost or {}, {})


def both(make: Any, *pairs: tuple[int, int], flops: float = 1.0) -> list[Run]:
    """Return one run a seed, from pairs of (rounds to target, rounds)."""
    return [make(reach, rounds, flops=flops, seed=2000 + i) for i, (reach, rounds) in enumerate(pairs)]


NEVER = 10_000

#: What CooperLLM does, arm -> its runs, and value, low, high, bound.
RACES: list[tuple[str, list[tuple[int, int]], dict[str, tuple[list[tuple[int, int]], float]], tuple[Any, ...]]] = [
    ("the faster baseline counts", [(4, 40)], {"fedzo": ([(20, 40)], 1), "baffle": ([(30, 40)], 1)}, (5, 5, 5, False)),
    ("rounds at equal FLOPs", [(4, 40)], {"fedzo": ([(20, 40)], 3.0)}, (15, 15, 15, False)),
    ("twice the FLOPs may lose", [(4, 40)], {"fedzo": ([(20, 40)], 2), "baffle": ([(30, 40)], 1)}, (7.5, 7.5, 7.5, False)),
    ("never: a bound", [(4, 40)], {"fedzo": ([(NEVER, 60)], 1)}, (15, 15, 15, True)),
    ("never, the shorter bound", [(4, 40)], {"fedzo": ([(NEVER, 60)], 1), "baffle": ([(NEVER, 40)], 1)}, (10, 10, 10, True)),
    ("never beside one that did", [(4, 40)], {"fedzo": ([(NEVER, 40)], 1), "baffle": ([(36, 40)], 1)}, (9, 9, 9, False)),
    ("median over seeds", [(2, 9), (2, 9), (2, 9)], {"fedzo": ([(10, 50), (20, 50), (40, 50)], 1)}, (10, 5, 20, False)),
    ("one never leaves the median", [(2, 9)] * 3, {"fedzo": ([(10, 50), (20, 50), (NEVER, 50)], 1)}, (10, 5, 25, False)),
    ("one never, too early to say", [(2, 9)] * 3, {"fedzo": ([(10, 50), (40, 50), (NEVER, 10)], 1)}, (5, 5, 20, True)),
    ("two seeds, one never", [(2, 9)] * 2, {"fedzo": ([(10, 50), (NEVER, 50)], 1)}, (15, 5, 25, True)),
    ("ours never, theirs did", [(NEVER, 40)], {"fedzo": ([(20, 40)], 1)}, (0, 0, 0, False)),
]  # fmt: skip


@pytest.mark.parametrize(("ours", "baselines", "expected"), [r[1:] for r in RACES], ids=[r[0] for r in RACES])
def test_convergence_is_against_the_best_baseline_at_equal_flops(
    ours: Any, baselines: Any, expected: tuple[Any, ...]
) -> None:
    arms = {name: both(ramp, *pairs, flops=flops) for name, (pairs, flops) in baselines.items()}
    value = cooperllm.convergence(found(cooperllm=both(ramp, *ours), **arms))
    assert isinstance(value, Measured)
    assert value[:4] == pytest.approx(expected)
    assert value.detail[0].startswith("Best baseline: ")


def test_from_six_seeds_on_the_interval_is_a_rank_interval() -> None:
    ours = both(ramp, *[(1, 9)] * 8)
    theirs = both(ramp, *[(reach, 50) for reach in (10, 11, 12, 13, 14, 15, 16, 40)])
    value = cooperllm.convergence(found(cooperllm=ours, fedzo=theirs))
    assert isinstance(value, Measured)
    assert value[:4] == (13.5, 10, 40, False)  # n = 8: from the smallest to the largest


def test_seeds_that_diverged_count() -> None:
    theirs = both(ramp, (20, 40), (20, 40))
    gone = found(cooperllm=both(ramp, (4, 40)), fedzo=theirs, lost={"cooperllm": {2001: "loss is nan"}})
    value = cooperllm.convergence(gone)
    assert isinstance(value, Measured)
    assert value[:3] == (2.5, 0, 5)
    assert "cooperllm diverged on 1 seed(s): 2001." in value.detail
    # a baseline that diverged on two of three seeds isn't the best one
    seeds = both(ramp, (4, 40), (4, 40), (4, 40))
    other = found(
        cooperllm=seeds,
        fedzo=both(ramp, (8, 40)),
        baffle=both(ramp, (32, 40), (32, 40), (32, 40)),
        lost={"fedzo": {2001: "nan", 2002: "nan"}},
    )
    value = cooperllm.convergence(other)
    assert isinstance(value, Measured)
    assert value.value == 8
    assert value.detail[0].startswith("Best baseline: baffle.")


def test_what_can_not_be_measured_says_why() -> None:
    for measure in (cooperllm.convergence, cooperllm.accuracy, cooperllm.over_public_only, plus.over_zo):
        value = measure(found(fedzo=[ramp(20, 40)]))
        assert isinstance(value, Untold)
        assert "has no run on embedded" in value.why
    assert isinstance(cooperllm.convergence(found(cooperllm=[ramp(4, 40)])), Untold)
    neither = cooperllm.convergence(found(cooperllm=[ramp(NEVER, 40)], fedzo=[ramp(NEVER, 40)]))
    assert isinstance(neither, Untold)
    assert "neither" in neither.why
    early = cooperllm.accuracy(found(cooperllm=[ramp(2, 10)], fedzo=[ramp(20, 40)]))
    assert isinstance(early, Untold)
    assert "not converged" in early.why


def test_accuracy_is_taken_where_cooperllm_has_converged() -> None:
    # it has converged after 4 rounds: from there it rises by less than a point in 20; the best baseline has .8 there
    ours = [made([0.6, 0.7, 0.8, 0.85, 0.9, *[0.905] * 30])]
    value = cooperllm.accuracy(
        found(cooperllm=ours, fedzo=[made([0.6] * 3 + [0.8] * 9)], baffle=[made([0.7] * 12)], fwdllm=[made([0.6] * 3)])
    )
    assert isinstance(value, Measured)
    assert value[:3] == pytest.approx((10.0, 10.0, 10.0))
    assert "fwdllm ended before that point." in value.detail
    # at twice the FLOPs a round, the baseline has done 2 rounds where CooperLLM has done 4
    value = cooperllm.accuracy(found(cooperllm=ours, fedzo=[made([0.6] * 3 + [0.8] * 9, flops=2.0)]))
    assert isinstance(value, Measured)
    assert value.value == pytest.approx(30.0)


def test_public_only_is_compared_at_equal_rounds_and_best_on_dev() -> None:
    ours = [made([0.6, 0.7, 0.9, 0.8], seed=s) for s in (2000, 2001)]
    control = [
        made([0.6, 0.86, 0.8, 0.8, 0.99], flops=0.0, seed=2000),
        made([0.6, 0.9, 0.5, 0.8], flops=0.0, seed=2001),
    ]
    value = cooperllm.over_public_only(found(cooperllm=ours, public_only=control))
    assert isinstance(value, Measured)
    assert value[:3] == pytest.approx((2.0, 0.0, 4.0))


def test_fedspzo_is_measured_in_flops_and_shows_its_controls() -> None:
    task = tasks.EMBEDDED
    arms = {
        "fedspzo_B1": [ramp(10, 40, flops=2.0)],
        "fedspzo_Ac": [ramp(15, 40, flops=2.0)],
        "first_block_frozen": [ramp(10, 40, flops=1.0)],
    }
    baselines = {"fedmezo": [ramp(60, 90, flops=1.5)], "fedzo": [ramp(80, 90)]}
    value = fedspzo.compute(found(task, **arms, **baselines))
    assert isinstance(value, Measured)
    assert value.value == 4.0  # 80 over 20
    told = " ".join(value.detail)
    for words in (
        "Best baseline: fedzo.",
        "and its tuning ([tuning.md](tuning.md)): 4x to",
        "estimator Ac: 2.67x",
        "block 1 frozen: 8x",
        "fedspzo B1 ends at 85.0",
    ):
        assert words in told
    value = fedspzo.over_blockwise(found(task, **arms, **{"block_wise_MeZO": [ramp(30, 40)]}))
    assert isinstance(value, Measured)
    assert value.value == 1.5
    assert fedspzo.compute(found(task, fedmezo=[ramp(1, 2)])) == Untold("fedspzo B1 has no run on embedded")


def test_plus_counts_the_smallest_lead_over_all_budgets() -> None:
    unit = [made([0.6] * 11 + [0.7] * 30, flops=2.0)]
    ours = [made([0.6] * 10 + [0.8] * 31, flops=2.0)]
    at = found(
        POOR,
        cooperllm=unit,
        cooperllm_plus=ours,
        public_only=[made([0.75] * 15 + [0.85] * 26, flops=0.0)],
        fedmezo=[made([0.6] * 41 + [0.79] * 40)],
        fwdllm=[made([0.7] * 30)],
    )
    # at 10, 20, 40 rounds: plus .8 .8 .8; cooper .6 .7 .7; public .75 .85 .85; fedmezo .6 .6 .79, fwdllm .7 then ended
    for measure, expected in ((plus.over_cooperllm, 10.0), (plus.over_public_only, -5.0), (plus.over_zo, 1.0)):
        value = measure(at)
        assert isinstance(value, Measured)
        assert value.value == pytest.approx(expected)
        assert "10: " in value.detail[0]
        assert "100: " not in value.detail[0]


def test_traffic_is_the_payload_both_ways() -> None:
    reference = [made([0.6] * 11, up=40_000, down=40_000)]
    value = traffic.decomfl(found(decomfl=[made([0.6] * 101, up=4, down=12)], fedavg=reference))
    assert isinstance(value, Measured)
    assert value[:3] == pytest.approx((0.0016, 0.0016, 0.0016))
    assert any("fedavg: 40 kB up" in text for text in value.detail)
    value = traffic.fedkseed(found(fedkseed=[made([0.6] * 11, up=1000, down=18_000)]))
    assert isinstance(value, Measured)
    assert value.value == pytest.approx(19 / 18)
    assert isinstance(traffic.fedkseed(found(fedavg=reference)), Untold)


def test_memory_is_saved_and_smaller_by_repetition() -> None:
    peaks = {"adamw": [1000.0, 2000.0], "zo_resident": [500.0, 500.0], "zo_mapped": [100.0, 100.0]}
    assert memory.saved(peaks)["weights mapped"][:3] == pytest.approx((100 * (1 - 1 / 15), 90.0, 95.0))
    assert memory.saved(peaks)["weights resident"][:3] == pytest.approx((100 * (1 - 1 / 3), 50.0, 75.0))
    assert memory.smaller(peaks)["weights mapped"][:3] == pytest.approx((15.0, 10.0, 20.0))


def test_memory_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(memory.memory, "measure", lambda arm, options: asked.append(arm) or {"peak_bytes": len(asked)})
    first, _ = memory.peaks_of(tasks.MEMORY[0], tmp_path)
    assert asked == [*memory.ARMS, *reversed(memory.ARMS)]
    assert first["adamw"] == [1.0, 6.0]
    again, origin = memory.peaks_of(tasks.MEMORY[0], tmp_path)
    assert (again, len(asked)) == (first, 6)
    assert origin["packages"]["torch"]
    quick, _ = memory.peaks_of(tasks.MEMORY[1], tmp_path)
    assert quick == {"adamw": [7.0], "zo_resident": [8.0], "zo_mapped": [9.0]}


def test_the_page_shows_every_arm_beside_public_only() -> None:
    at = found(
        POOR,
        lost={"fedzo": {2001: "loss is nan"}},
        cooperllm=[ramp(4, 40, seed=s) for s in (2000, 2001)],
        cooperllm_plus=[ramp(6, 40, seed=s, top=0.9) for s in (2000, 2001)],
        public_only=[ramp(4, 40, seed=s, flops=0.0, top=0.75) for s in (2000, 2001)],
        fedzo=[ramp(30, 40)],
    )
    rows = [command.measured(claim, {at.task.name: at})[0] for claim in catalogue.CLAIMS if POOR in claim.tasks]
    text = page.render(rows, [at], [], quick=True)
    for line in (
        "| cooperllm.convergence | embedded:poor | 7.5x | 7.5 to 7.5 | >= 8.8x | partly |",
        "- embedded:poor: partly. Best baseline: fedzo. cooperllm against each: fedzo 7.5x. cooperllm reached the target",
        "The target is looked for every 1 round(s) of cooperllm and every 1 round(s) of fedzo.",
        "fedzo diverged on 1 seed(s): 2001.",
        "| arm | seeds | 10 | 20 | 40 |",
        "| cooperllm_plus | 2 | 90.0 ± 0.0 | 90.0 ± 0.0 | 90.0 ± 0.0 |",
        "| public_only | +15.0 (+15.0 to +15.0) | +15.0 (+15.0 to +15.0) | +15.0 (+15.0 to +15.0) |",
        "| fedzo | 0.01 | 1 + 1 diverged | 85.0 | 1 of 2 | 30 | 30 | 4 B | 8 B | 40 |",
        "| commit | 0123456789ab |",
    ):
        assert line in text, line


RATIO = Goal("", 8.8, "times", 1.0)
POINTS = Goal("", 0.0, "points", 0.0)
BYTES = Goal("", 1.0, "times", 1.0, least=False)
VERDICTS = [
    (RATIO, Measured(8.8, 8, 9), REPRODUCED),
    (RATIO, Measured(8.7, 8, 9), PARTLY),
    (RATIO, Measured(20, 0.5, 30), PARTLY),
    (RATIO, Measured(1.0, 1.0, 1.0), NOT_REPRODUCED),
    (RATIO, Measured(9, 9, 9, bound=True), REPRODUCED),
    (RATIO, Measured(5, 5, 5, bound=True), PARTLY),
    (RATIO, Measured(0.5, 0.5, 0.5, bound=True), UNTESTED),
    (RATIO, Untold("no run"), UNTESTED),
    (POINTS, Measured(0.1, 0.05, 0.2), REPRODUCED),
    (POINTS, Measured(0.1, -0.1, 0.2), PARTLY),
    (POINTS, Measured(0.0, 0.0, 0.0), NOT_REPRODUCED),
    (POINTS, Measured(-1.0, -2.0, 1.0), NOT_REPRODUCED),
    (BYTES, Measured(0.02, 0.02, 0.02), REPRODUCED),
    (BYTES, Measured(0.9, 0.8, 1.1), PARTLY),
    (BYTES, Measured(1.05, 1, 1.1), NOT_REPRODUCED),
]


@pytest.mark.parametrize(("goal", "value", "verdict"), VERDICTS)
def test_verdicts(goal: Goal, value: Measured | Untold, verdict: str) -> None:
    row = judge(Claim("a.b", "c", goal), "embedded", value)
    assert row.verdict == verdict
    assert bool(row.why) == (verdict == UNTESTED)
    tree = row.tree()
    assert list(tree) == ["claim", "task", "measured", "low", "high", "goal", "verdict", "bound"]
    assert tree["bound"] is (isinstance(value, Measured) and value.bound)
    assert (tree["measured"] is None) == isinstance(value, Untold)
    assert len(table.cells(row)) == len(table.headings())


CHOICES = [
    ([], len(catalogue.CLAIMS)),
    (["cooperllm"], 4),
    (["fedspzo.compute", "fedspzo"], 2),
    (["plus.over"], 3),
    (["fedkseed"], 1),
]


@pytest.mark.parametrize(("words", "count"), CHOICES)
def test_claims_are_chosen_by_name_or_beginning(words: list[str], count: int) -> None:
    assert len(catalogue.choose(words)) == count


def test_every_claim_is_complete() -> None:
    assert len({claim.name for claim in catalogue.CLAIMS}) == len(catalogue.CLAIMS)
    for claim in catalogue.CLAIMS:
        kinds = [bool(claim.tasks), bool(claim.shapes), bool(claim.why)]
        assert sum(kinds) == 1, claim.name
        assert (claim.goal is None) == bool(claim.why)
        if claim.tasks:
            assert set(claim.arms) <= {arm.name for task in claim.tasks for arm in task.arms}, claim.name
        for task in claim.tasks:
            assert claim.arms[0] in {arm.name for arm in task.arms}, (claim.name, task.name)
            assert task.reference in {arm.name for arm in task.arms}


@pytest.mark.parametrize("quick", [False, True])
def test_every_run_of_every_claim_can_be_planned_with_a_step_size_of_its_job(tmp_path: Path, quick: bool) -> None:
    plans = run.plans(catalogue.CLAIMS, tmp_path, quick=quick)
    assert {plan.task.name for plan in plans} == {"embedded", "embedded:poor"} | (set() if quick else {"trec", "sst2"})
    for plan in plans:
        job = config.read(plan.task.path)
        assert job["run"]["target_accuracy"]
        for line in plan.sweep.lines:
            assert "lr" in job["method"].get(line.method, {}), f"{plan.task.path.name}: {line.method}"
            assert line.seed >= 2000
    assert not list(tmp_path.iterdir())


def test_an_unknown_claim_is_a_user_s_error(capsys: pytest.CaptureFixture[str]) -> None:
    for word, words in (
        ("coperllm", "Nearest: cooperllm"),
        ("plus.over_zoo", "Nearest: plus.over_zo"),
        ("", "allowed"),
    ):
        assert main(["verify", word]) == EXIT_USER
        told = capsys.readouterr()
        assert told.out == ""
        assert words in told.err
        assert "fedspzo.compute" in told.err


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Task:
    """The first task at the size of a test: 1 seed, 2 rounds, few rows to evaluate, and no other task."""
    monkeypatch.setattr(lanes, "WORKER", (SMALL_PROCESS,))
    monkeypatch.delenv("FEDBENCH_DATA", raising=False)
    task = dataclasses.replace(EMBEDDED, quick=Scale((2000,), 2, 2, guided_first=2, arms=GUIDED))
    claims = [
        dataclasses.replace(claim, tasks=(task,))
        for claim in catalogue.CLAIMS
        if claim.name == "cooperllm.over_public_only"
    ]
    others = [claim for claim in catalogue.CLAIMS if claim.why]
    monkeypatch.setattr(catalogue, "CLAIMS", (*claims, *others))
    return task


def test_a_machine_without_the_data_says_so(
    small: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(job: Job) -> Built:
        raise DataError("FEDBENCH_DATA: no folder trec.")

    monkeypatch.setattr(run, "construct", missing)
    assert main(["verify", "cooperllm", "--quick", "--results", str(tmp_path)]) == EXIT_OK
    told = " ".join(capsys.readouterr().out.split())
    assert UNTESTED in told
    assert "cooperllm has no run on embedded: FEDBENCH_DATA: no folder trec." in told
    assert not list(tmp_path.rglob("*.h5"))


def test_a_changed_job_replaces_the_manifest_and_keeps_what_was_run(small: Task, tmp_path: Path) -> None:
    first, second = (
        run.plans(
            [
                dataclasses.replace(
                    catalogue.CLAIMS[0], tasks=(dataclasses.replace(small, quick=Scale((2000,), n, 2, arms=GUIDED)),)
                )
            ],
            tmp_path,
            quick=True,
        )[0]
        for n in (2, 3)
    )
    run.save(first)
    kept = first.sweep.run_file(first.sweep.lines[0])
    kept.parent.mkdir()
    kept.write_bytes(b"a run")
    run.save(first)
    run.save(second)
    assert manifest.read(tmp_path / "embedded").lines == second.sweep.lines
    assert kept.read_bytes() == b"a run"
    assert set(second.lines) == {"cooperllm", "public_only", "shuffled labels"}
    assert {line.number for line in second.wanted.lines} == {0, 2, 3}


def test_one_claim_from_end_to_end(small: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["verify", "cooperllm", "agzo", "--quick", "--json", "--results", str(tmp_path), "--parallel", "1"]
    assert main([*words, "--dry-run"]) == EXIT_OK
    assert "3 of 3 run(s) would start" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    page_path = tmp_path / "claims.md"
    assert main([*words, "--page", str(page_path)]) == EXIT_OK
    rows = json.loads(capsys.readouterr().out)
    assert [(row["claim"], row["task"]) for row in rows] == [
        ("cooperllm.over_public_only", "embedded"),
        ("agzo.accuracy", "-"),
    ]
    assert rows[0]["low"] == rows[0]["measured"] == rows[0]["high"]
    assert math.isfinite(rows[0]["measured"])
    assert rows[1]["verdict"] == UNTESTED
    text = page_path.read_text()
    for word in ("## Runs on embedded", "| last run | 20", "| public_only |", "can't be tested here", "Published: "):
        assert word in text
    files = sorted(tmp_path.rglob("*.h5"))
    assert len(files) == 3
    stamps = [file.stat().st_mtime_ns for file in files]
    assert main([*words[:3], "--quick", "--results", str(tmp_path)]) == EXIT_OK
    told = capsys.readouterr()
    assert "over_public_only" in told.out.replace("\n", "")
    assert [file.stat().st_mtime_ns for file in files] == stamps, "what is done ran again"
