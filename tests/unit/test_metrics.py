"""Metrics: the guard against losses that resolve nothing, when a run is evaluated, and what is counted to the target."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tinyruns import Tiny, make, same, weights

from fedbench.base import records
from fedbench.base.errors import NumericsError
from fedbench.run import finish
from fedbench.run.build import Built
from fedbench.run.callbacks.checkpoint import state_of
from fedbench.run.callbacks.metrics import Metrics, evaluate
from fedbench.run.memory import CUMULATIVE, PHASES, Evaluating, device_peak
from fedbench.run.runner import Outcome

QUICK = {"model.trainable": "head", "federation.batch_size": 2}
NO_RANKS = finish.Ranks(np.ones((1, len(PHASES), 3), int), {name: np.empty(0) for name in records.SPAN_COLUMNS}, {})


def guarded(*zeros_of_scalars: tuple[int, int]) -> None:
    """Show metrics some rounds of (zeros, scalars)."""
    metrics = Tiny(make("fedmezo", QUICK, evaluated=4)).metrics
    for number, (zeros, scalars) in enumerate(zeros_of_scalars):
        metrics._guard(Outcome(number, scalars=scalars, zero_scalars=zeros))


def test_too_many_vanishing_differences_end_the_run() -> None:
    guarded((3, 300), (0, 50))  # 1 % is allowed
    guarded((299, 299))  # too few to judge
    with pytest.raises(NumericsError, match=r"Round 0: 4 of 300 loss differences are exactly zero \(allowed: 1%\)"):
        guarded((4, 300))
    with pytest.raises(NumericsError, match=r"Round 2: 8 of 450 .* Raise zo\.epsilon \(or method\.cooperllm\.h\)"):
        guarded((1, 150), (1, 149), (6, 151))
    guarded((3, 5), (0, 295))


def test_a_probing_step_below_what_losses_resolve_is_noticed_in_a_real_run() -> None:
    changes = QUICK | {"zo.epsilon": 1e-12, "zo.perturbations": 60, "federation.devices": 5}
    tiny = Tiny(make("fedmezo", changes, evaluated=4))
    with pytest.raises(NumericsError, match="Round 0: 300 of 300 loss differences are exactly zero"):
        tiny.run()
    enough = changes | {"zo.epsilon": 1e-3, "zo.perturbations": 4}
    (outcome,) = Tiny(make("fedmezo", enough, evaluated=4)).play(1)
    assert (outcome.scalars, outcome.zero_scalars) == (20, 0)


def test_the_guards_count_survives_a_stop() -> None:
    tiny, other = Tiny(make("fedmezo", QUICK, evaluated=4)), Tiny(make("fedmezo", QUICK, evaluated=4))
    tiny.metrics._guard(Outcome(0, scalars=200, zero_scalars=200))
    other.metrics.restore(tiny.metrics.state(), tiny.metrics.device_columns())
    with pytest.raises(NumericsError, match="300 of 300"):
        other.metrics._guard(Outcome(1, scalars=100, zero_scalars=100))


def evaluated_rounds(every: int, first: int = 0, rounds: int = 5) -> list[int]:
    changes = {"run.rounds": rounds, "run.eval_every": every, "run.eval_first": first}
    tiny = Tiny(make("fedmezo", QUICK | changes, evaluated=4))
    tiny.run()
    assert [row["round"] for row in tiny.metrics.rows] == list(range(-1, rounds))
    for row in tiny.metrics.rows:
        found = {"dev_accuracy", "dev_loss", "test_accuracy", "eval_s"} & row.keys()
        assert len(found) in (0, 4)
    return [int(row["round"]) for row in tiny.metrics.rows if "dev_accuracy" in row]


@pytest.mark.parametrize(
    ("every", "rounds"), [(1, [-1, 0, 1, 2, 3, 4]), (2, [-1, 1, 3, 4]), (5, [-1, 4]), (3, [-1, 2, 4]), (9, [-1, 4])]
)
def test_the_start_every_so_many_rounds_and_the_end_are_evaluated(every: int, rounds: list[int]) -> None:
    assert evaluated_rounds(every) == rounds


@pytest.mark.parametrize(
    ("every", "first", "rounds"), [(9, 2, [-1, 0, 1, 4]), (2, 3, [-1, 0, 1, 2, 3, 4]), (4, 1, [-1, 0, 3, 4])]
)
def test_the_first_rounds_can_all_be_evaluated(every: int, first: int, rounds: list[int]) -> None:
    assert evaluated_rounds(every, first) == rounds


def test_an_evaluation_is_that_of_the_plain_model_and_changes_nothing() -> None:
    built = make("fedmezo", evaluated=300)
    before = weights(built.trainable)
    accuracy, loss = evaluate(built.cut, built.splits.dev)
    batch = built.splits.dev.batch(np.arange(300))
    with torch.no_grad():
        logits = built.cut(batch).double()
    assert accuracy == float((logits.argmax(1) == batch.labels).double().mean())
    assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, batch.labels)), rel=1e-6)
    assert same(weights(built.trainable), before)


def test_every_column_of_the_record_is_filled_by_somebody() -> None:
    known = {"link.clock": "virtual", "profile.name": "wifi", "profile.device": "raspberry-pi-4"}
    tiny = Tiny(make("cooperllm", QUICK | known, evaluated=8))
    tiny.run()
    missing = {"zero_fraction", "device_loss", "cloud_loss", "query_radius", "lr"}
    assert set(tiny.metrics.rows[-1]) == set(records.ROUND_COLUMNS)
    assert all(set(row) == set(records.DEVICE_COLUMNS) for row in tiny.metrics.device_rows)
    record = finish.assemble(tiny.runner, tiny.metrics, NO_RANKS, "rounds", {})
    assert set(record.rounds) == set(records.ROUND_COLUMNS)
    for name, column in record.rounds.items():
        assert column.dtype == np.dtype(records.ROUND_COLUMNS[name].dtype)
        assert len(column) == 4
        assert np.isfinite(column[1:].astype(float)).all() == (name != "plan_s"), name
        if name in missing:
            assert np.isnan(column[0])
    assert all(table.shape == (3, 3) for table in record.devices.values())


def test_the_time_of_a_plan_is_known_on_a_paced_link_alone() -> None:
    for clock, known in (("paced", True), ("none", False)):
        tiny = Tiny(make("cooperllm", QUICK | {"link.clock": clock, "link.down": "8Mbit/s"}, evaluated=8))
        (outcome,) = tiny.play(1)
        assert outcome.plan_bytes > 0
        tiny.metrics.rows.append({})
        tiny.metrics.played(outcome)
        expected = outcome.plan_bytes / 1e6 if known else float("nan")
        assert tiny.metrics.rows[-1]["plan_s"] == pytest.approx(expected, nan_ok=True)


def test_the_time_of_a_plan_follows_the_profiles_link() -> None:
    tiny = Tiny(make("cooperllm", QUICK | {"link.clock": "paced", "profile.name": "lte"}, evaluated=8))
    (outcome,) = tiny.play(1)
    tiny.metrics.rows.append({})
    tiny.metrics.played(outcome)
    assert tiny.metrics.rows[-1]["plan_s"] == pytest.approx(8 * outcome.plan_bytes / 13e6)


def test_what_was_not_evaluated_is_missing_and_not_zero() -> None:
    tiny = Tiny(make("fedmezo", QUICK | {"run.eval_every": 3}, evaluated=8))
    tiny.run()
    record = finish.assemble(tiny.runner, tiny.metrics, NO_RANKS, "rounds", {})
    assert np.isnan(record.rounds["dev_accuracy"]).tolist() == [False, True, True, False]
    assert np.isnan(record.rounds["test_accuracy"]).tolist() == [False, True, True, False]
    assert np.isnan(record.rounds["cloud_loss"]).all()  # this cloud has no public loss
    assert record.summary.cloud_flops == 0


def test_a_run_without_devices_has_no_device_figures() -> None:
    tiny = Tiny(make("public_only", QUICK, evaluated=8))
    tiny.run()
    record = finish.assemble(tiny.runner, tiny.metrics, NO_RANKS, "rounds", {})
    assert np.isnan(record.rounds["device_loss"]).all()
    assert np.isnan(record.rounds["zero_fraction"]).all()
    assert record.devices["device"].shape == (3, 0)
    summary = record.summary
    assert (summary.uplink_bytes, summary.downlink_bytes, summary.device_flops) == (0, 0, 0.0)
    assert (summary.wire_bytes, summary.uplink_bytes_per_device_round) == (0, 0.0)


class Story:
    """A finished run of six rounds whose accuracies are made up; None where it was not evaluated."""

    def __init__(self, dev: list[float | None], test: list[float | None] | None = None, target: float | None = 0.8):
        changes: dict[str, Any] = QUICK | {"run.rounds": 6}
        if target is not None:
            changes["run.target_accuracy"] = target
        self.tiny = Tiny(make("fedmezo", changes, evaluated=4))
        for number, (dev_value, test_value) in enumerate(zip(dev, test or dev, strict=True)):
            row: dict[str, Any] = {"round": number - 1, "uplink_bytes": 4 if number else 0}
            if dev_value is not None:
                row |= {"dev_accuracy": dev_value, "test_accuracy": test_value}
            self.tiny.metrics.rows.append(row)
            if number:
                self.tiny.metrics.device_rows.append({key: np.zeros(3) for key in records.DEVICE_COLUMNS})

    def summary(self) -> records.Summary:
        return finish.assemble(self.tiny.runner, self.tiny.metrics, NO_RANKS, "rounds", {}).summary


@pytest.mark.parametrize(
    ("dev", "rounds"),
    [
        ([0.1, 0.2, 0.5, 0.8, 0.7, 0.6, 0.5], 3),  # the first time counts, and exactly the target is enough
        ([0.1, 0.2, 0.5, 0.7, 0.7, 0.6, 0.9], 6),
        ([0.8, 0.2, 0.5, 0.7, 0.7, 0.6, 0.9], 0),
        ([0.1, 0.9, 0.5, 0.7, 0.7, 0.6, 0.9], 1),
        ([0.1, None, 0.5, None, 0.9, None, 0.9], 4),  # known at the evaluation, not before
        ([0.1, 0.2, 0.5, 0.7, 0.7, 0.6, 0.799], None),
    ],
)
def test_rounds_to_target_are_the_completed_ones(dev: list[float | None], rounds: int | None) -> None:
    assert Story(dev).summary().rounds_to_target == rounds


def test_without_a_target_there_are_no_rounds_to_it() -> None:
    summary = Story([1.0] * 7, target=None).summary()
    assert (summary.rounds_to_target, summary.target_accuracy) == (None, None)


def test_the_best_accuracy_is_the_test_one_where_dev_is_best() -> None:
    dev = [0.1, 0.5, 0.9, None, 0.9, 0.3, 0.2]
    test = [0.15, 0.99, 0.7, None, 0.8, 0.3, 0.25]
    summary = Story(dev, test).summary()
    assert (summary.initial_accuracy, summary.best_accuracy, summary.final_accuracy) == (0.15, 0.7, 0.25)
    assert (summary.rounds, summary.uplink_bytes, summary.uplink_bytes_per_device_round) == (6, 24, 4.0)


def test_memory_is_that_of_ranks_that_host_devices_alone() -> None:
    tiny = Tiny(make("fedmezo", QUICK, evaluated=4))
    tiny.run()
    above = np.array([[0, 800, 890, 500], [0, 50, 160, 0], [0, 180, 180, 0]])
    peaks = np.where(above + np.array([1, 1, 1, 0]) > 0, above + 100, 0)
    memory = np.stack([peaks, above, np.full_like(peaks, 7)], axis=2)
    record = finish.assemble(tiny.runner, tiny.metrics, NO_RANKS._replace(memory=memory), "rounds", {})
    assert device_peak(memory, (1, 2)) == 180
    assert record.summary.peak_device_bytes is None  # this run's one rank is the cloud as well
    assert record.memory["above_import_bytes"].tolist() == [0, 800, 890, 500, 0, 50, 160, 0, 180, 180]
    assert record.memory["phase"].tolist() == [*PHASES, *PHASES[:3], *PHASES[:3]]
    assert set(record.memory["weights_bytes"].tolist()) == {7}
    together = finish.assemble(tiny.runner, tiny.metrics, NO_RANKS._replace(apart=False), "rounds", {})
    assert together.memory["phase"].tolist() == [phase + CUMULATIVE for phase in PHASES]
    alone = finish.assemble(tiny.runner, tiny.metrics, NO_RANKS, "rounds", {})
    assert alone.summary.peak_device_bytes is None


def dev_accuracy_after(built: Built, rounds: int) -> float:
    tiny = Tiny(built)
    tiny.play(rounds)
    return evaluate(built.cut, built.splits.dev)[0]


@pytest.mark.parametrize(("stop", "reason", "rounds"), [(True, "target", 1), (False, "rounds", 4)])
def test_a_run_stops_at_its_target_only_if_asked(stop: bool, reason: str, rounds: int) -> None:
    changes = QUICK | {"run.rounds": 4, "method.fedmezo.lr": 1e-9}
    reached = dev_accuracy_after(make("fedmezo", changes, evaluated=64), 1)
    changes |= {"run.target_accuracy": reached, "run.stop_at_target": stop}
    tiny = Tiny(make("fedmezo", changes, evaluated=64))
    assert tiny.run() == reason
    assert tiny.runner.next_round == rounds


def test_a_target_above_all_that_is_reached_stops_nothing() -> None:
    changes = QUICK | {"run.target_accuracy": 1.0, "run.stop_at_target": True}
    assert Tiny(make("fedmezo", changes, evaluated=64)).run() == "rounds"


def test_a_round_that_is_not_evaluated_can_not_reach_the_target() -> None:
    changes = QUICK | {"run.rounds": 4, "run.eval_every": 2, "run.target_accuracy": 0.0, "run.stop_at_target": True}
    tiny = Tiny(make("fedmezo", changes | {"run.target_accuracy": 0.01}, evaluated=64))
    assert tiny.run() == "target"
    assert tiny.runner.next_round == 2


def test_the_slowest_rank_counts_for_compute_time() -> None:
    tiny = Tiny(make("fedmezo", QUICK, evaluated=4))
    outcome = Outcome(0, devices=(0, 1, 4), compute_s=[0.5, 1.0, 0.25])
    assert tiny.metrics._slowest(outcome) == 1.75  # one rank hosts all

    class TwoHosts:
        def host_of(self, device: int) -> int:
            return device % 2

    tiny.runner.star = TwoHosts()  # type: ignore[assignment]
    assert tiny.metrics._slowest(outcome) == 1.0
    assert tiny.metrics._slowest(Outcome(0)) == 0.0


def test_a_resumed_run_does_not_evaluate_the_start_again() -> None:
    tiny = Tiny(make("fedmezo", QUICK, evaluated=4))
    tiny.metrics.started()
    other = Metrics(replace(tiny.built, cut=None), tiny.runner, tiny.clock)  # type: ignore[arg-type]
    other.restore(tiny.metrics.state(), tiny.metrics.device_columns())
    other.started()  # with a look at the model it would fail
    assert other.rows == tiny.metrics.rows
    assert other.probe_accuracy == tiny.metrics.probe_accuracy


def test_memory_hears_of_evaluations_alone() -> None:
    class Phases:
        def __init__(self) -> None:
            self.entered: list[str] = []

        def enter(self, phase: str) -> None:
            self.entered.append(phase)

    tiny, phases = Tiny(make("fedmezo", QUICK | {"run.rounds": 5, "run.eval_every": 2}, evaluated=4)), Phases()
    tiny.runner.run([Evaluating(tiny.metrics, phases)], lambda: False)  # type: ignore[arg-type]
    evaluated = [row["round"] for row in tiny.metrics.rows if "dev_accuracy" in row]
    assert evaluated == [-1, 1, 3, 4]
    assert phases.entered == ["evaluate", "train"] * 4


def test_what_grows_with_devices_is_kept_in_arrays() -> None:
    texts = []
    for devices in (3, 30):
        tiny = Tiny(make("fedmezo", QUICK | {"federation.devices": devices, "run.rounds": 2}, evaluated=4))
        tiny.run()
        kept = state_of(tiny.runner, tiny.metrics)
        texts.append(len(json.dumps(kept.state)))
        assert sum(a.nbytes for name, a in kept.arrays.items() if name.startswith("devices/")) == 64 * 2 * devices
        held = sum(a.nbytes for row in tiny.metrics.device_rows for a in row.values())
        assert held == 64 * 2 * devices
    assert abs(texts[1] - texts[0]) < 200


def test_the_mean_of_devices_with_different_bytes_is_a_whole_number() -> None:
    tiny = Tiny(make("fedmezo", QUICK | {"federation.devices": 6, "federation.sampled": 2}, evaluated=4))
    tiny.run()
    for row, devices in zip(tiny.metrics.rows[1:], tiny.metrics.device_rows, strict=True):
        assert row["downlink_bytes"] == round(float(np.mean(devices["downlink_bytes"])))
        assert row["device_flops"] == float(np.mean(devices["flops"]))
        assert row["device_loss"] == pytest.approx(float(np.mean(devices["loss"])))
