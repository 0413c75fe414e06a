"""FedSPZO: what each estimator sends, computes and moves; block 2 alone; the choice by probes, end to end."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_rows import COUNTED, P1, P2, SCALAR, STEPS, Costs, Entry, replay_fedspzo
from tinycuts import architecture, batch_for, plain_losses
from tinyruns import Tiny, drawn, flat, make, make_job, same, weights

from fedbench.algorithms.base import Round
from fedbench.algorithms.fedspzo import FedSPZO
from fedbench.base.account import Meter
from fedbench.base.errors import ConfigError
from fedbench.base.identity import config_sha256
from fedbench.models.trainable import select
from fedbench.run.build import Built
from fedbench.run.callbacks.checkpoint import SaveCheckpoint, take_up
from fedbench.run.ckpt import Store
from fedbench.zo.direction import as_keys, direction_key
from fedbench.zo.stream import Stream
from fedbench.zo.twoblock import Blocks

CHAINED = P1 * P2
#: Settings -> scalars of a step, forwards of block 1 and of block 2, runs of block 1 and of block 2, directions of z.
COSTS: dict[str, tuple[dict[str, Any], int, int, int, int, int, int]] = {
    "A": ({}, CHAINED, 2 * P1, 2 * CHAINED, P1, CHAINED, CHAINED),
    "Ac": ({}, CHAINED, 2 * P1, 2 * CHAINED, P1, CHAINED, CHAINED),
    "D": ({}, P1 + CHAINED, 2 * P1, 4 * CHAINED, P1, 2 * CHAINED, CHAINED),
    "B": ({}, P1 + P2, 1 + 2 * P1, 2 * P2 + 2 * P1, 1 + P1, P2 + P1, P2),
    "B1": ({}, P1 + P2, 1 + P1, 1 + P1 + P2, 1 + P1, 1 + P1 + P2, P2),
    "Z1": ({"estimator": "B1", "freeze_first": True}, P2, 1, 1 + P2, 1, 1 + P2, P2),
}
ESTIMATORS = pytest.mark.parametrize("estimator", COSTS)


def settings_of(estimator: str, **more: Any) -> dict[str, Any]:
    own = {"estimator": estimator, "lr_ratio": 1.7} | COSTS[estimator][0] | more
    return COUNTED | {"federation.devices": 2} | {f"method.fedspzo.{key}": value for key, value in own.items()}


@ESTIMATORS
def test_bytes_flops_and_runs_of_each_block_are_those_of_the_formulas(estimator: str) -> None:
    _, scalars, first, second, runs_first, runs_second, of_z = COSTS[estimator]
    built = make("fedspzo", settings_of(estimator))
    costs = Costs(built)
    (outcome,) = Tiny(built).play(1)
    assert outcome.up_bytes == [SCALAR * STEPS * scalars] * 2
    assert outcome.reply_bytes == 2 * SCALAR * STEPS * scalars
    assert outcome.flops == [STEPS * (first * costs.first + second * costs.second)] * 2
    of_y = 0 if estimator == "Z1" else P1
    assert outcome.replay_ops == 2 * STEPS * (of_y * costs.entries_of(True) + of_z * costs.entries_of(False))
    boundary, stages = costs.boundary, built.cut.stages
    runs = [2 * STEPS * runs_first] * boundary + [2 * STEPS * runs_second] * (stages - boundary)
    assert built.lab.stream.block_runs == runs


@ESTIMATORS
@pytest.mark.parametrize("split", [-1, 6, 1])
def test_the_weights_are_those_that_the_wire_rebuilds(estimator: str, split: int) -> None:
    built = make("fedspzo", settings_of(estimator, split=split, lr=0.01))
    start, entries = weights(built.trainable), list[Entry]()
    apply = built.algorithm.apply

    def note(round_: Any, plan: Any, reply: Any) -> None:
        entries.append((round_, plan, {name: np.array(array) for name, array in reply.items()}))
        apply(round_, plan, reply)

    built.algorithm.apply = note  # type: ignore[method-assign]
    Tiny(built).play(2)
    found = weights(built.trainable)
    wide = {name: torch.from_numpy(w).double() for name, w in start.items()}
    expected = replay_fedspzo(built, wide, entries)
    moved = {name: found[name].astype(np.float64) - start[name] for name in found}
    error = {name: found[name] - expected[name].numpy() for name in found}
    boundary = {-1: 6, 6: 7, 1: 2}[split]
    for first in (True, False):
        names = [t.name for t in built.trainable if (t.stage < boundary) == first]
        length, off = (np.linalg.norm(flat({name: part[name] for name in names})) for part in (moved, error))
        if first and estimator == "Z1":
            assert length == off == 0
        else:
            assert length > 0
            assert off <= 1e-4 * length


@pytest.mark.parametrize(("split", "boundary"), [(-1, 6), (0, 1), (3, 4), (6, 7), (-6, 1)])
def test_block_one_ends_where_the_setting_says(split: int, boundary: int) -> None:
    built = make("fedspzo", settings_of("A", split=split) | {"model.trainable": "full"})
    Tiny(built).play(1)
    visits = 2 * STEPS * P1  # devices, local steps, directions; a visit is one + and one - forward
    stages = built.cut.stages
    assert built.lab.stream.block_runs == [visits] * boundary + [visits * P2] * (stages - boundary)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"split": 7}, r"method\.fedspzo\.split: found 7; allowed: -6 \.\. 6"),
    ({"split": -7}, r"method\.fedspzo\.split: found -7; allowed: -6 \.\. 6"),
    ({"estimator": "Ac", "p2": 1}, r"method\.fedspzo\.p2: found 1; estimator Ac .* at least 2"),
    ({"estimator": "A", "auto": True}, "auto and freeze_first are two kinds of estimator B1"),
    ({"estimator": "D", "freeze_first": True}, "auto and freeze_first are two kinds of estimator B1"),
    ({"auto": True, "freeze_first": True}, "choose one of them"),
    ({"estimator": "C"}, r"method\.fedspzo\.estimator: found 'C'"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make("fedspzo", {f"method.fedspzo.{key}": value for key, value in settings.items()})


def test_block_two_alone_needs_nothing_to_train_in_block_one() -> None:
    built = make("fedspzo", settings_of("Z1", split=6) | {"model.trainable": "head"})
    start = weights(built.trainable)
    Tiny(built).play(1)
    assert not same(weights(built.trainable), start)
    with pytest.raises(ConfigError, match="block 1 has nothing to train"):
        make("fedspzo", settings_of("B1", split=6) | {"model.trainable": "head"})


@pytest.mark.parametrize("estimator", ["A", "B", "B1", "D"])
def test_a_tied_tensor_takes_block_ones_direction_in_the_head_too(estimator: Any) -> None:
    """Every scalar is what plain forwards give with y moved along u and z along v, tensor by tensor."""
    cut, _ = architecture("opt", "verbaliser")
    plain, eps = copy.deepcopy(cut), 1e-2
    trainable = select(cut, "full")
    stages = {t.name: t.stage for t in trainable}
    start = weights(trainable)
    batch = batch_for(cut)
    u, v = (as_keys([direction_key(5, 0, 0, 0, p)]) for p in (1, 2))
    boundary = len(cut.blocks)
    stream = Stream(cut, trainable, Meter(), gaussian=False)
    assert {id(p) for p in cut.head.parameters()} & {id(t.parameter) for t in trainable if t.stage == 0}, "none is tied"
    found = Blocks(stream, boundary, eps).measure(estimator, batch, u, v).scalars
    along = [drawn(trainable, key[0]) for key in (u, v)]

    def loss(y: float, z: float) -> float:
        moved = {n: w + eps * (y * along[0][n] if stages[n] < boundary else z * along[1][n]) for n, w in start.items()}
        return plain_losses(plain, {n: w.astype(np.float32) for n, w in moved.items()}, batch)

    def one(y: float, z: float) -> float:
        return (loss(y, z) - loss(0, 0)) / eps

    def both(y: float, z: float) -> float:
        return (loss(y, z) - loss(-y, -z)) / (2 * eps)

    crossed = (loss(1, 1) + loss(1, -1) - loss(-1, 1) - loss(-1, -1)) / (4 * eps)
    other = (loss(1, 1) - loss(1, -1) + loss(-1, 1) - loss(-1, -1)) / (4 * eps)
    expected = {"A": [both(1, 1)], "B": [both(1, 0), both(0, 1)], "B1": [one(1, 0), one(0, 1)], "D": [crossed, other]}
    np.testing.assert_allclose(found, expected[estimator], rtol=1e-3, atol=1e-3)


AUTO = {"method.fedspzo.auto": True, "method.fedspzo.reprobe": 2, "method.fedspzo.probes": 3}


def auto(**more: Any) -> Built:
    return make("fedspzo", settings_of("B1") | AUTO | more)


def choice_of(built: Built) -> Any:
    assert isinstance(built.algorithm, FedSPZO)
    return built.algorithm._choice


def test_probes_are_an_exchange_of_their_own_and_are_paid_for() -> None:
    built = auto()
    costs, tiny = Costs(built), Tiny(built)
    stages = [built.cut.stage_flops(stage, 2, 32) for stage in range(built.cut.stages)]
    probes = costs.forward + 3 * 2 * (costs.forward + stages[-2] + 2 * stages[-1])
    for number in range(4):
        (outcome,) = tiny.play(1)
        choice = choice_of(built)
        first = sum(stages[: choice.boundary])
        step = (1 + P1) * costs.forward + choice.p2 * (costs.forward - first)
        extra = number % 2 == 0
        assert outcome.exchanges == STEPS + extra
        assert outcome.flops == pytest.approx([STEPS * step + extra * probes] * 2, rel=1e-12)
        assert outcome.up_bytes == [SCALAR * (STEPS * (P1 + choice.p2) + extra * (3 * 3 * 2 + 2))] * 2
        assert outcome.reply_bytes == 2 * outcome.up_bytes[0]
    assert choice.p2 not in (P2, 1)


def test_the_choice_survives_a_stop(tmp_path: Path) -> None:
    changes = settings_of("B1") | AUTO | {"method.fedspzo.reprobe": 3, "run.rounds": 5, "run.eval_every": 5}
    straight = Tiny(make("fedspzo", changes, evaluated=8))
    assert straight.run() == "rounds"
    store = Store(tmp_path, config_sha256(make_job("fedspzo", changes).tree), lambda _: None)
    stopped = Tiny(make("fedspzo", changes, evaluated=8))
    saver = SaveCheckpoint(store, stopped.runner, stopped.metrics, 1)
    assert stopped.run(saver, wants_to_stop=lambda: stopped.runner.next_round == 2) == "stopped"
    resumed = Tiny(make("fedspzo", changes, evaluated=8))
    checkpoint = store.newest()
    assert checkpoint is not None
    take_up(checkpoint, resumed.runner, resumed.metrics)
    kept, old, new = (str(choice_of(built)) for built in (resumed.built, stopped.built, make("fedspzo", changes)))
    assert kept == old != new
    assert resumed.run() == "rounds"
    assert resumed.runner.trajectory.digest == straight.runner.trajectory.digest
    assert same(weights(resumed.built.trainable), weights(straight.built.trainable))


def test_a_smaller_step_of_block_one_takes_block_two_along() -> None:
    """y moves by lr y_scale, z by lr y_scale ratio."""
    steps = []
    for choice in ((1.0, 5.0), (0.25, 5.0), (1.0, 10.0)):
        built = auto()
        scale, ratio = choice
        built.algorithm.restore({"choice": np.array([6.0, 2.0, ratio, scale, 1.0, 1.0])})
        start = weights(built.trainable)
        scalars = np.ones((2, P1 + 2), np.float32)
        built.algorithm.apply(Round(1, 0, (0, 1), 0.5), {}, {"scalars": scalars})
        moved = {name: w - start[name] for name, w in weights(built.trainable).items()}
        halves = [[t.name for t in built.trainable if (t.stage < 6) == first] for first in (True, False)]
        steps.append([flat({name: moved[name] for name in names}) for names in halves])
    (y, z), slow, far = steps
    assert np.linalg.norm(y) > 0.1
    np.testing.assert_allclose(np.concatenate(slow), 0.25 * np.concatenate([y, z]), atol=1e-6)
    np.testing.assert_allclose(far[0], y, atol=1e-6)
    np.testing.assert_allclose(far[1], 2 * z, atol=1e-5)
