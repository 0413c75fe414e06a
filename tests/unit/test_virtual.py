"""Rounds on a virtual clock: who drops out or comes late changes what is combined, and nothing else does."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinyruns import SMALL, WORKING, Tiny, make, make_job, same, shrunk, weights

from fedbench.algorithms.base import Round
from fedbench.base import config
from fedbench.base.config import Setting
from fedbench.base.errors import ConfigError
from fedbench.data import embedded
from fedbench.data.private import Keyed
from fedbench.run import build
from fedbench.run.build import Built
from fedbench.run.callbacks.checkpoint import state_of, take_up
from fedbench.run.ckpt import Checkpoint
from fedbench.run.traffic import ID_BYTES
from fedbench.sim import draws
from fedbench.sim.scene import Scene, scene_of

JOB = Path(__file__).resolve().parents[2] / "jobs" / "scale_1e6.toml"

#: Settings that keep a method's rounds short; FwdLLM asks once.
SHORT: dict[str, Any] = {
    "model.trainable": "bitfit",
    "method.fwdllm.variance_threshold": 0,
    "method.baffle.k": 3,
    "method.ferret.candidates": 12,
    "method.cooperllm_plus.p2": 4,
    "federation.devices": 6,
    "data.public_per_class": 4,
    "run.rounds": 3,
}
VIRTUAL: dict[str, Any] = {
    "link.clock": "virtual",
    "link.latency": "10ms",
    "link.jitter": "100ms",
    "profile.flops_per_s": 1e12,
}
DROPOUT = VIRTUAL | {"profile.dropout": 0.4}
#: Latency is 20 ms and jitter's two ways up to 200 ms more, so that about a quarter comes too late.
DEADLINE = VIRTUAL | {"profile.deadline_s": 0.15}


class Chosen(Built):
    """A run whose rounds ask the devices that it is told."""

    chosen: tuple[tuple[int, ...], ...] = ()

    def sampled(self, round_: int) -> tuple[int, ...]:
        return self.chosen[round_]


def asking(built: Built, chosen: list[tuple[int, ...]]) -> Built:
    """Return a run that asks certain devices in each round."""
    fields = {name: getattr(built, name) for name in built.__dataclass_fields__}
    made = Chosen(**fields)
    object.__setattr__(made, "chosen", tuple(chosen))
    return made


@pytest.mark.parametrize("method", WORKING)
def test_a_deadline_that_nobody_misses_is_no_deadline_and_the_clock_moves_no_bit(method: str) -> None:
    runs = []
    for changes in ({}, VIRTUAL, VIRTUAL | {"profile.deadline_s": 60.0}):
        tiny = Tiny(make(method, SHORT | {"run.rounds": 2} | changes, evaluated=4))
        tiny.run()
        runs.append((tiny.runner.trajectory.digest, tiny.metrics.rows[-1]["uplink_bytes"]))
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("method", WORKING)
def test_dropouts_are_as_if_the_others_alone_had_been_asked(method: str) -> None:
    tiny = Tiny(make(method, SHORT | DROPOUT, evaluated=4))
    outcomes = tiny.play(3)
    present = [outcome.present for outcome in outcomes]
    assert any(0 < len(devices) < 6 for devices in present)
    for outcome in outcomes:
        gone = [slot for slot, device in enumerate(outcome.devices) if device not in outcome.present]
        assert all(np.isnan(outcome.losses[slot]) and np.isnan(outcome.sim_device_s[slot]) for slot in gone)
        assert all(outcome.flops[s] == outcome.up_bytes[s] == outcome.down_bytes[s] == 0 for s in gone)
    other = Tiny(asking(make(method, SHORT, evaluated=4), present))
    again = other.play(3)
    assert same(weights(tiny.built.trainable), weights(other.built.trainable))
    assert tiny.runner.trajectory.digest == other.runner.trajectory.digest
    assert [o.down_bytes[o.devices.index(d)] for o in outcomes for d in o.present] == [
        b for o in again for b in o.down_bytes
    ]


@pytest.mark.parametrize("method", [name for name in WORKING if name != "spry"])  # its tensors are shared out before
def test_a_late_answer_is_as_if_it_had_not_been_asked(method: str) -> None:
    tiny = Tiny(make(method, SHORT | DEADLINE, evaluated=4))
    outcomes = tiny.play(3)
    came = [outcome.in_force for outcome in outcomes]
    assert any(0 < len(devices) < 6 for devices in came)
    late = [(o, slot) for o in outcomes for slot, counts in enumerate(o.answered) if not counts]
    for outcome, slot in late:
        assert outcome.sim_device_s[slot] > 0.15
        assert np.isnan(outcome.losses[slot])
        assert outcome.flops[slot] > 0
        assert outcome.up_bytes[slot] > 0
        assert outcome.times is not None
        assert outcome.times.total >= 0.15
    other = Tiny(asking(make(method, SHORT, evaluated=4), came))
    other.play(3)
    assert same(weights(tiny.built.trainable), weights(other.built.trainable))


def test_a_late_device_is_charged_for_what_it_was_sent_and_no_more() -> None:
    resend = {"comm.guide_reuse": "resend", "comm.codec": "int4", "run.rounds": 6, "federation.sampled": 4}
    tiny = Tiny(make("cooperllm", SHORT | DEADLINE | resend, evaluated=4))
    outcomes = tiny.play(6)
    last: dict[int, int] = {}
    seen = set()
    for number, outcome in enumerate(outcomes):
        for slot, device in enumerate(outcome.devices):
            seen.add((outcome.answered[slot], device in last))
            since = last.get(device, 0)
            replies = sum(o.reply_bytes + ID_BYTES * len(o.in_force) for o in outcomes[since:number] if o.reply_bytes)
            plans = sum(o.plan_bytes for o in outcomes[since + (device in last) : number])
            again = outcome.resent_bytes if outcome.answered[slot] else 0  # the update of those that came in time
            missed = min(replies + plans, 4 * tiny.built.trainable.size)
            assert outcome.down_bytes[slot] == missed + outcome.plan_bytes + again, (number, device)
            last[device] = number
    assert seen == {(a, b) for a in (True, False) for b in (True, False)}


def test_a_tree_decides_who_is_late_and_its_times_are_the_other_ones_of_the_star() -> None:
    narrow = {"profile.trunk": "1Mbit/s", "comm.edges": 3, "link.jitter": "0s", "run.rounds": 2}
    for deadline in ({}, {"profile.deadline_s": 0.6}):
        star, tree = (
            Tiny(make("cooperllm", SHORT | VIRTUAL | narrow | deadline | {"comm.topology": topology}, evaluated=4))
            for topology in ("star", "tree")
        )
        one, two = star.play(2), tree.play(2)
        if not deadline:
            for left, right in zip(one, two, strict=True):
                assert left.times is not None
                assert right.times is not None
                assert (left.times.total, left.sim_other_s) == (right.sim_other_s, right.times.total)
                assert left.times.total > right.times.total, "edges have trunks of their own"
        assert [len(outcome.in_force) for outcome in two] == [6, 6]
        assert [len(outcome.in_force) for outcome in one] == ([0, 0] if deadline else [6, 6])
        assert (star.runner.trajectory.digest == tree.runner.trajectory.digest) == (not deadline)


def test_sprys_tensors_stay_where_their_owner_is_late() -> None:
    tiny = Tiny(make("spry", SHORT | DEADLINE | {"federation.devices": 3}, evaluated=4))
    algorithm: Any = tiny.built.algorithm
    before = weights(tiny.built.trainable)
    (outcome,) = tiny.play(1)
    assert 0 < len(outcome.in_force) < 3
    at = Round(0, 0, outcome.devices, 0.1)
    owned = {t.name for device in outcome.in_force for t in algorithm.owned(at, device)}
    after = weights(tiny.built.trainable)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved
    assert moved <= owned < set(before)


@pytest.mark.parametrize("method", WORKING)
@pytest.mark.parametrize("changes", [{"profile.dropout": 1.0}, {"profile.deadline_s": 0.001}], ids=["dropout", "late"])
def test_a_round_that_nobody_answers_moves_nothing_and_is_told(method: str, changes: dict[str, Any]) -> None:
    tiny = Tiny(make(method, SHORT | VIRTUAL | changes | {"run.rounds": 2}, evaluated=4))
    before = weights(tiny.built.trainable)
    tiny.run()
    assert same(weights(tiny.built.trainable), before)
    for row, devices in zip(tiny.metrics.rows[1:], tiny.metrics.device_rows, strict=True):
        assert row["answered"] == 0
        assert np.isnan(row["device_loss"])
        assert set(devices["answered"]) == {0}
        assert (row["device_flops"] > 0) == (row["uplink_bytes"] > 0) == ("profile.deadline_s" in changes)
        assert 0.0 < row["sim_s"] < 1.0


@pytest.mark.parametrize("guide_every", [0, 2])
def test_guides_of_a_round_that_nobody_answered_serve_later_ones(guide_every: int) -> None:
    changes = {"method.cooperllm.guide_every": guide_every, "run.rounds": 4, "run.seed": 0} | DROPOUT
    empty_first = next(
        seed
        for seed in range(200)
        if build_scene(changes | {"run.seed": seed, "federation.devices": 2}).present(0, (0, 1)) == ()
        and build_scene(changes | {"run.seed": seed, "federation.devices": 2}).present(1, (0, 1))
    )
    tiny = Tiny(make("cooperllm", SHORT | changes | {"run.seed": empty_first, "federation.devices": 2}, evaluated=4))
    first, second = tiny.play(2)
    assert first.plan_bytes > 0
    assert second.plan_bytes == 0
    assert second.in_force
    assert np.isfinite(second.losses).any()


def build_scene(changes: dict[str, Any]) -> Scene:
    """Return the scene of a small job."""
    scene = scene_of(make_job("cooperllm", SHORT | changes).config)
    assert scene is not None
    return scene


def test_several_exchanges_lose_devices_one_after_the_other() -> None:
    changes = SHORT | DEADLINE | {"federation.local_steps": 4, "federation.devices": 12, "run.rounds": 4}
    for method in ("cooperllm", "fwdllm", "baffle"):
        more = {"method.fwdllm.variance_threshold": 1e-9, "method.fwdllm.max_directions": 2}
        tiny = Tiny(make(method, changes | more, evaluated=4))
        outcomes = tiny.play(4)
        assert any(outcome.exchanges > 2 and 0 < len(outcome.in_force) < 10 for outcome in outcomes), method
        assert all(np.isfinite(values).all() for values in weights(tiny.built.trainable).values())


@pytest.mark.parametrize("method", ["cooperllm", "fwdllm", "fedkseed", "public_only"])
def test_a_resumed_run_knows_who_missed_what(method: str) -> None:
    changes = SHORT | DEADLINE | {"profile.dropout": 0.3, "run.rounds": 5, "run.train_every": 2, "profile.name": "wifi"}
    straight = Tiny(make(method, changes, evaluated=4))
    straight.run()
    first = Tiny(make(method, changes, evaluated=4))
    assert first.run(wants_to_stop=lambda: first.runner.next_round == 3) == "stopped"
    second = Tiny(make(method, changes, evaluated=4))
    kept = state_of(first.runner, first.metrics)
    take_up(Checkpoint(kept.arrays, json.loads(json.dumps(kept.state))), second.runner, second.metrics)
    second.run()
    assert second.runner.trajectory.digest == straight.runner.trajectory.digest
    for column in ("sim_s", "sim_other_s", "sim_bound_s", "downlink_bytes", "answered", "trained", "device_flops"):
        found = [[row[column] for row in tiny.metrics.rows[1:]] for tiny in (second, straight)]
        np.testing.assert_array_equal(*found)


#: Settings, and which of six rounds train, one in three being due: plans that are kept; coded ones that are sent again
#: for a second probe and for updates; plans of every second round; devices that drop out.
RESEND = {"comm.guide_reuse": "resend", "comm.codec": "int4", "federation.local_steps": 2, "federation.devices": 2}
SENDING: list[tuple[dict[str, Any], list[int]]] = [
    ({}, [0, 3]),
    (RESEND, [0, 3]),
    ({"method.cooperllm.guide_every": 2}, [0, 1, 3]),
    ({"profile.dropout": 0.3, "federation.local_steps": 2}, [0, 3]),
]


@pytest.mark.parametrize(("sending", "due"), SENDING, ids=["keep", "resend", "every second", "dropouts"])
def test_rounds_that_are_timed_count_as_the_last_that_trained(sending: dict[str, Any], due: list[int]) -> None:
    changes = SHORT | VIRTUAL | {"run.train_every": 3, "run.rounds": 6, "profile.name": "lte", "link.jitter": "0s"}
    changes |= sending
    tiny = Tiny(make("cooperllm", changes, evaluated=4))
    start = weights(tiny.built.trainable)
    seen, rows = [], []
    for _ in range(6):
        (outcome,) = tiny.play(1)
        seen.append(weights(tiny.built.trainable))
        rows.append(outcome)
    for number, (before, after) in enumerate(zip([start, *seen], seen, strict=False)):
        assert rows[number].trained == (number in due) == (not same(before, after)), number
    played = Tiny(make("cooperllm", changes | {"run.train_every": 1}, evaluated=4)).play(6)
    for timed, real in zip(rows, played, strict=True):
        assert (timed.flops, timed.up_bytes, timed.down_bytes) == (real.flops, real.up_bytes, real.down_bytes)
        assert (timed.plan_bytes, timed.reply_bytes, timed.cloud_flops) == (
            real.plan_bytes, real.reply_bytes, real.cloud_flops,
        )  # fmt: skip
        assert (timed.resent, timed.resent_bytes, timed.told) == (real.resent, real.resent_bytes, real.told)
        assert (timed.resent_bytes > 0) == (sending is RESEND)
        assert timed.replay_ops == real.replay_ops
        assert (timed.answered, timed.took_part) == (real.answered, real.took_part)
        np.testing.assert_array_equal(timed.sim_device_s, real.sim_device_s)
        assert timed.times == real.times


def test_a_trained_round_that_nobody_answered_is_no_model_for_timed_ones() -> None:
    """Round 0 loses everybody, so the first round with a device trains; a later lost one does not replace it."""
    changes = SHORT | DROPOUT | {"run.train_every": 2, "run.rounds": 8, "federation.devices": 1, "profile.dropout": 0.5}
    seed = next(
        seed
        for seed in range(500)
        if [bool(build_scene(changes | {"run.seed": seed}).present(r, (0,))) for r in range(4)]
        == [False, True, False, True]
    )
    tiny = Tiny(make("fedmezo", changes | {"run.seed": seed}, evaluated=4))
    outcomes = tiny.play(4)
    assert [outcome.trained for outcome in outcomes] == [True, True, True, False]
    assert [outcome.whole for outcome in outcomes[:3]] == [False, True, False]
    timed, real = outcomes[3], outcomes[1]
    assert (timed.flops, timed.up_bytes) == (real.flops, real.up_bytes)
    assert timed.flops[0] > 0


def test_a_guide_made_ahead_needs_every_round_trained() -> None:
    with pytest.raises(ConfigError, match=r"comm.guide_lag: found 1 with run.train_every = 2"):
        build_scene(VIRTUAL | {"comm.guide_lag": 1, "run.train_every": 2})


def test_both_topologies_see_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    lognormal = draws.lognormal
    monkeypatch.setattr(
        draws, "lognormal", lambda seed, purpose, *rest: asked.append(purpose) or lognormal(seed, purpose, *rest)
    )
    (outcome,) = Tiny(make("fedmezo", SHORT | VIRTUAL | {"profile.spread": 0.5}, evaluated=4)).play(1)
    assert asked == ["device speed", "link rate"], "drawn once for the star and the tree"
    assert outcome.sim_other_s > 0


def test_simulated_time_is_the_same_on_a_second_run_and_depends_on_the_seed() -> None:
    changes = SHORT | DROPOUT | {"profile.name": "lte", "profile.spread": 0.5}
    found = []
    for seed in (1, 1, 2):
        tiny = Tiny(make("fedmezo", changes | {"run.seed": seed}, evaluated=4))
        found.append([outcome.sim_device_s for outcome in tiny.play(2)])
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2], equal_nan=True)


def test_keyed_rows_are_a_devices_own_and_need_no_other_device() -> None:
    rows = Keyed(seed=3, alpha=0.3, rows=40, batch_size=8)
    last = rows.rows(10**12)
    assert len(last) == 40
    assert Keyed(3, 0.3, 40, 8).rows(10**12).sha256() == last.sha256()
    assert len({Keyed(3, 0.3, 40, 8).rows(d).sha256() for d in range(20)} | {last.sha256()}) == 21
    assert Keyed(4, 0.3, 40, 8).rows(10**12).sha256() != last.sha256()
    batch = rows.batch(0, 0, 7)
    assert batch.ids.shape == (8, embedded.LENGTH)
    assert not np.array_equal(rows.batch(1, 0, 7).ids, batch.ids)
    np.testing.assert_array_equal(rows.batch(0, 0, 7).ids, batch.ids)
    shares = [np.bincount(Keyed(3, alpha, 4000, 8).rows(0).groups, minlength=8) / 4000 for alpha in (0.05, 1000.0)]
    assert shares[0].max() > 0.5
    assert shares[1].max() < 0.16


def test_keyed_rows_of_text_are_refused() -> None:
    config = make_job("fedmezo", {"federation.partition": "keyed", "data.private": "embedded"}).config
    text = config.model_copy(update={"data": config.data.model_copy(update={"private": "trec"})})
    with pytest.raises(ConfigError, match=r"federation.partition: found 'keyed' with data.private = 'trec'"):
        build.private_rows(text, make("fedmezo", SMALL).splits.train)


def test_the_job_of_a_million_devices_trains_times_and_loses_some() -> None:
    fewer = {("federation", "sampled"): 20, ("run", "rounds"): 22, ("run", "eval_every"): 22}
    loaded = config.load(JOB, [Setting(path, value) for path, value in fewer.items()])
    tiny = Tiny(shrunk(build.construct(build.resolve(loaded, str(JOB))), 8))
    assert tiny.run() == "rounds"
    rows = tiny.metrics.rows[1:]
    assert [row["round"] for row in rows if row["trained"]] == [0, 20]
    answered = [row["answered"] for row in rows]
    assert max(answered) <= 20
    assert 0 < min(answered) < 20, "some drop out"
    for row in rows:
        assert 0 < row["sim_s"] <= 10.0 + 1e-6, "the deadline, in the one exchange of a round"
        assert 0 < row["sim_other_s"] != row["sim_s"], "the tree beside the star"
        assert row["device_flops"] == rows[0]["device_flops"]


def test_a_million_devices_cost_what_the_sampled_ones_do() -> None:
    changes = SHORT | DROPOUT | {
        "federation.partition": "keyed", "federation.devices": 10**6, "federation.sampled": 20, "run.train_every": 50,
        "run.rounds": 100,
    }  # fmt: skip
    tiny = Tiny(make("cooperllm", changes, evaluated=4))
    tiny.play(2)
    tracemalloc.start()
    outcomes = tiny.play(30)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2_000_000
    assert max(device for outcome in outcomes for device in outcome.devices) > 900_000
    assert all(len(outcome.devices) == 20 for outcome in outcomes)
    assert not any(outcome.trained for outcome in outcomes)
