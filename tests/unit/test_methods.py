"""Every method against the formulas of methods.md 2.17 and against replays that share no code with it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from method_rows import COUNTED, ROWS, SCALAR, Costs, Entry
from tinyruns import WORKING, Tiny, flat, make, make_job, never, same, weights, with_lab, written_out

from fedbench.algorithms.base import CatchUp, Round, Settings
from fedbench.base.arrays import Arrays
from fedbench.base.errors import ConfigError
from fedbench.data.embedded import LENGTH
from fedbench.models.cut import Cut
from fedbench.run.build import METHODS, PUBLIC_BATCH, Built
from fedbench.run.callbacks.metrics import evaluate
from fedbench.run.traffic import ID_BYTES
from fedbench.zo.direction import Terms
from fedbench.zo.kernels import cpu

FEDERATIONS = {
    "all": {"federation.devices": 3},
    "sampled": {"federation.devices": 5, "federation.sampled": 2},
}


def test_every_method_has_a_row() -> None:
    assert set(ROWS) == set(METHODS)


@pytest.mark.parametrize("federation", FEDERATIONS)
@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_those_of_the_formulas(method: str, federation: str) -> None:
    row = ROWS[method]
    changes = COUNTED | dict(row.settings or {}) | FEDERATIONS[federation] | {"run.eval_every": 5}
    built = make(method, changes, evaluated=4)
    tiny, costs = Tiny(built), Costs(built)
    tiny.metrics.rows.append({"round": -1})  # no evaluation of the start
    tiny.run()
    model, sampled, catch_up = costs.model_bytes, costs.sampled, built.algorithm.catch_up
    up, plan, reply = (round(count(costs)) for count in (row.uplink, row.plan, row.reply))
    if catch_up is CatchUp.REPLAY_OF_DEVICES and reply:
        reply += ID_BYTES * sampled
    last: dict[int, int] = {}
    for number, (found, devices) in enumerate(zip(tiny.metrics.rows[1:], tiny.metrics.device_rows, strict=True)):
        ups = row.uplinks(costs, number) if row.uplinks else [up] * sampled
        assert devices["uplink_bytes"].tolist() == ups
        assert found["uplink_bytes"] == (round(sum(ups) / sampled) if sampled else 0)
        downs = []
        for device in built.sampled(number):
            since = last.get(device)
            behind = range(0 if since is None else since + 1, number)
            missed = reply * (number - (since or 0)) + plan * (sum(t == 0 for t in behind) if row.once else len(behind))
            if catch_up is CatchUp.NEWEST:
                missed = reply if number else 0
            downs.append(min(missed, model) + (0 if row.once and number else plan))
            last[device] = number
        assert devices["downlink_bytes"].tolist() == downs
        assert devices["device"].tolist() == list(built.sampled(number))
        assert found["downlink_bytes"] == (round(sum(downs) / sampled) if sampled else 0)
    assert tiny.runner.traffic.closing() == min(reply, model)


@pytest.mark.parametrize("method", METHODS)
def test_flops_are_those_of_the_formulas(method: str) -> None:
    row = ROWS[method]
    built = make(method, COUNTED | dict(row.settings or {}) | FEDERATIONS["all"])
    costs = Costs(built)
    for outcome in Tiny(built).play(2):
        assert outcome.flops == ([row.device_flops(costs)] * 3 if built.algorithm.uses_devices else [])
        assert outcome.cloud_flops == (0 if row.once and outcome.number else row.cloud_flops(costs))
        costs.round = outcome.number
        assert row.rebuilt is None or outcome.replay_ops == row.rebuilt(costs)
        assert outcome.exchanges == row.exchanges


@pytest.mark.parametrize("method", ["cooperllm", "public_only"])
@pytest.mark.parametrize("batches", [0, 2])
def test_public_batches_are_what_the_cloud_pays_for(method: str, batches: int) -> None:
    changes = {f"method.{method}.public_batches": batches, "data.public_per_class": 40, "model.trainable": "head"}
    built = make(method, COUNTED | changes)
    (outcome,) = Tiny(built).play(1)
    rows = batches * PUBLIC_BATCH if batches else 160
    assert outcome.cloud_flops == pytest.approx(3 * built.cut.forward_flops(rows, LENGTH), rel=1e-12)
    assert np.isfinite(outcome.cloud_loss)


@pytest.mark.parametrize("part", ["full", "bitfit", "head"])
@pytest.mark.parametrize("method", WORKING)
def test_a_devices_work_leaves_every_weight_as_it_was(method: str, part: str) -> None:
    if (method, part) == ("fedspzo", "head"):
        with pytest.raises(ConfigError, match=r"method\.fedspzo\.split: .* 'head', block 1 has nothing to train"):
            make(method, {"model.trainable": part})
        return
    built = make(method, COUNTED | {"model.trainable": part})
    round_ = Round(0, 0, built.sampled(0), 0.1)
    plan = built.algorithm.plan(round_)
    built.algorithm.learn(plan)
    before = weights(built.trainable)
    state = {name: tensor.clone() for name, tensor in built.cut.state_dict().items()}
    uploads = [built.algorithm.local(round_, device, plan) for device in round_.devices]
    assert same(weights(built.trainable), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in built.cut.state_dict().items())
    for device, upload in zip(round_.devices, uploads, strict=True):
        assert set(upload.arrays) == {unit.name for unit in built.algorithm.upload_units(round_, device)}
        assert np.isfinite(upload.loss)
    assert not same(dict(uploads[0].arrays), dict(uploads[1].arrays)), "two devices sent the same"


class Log:
    """Every plan and reply of a run, as an outsider on the wire would see them; a guide as whole tensors."""

    def __init__(self, built: Built) -> None:
        self._built = built
        self.entries: list[Entry] = []
        self._apply = built.algorithm.apply
        built.algorithm.apply = self._note  # type: ignore[method-assign]

    def _note(self, round_: Round, plan: Arrays, reply: Arrays) -> None:
        guides = getattr(self._built.algorithm, "_guides", None)
        seen = plan
        if guides is not None and plan:
            guide, _ = guides.span(plan).mix(np.ones(1))
            seen = {t.name: written_out(guide, t) for t in self._built.trainable}
        copies = ({name: np.array(array) for name, array in arrays.items()} for arrays in (seen, reply))
        self.entries.append((round_, *copies))
        self._apply(round_, plan, reply)


@pytest.mark.parametrize(
    ("method", "rounds", "part"),
    [
        pytest.param("fedmezo", 1000, "bitfit", marks=pytest.mark.slow),
        *((name, 50, "head" if name != "fedspzo" else "bitfit") for name in ROWS if ROWS[name].replay),
        *((name, 2, "full") for name in ROWS if ROWS[name].replay),
    ],
)
def test_the_weights_are_those_that_the_wire_rebuilds(method: str, rounds: int, part: str) -> None:
    row = ROWS[method]
    assert row.replay is not None
    changes = (
        COUNTED
        | dict(row.settings or {})
        | {
            "run.rounds": rounds,
            "federation.devices": 2,
            "model.trainable": part,
        }
    )
    if row.linear:
        changes[f"method.{method}.schedule"] = "linear"
    if rounds >= 50:
        changes |= {"federation.local_steps": 1, "zo.perturbations": 1, "method.fedspzo.p1": 1, "method.fedspzo.p2": 2}
    built = make(method, changes)
    start, log = weights(built.trainable), Log(built)
    Tiny(built).play(rounds)
    found = weights(built.trainable)
    expected = row.replay(built, {name: torch.from_numpy(w).double() for name, w in start.items()}, log.entries)
    moved = flat(found) - flat(start)
    error = flat(found) - flat({name: tensor.numpy() for name, tensor in expected.items()})
    subtractions = 2 * rounds * built.lab.local_steps * built.lab.perturbations  # each rounded to float32 by itself
    assert np.linalg.norm(error) <= max(1e-6, 2**-24 * np.sqrt(2 * subtractions)) * np.linalg.norm(flat(found))
    assert np.linalg.norm(error) <= 1e-3 * np.linalg.norm(moved), "the walk is too short to show anything"


def test_the_walk_of_a_lone_device_is_the_update_bit_for_bit() -> None:
    changes = {"federation.devices": 1, "zo.perturbations": 2, "federation.batch_size": 2}
    walks: list[Terms] = []
    longer = make("fedmezo", changes | {"federation.local_steps": 4})
    losses = longer.lab.stream.losses
    longer.lab.stream.losses = lambda batch, direction, h, walk: (  # type: ignore[method-assign]
        walks.append(walk) or losses(batch, direction, h, walk)
    )
    round_ = Round(0, 0, (0,), 0.05)
    scalars = longer.algorithm.local(round_, 0, {}).arrays["scalars"]
    start = weights(longer.trainable)

    shorter = make("fedmezo", changes | {"federation.local_steps": 3})
    uploads = {0: shorter.algorithm.local(round_, 0, {}).arrays}
    assert uploads[0]["scalars"].tobytes() == scalars[:6].tobytes()
    shorter.algorithm.apply(round_, {}, shorter.algorithm.combine(round_, uploads).arrays)

    walk = walks[-1]  # where the device stood in its fourth step
    assert len(walk.keys) == 6
    for tensor in shorter.trainable:
        plus, minus = (np.empty(tensor.size, np.float32) for _ in range(2))
        keys = cpu.stream_keys(walk.keys, tensor.key)
        nothing = np.empty(0, np.float32)
        cpu.pair(start[tensor.name], 0, keys, walk.coef, keys[0], 0.0, nothing, 0.0, plus, minus, False)
        assert tensor.flat.tobytes() == plus.tobytes() == minus.tobytes(), tensor.name
        assert not np.array_equal(tensor.flat, start[tensor.name])


def test_local_steps_walk_on_their_own_weights() -> None:
    """With walks ignored, the second step's scalars would be those at the start."""
    changes = {"federation.devices": 1, "federation.local_steps": 2, "method.fedmezo.lr": 0.05}
    built = make("fedmezo", changes)
    round_ = Round(0, 0, (0,), 0.05)
    walked = built.algorithm.local(round_, 0, {}).arrays["scalars"]
    stood = built.algorithm.local(round_._replace(lr=0.0), 0, {}).arrays["scalars"]
    assert walked[0] == stood[0]
    assert walked[1] != stood[1]


AS_MEZO = {"estimator": "A", "p1": 4, "p2": 1, "lr_ratio": 1.0}


def test_fedspzo_with_one_direction_a_block_is_fedmezo_bit_for_bit() -> None:
    common = {"zo.perturbations": 4, "federation.batch_size": 2, "run.rounds": 4}
    mezo, split = (
        Tiny(make(method, common | {f"method.{method}.lr": 0.003, **more}))
        for method, more in (
            ("fedmezo", {}),
            ("fedspzo", {f"method.fedspzo.{key}": value for key, value in AS_MEZO.items()}),
        )
    )
    for number in range(4):
        (left,), (right,) = mezo.play(1), split.play(1)
        assert left.losses == right.losses, number
        assert left.flops == right.flops
        assert mezo.runner.trajectory.digest == split.runner.trajectory.digest, number
        assert same(weights(mezo.built.trainable), weights(split.built.trainable)), number


def other_public(built: Built) -> Built:
    """Return the run with public rows that are unlike the given ones, labels included."""
    rows = built.splits.test.batch(np.arange(16))
    return with_lab(built, public_rows=lambda: [rows], public=lambda *_: rows)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_at_alpha_one_public_data_change_no_bit(alpha: float) -> None:
    changes = COUNTED | {"method.cooperllm.alpha": alpha, "federation.local_steps": 1}
    shuffled = {"data.public_labels": "shuffled"}
    tinies = [
        Tiny(built)
        for built in (
            make("cooperllm", changes),
            make("cooperllm", changes | shuffled),
            other_public(make("cooperllm", changes)),
        )
    ]
    for tiny in tinies:
        tiny.play(2)
    found = [weights(tiny.built.trainable) for tiny in tinies]
    assert all(same(found[0], other) == (alpha == 1.0) for other in found[1:])


def test_at_alpha_zero_all_steps_stay_on_the_guide() -> None:
    built = make("cooperllm", COUNTED | {"method.cooperllm.alpha": 0.0, "method.cooperllm.lr": 5.0})
    log, tiny = Log(built), Tiny(built)
    for number in range(3):
        before = weights(built.trainable)
        tiny.play(1)
        step = flat(weights(built.trainable)) - flat(before)
        v = flat(log.entries[-1][1])
        length = float(step @ v)
        assert np.linalg.norm(v) == pytest.approx(1.0, abs=1e-6)
        assert abs(length) > 1e-3
        assert np.linalg.norm(step - length * v) < 1e-4 * abs(length), number


def test_the_guide_is_the_public_gradient_at_the_present_weights() -> None:
    built = make("cooperllm", {"federation.devices": 1, "method.cooperllm.lr": 0.5})
    log, tiny = Log(built), Tiny(built)
    signs = set()
    for _ in range(5):
        plain = copy.deepcopy(built.cut)
        batch = built.splits.public.batch(np.arange(len(built.splits.public)))
        torch.nn.functional.cross_entropy(plain(batch), batch.labels).backward()
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in plain.named_parameters()}
        gradient = flat({name: grad.numpy() for name, grad in grads.items()})
        tiny.play(1)
        guide = flat(log.entries[-1][1])
        cosine = float(gradient @ guide) / float(np.linalg.norm(gradient))
        assert abs(cosine) == pytest.approx(1.0, abs=1e-5)
        signs.add(cosine > 0)
    assert signs == {True, False}


def plain_sgd(cut: Cut, built: Built, round_: int, lr: float, steps: int) -> dict[str, np.ndarray]:
    other = copy.deepcopy(cut)
    names = {t.name for t in built.trainable}
    chosen = {name: p for name, p in other.named_parameters() if name in names}
    optimiser = torch.optim.SGD(chosen.values(), lr=lr)
    for step in range(steps):
        batch = built.lab.private(round_, step, 0)
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(other(batch), batch.labels).backward()
        optimiser.step()
    return {name: p.detach().numpy().reshape(-1).copy() for name, p in chosen.items()}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("part", ["full", "bitfit"])
def test_fedavg_with_one_device_is_sgd(part: str, steps: int) -> None:
    changes = {"federation.devices": 1, "federation.local_steps": steps, "model.trainable": part}
    built = make("fedavg", changes | {"method.fedavg.lr": 0.2})
    tiny = Tiny(built)
    for number in range(3):
        expected = plain_sgd(built.cut, built, number, 0.2, steps)
        tiny.play(1)
        np.testing.assert_allclose(flat(weights(built.trainable)), flat(expected), atol=2e-7)


@pytest.mark.parametrize(("optimizer", "decay"), [("sgd", 0.1), ("adamw", 0.0), ("adamw", 0.1)])
def test_fedavgs_optimisers_are_torchs(optimizer: str, decay: float) -> None:
    settings = {"lr": 0.01, "optimizer": optimizer, "weight_decay": decay}
    changes = {"federation.devices": 1, "federation.local_steps": 3, "model.trainable": "head"}
    built = make("fedavg", changes | {f"method.fedavg.{key}": value for key, value in settings.items()})
    other = copy.deepcopy(built.cut)
    names = {t.name for t in built.trainable}
    chosen = [p for name, p in other.named_parameters() if name in names]
    tiny = Tiny(built)
    for number in range(2):
        kind: Any = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
        optimiser = kind(chosen, lr=0.01, weight_decay=decay)  # a fresh one each round: its state is discarded
        for step in range(3):
            batch = built.lab.private(number, step, 0)
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(other(batch), batch.labels).backward()
            optimiser.step()
        tiny.play(1)
    expected = {name: p.detach().numpy() for name, p in other.named_parameters() if name in names}
    np.testing.assert_allclose(flat(weights(built.trainable)), flat(expected), atol=2e-5)


@pytest.mark.parametrize(("method", "part"), [("fedavg_lora", "lora"), ("bitfit", "bitfit")])
def test_a_methods_own_part_is_trained_whatever_the_job_names(method: str, part: str) -> None:
    for named in ("full", "bitfit"):
        built = make(method, {"model.trainable": named})
        assert built.trainable.part == part
        assert built.job.tree["model"]["trainable"] == part
        assert built.job.config.model.trainable == named
    mark = {"lora": "lora_", "bitfit": "bias"}[part]
    assert all(mark in t.name or t.name.startswith("head.") for t in built.trainable)


def test_lora_starts_where_the_first_matrix_has_no_gradient() -> None:
    built = make("fedavg_lora", {"federation.devices": 1})
    start = weights(built.trainable)
    Tiny(built).play(1)
    found = weights(built.trainable)
    moved = {name: not np.array_equal(found[name], start[name]) for name in found}
    assert moved == {name: "lora_A" not in name for name in moved}


def test_fedavg_averages_models() -> None:
    built = make("fedavg", COUNTED | FEDERATIONS["all"])
    start = flat(weights(built.trainable))
    round_ = Round(0, 0, built.sampled(0), 0.1)
    uploads = {d: built.algorithm.local(round_, d, {}).arrays for d in round_.devices}
    Tiny(built).play(1)
    mean = np.mean([flat(change) for change in uploads.values()], axis=0)
    np.testing.assert_allclose(flat(weights(built.trainable)) - start, mean, atol=2e-7)


@pytest.mark.parametrize("part", ["full", "head"])
def test_fedavg_from_public_starts_where_public_only_ends(part: str) -> None:
    steps, lr = 3, 0.2
    changes = {"model.trainable": part, "federation.devices": 3, "federation.sampled": 2}
    before = make("public_only", changes | {"method.public_only.lr": lr})
    for number in range(steps):
        before.algorithm.combine(Round(number, 0, (), lr), {})
    plain = make("fedavg", changes)
    for tensor, trained in zip(plain.trainable, before.trainable, strict=True):
        tensor.assign(trained.values())
    built = make("fedavg", changes | {"method.fedavg.public_rounds": steps, "method.fedavg.public_lr": lr})
    start = weights(built.trainable)
    Tiny(plain).play(2)
    outcomes = Tiny(built).play(2)
    assert not np.array_equal(flat(weights(built.trainable)), flat(start))
    np.testing.assert_array_equal(flat(weights(built.trainable)), flat(weights(plain.trainable)))
    assert [outcome.plan_bytes for outcome in outcomes] == [SCALAR * built.trainable.size, 0]
    assert outcomes[0].cloud_flops > 0 == outcomes[1].cloud_flops


def test_public_only_steps_on_the_cloud_and_leaves_devices_idle() -> None:
    built = make("public_only", COUNTED | {"method.public_only.lr": 0.3, "model.trainable": "full"})
    built = with_lab(built, private=never)
    tiny = Tiny(built)
    plain = copy.deepcopy(built.cut)
    for number in range(3):
        assert built.sampled(number) == ()
        (outcome,) = tiny.play(1)
        assert (outcome.devices, outcome.flops, outcome.up_bytes, outcome.wire_bytes) == ((), [], [], 0)
        assert outcome.cloud_flops > 0
        batch = built.splits.public.batch(np.arange(len(built.splits.public)))
        loss = torch.nn.functional.cross_entropy(plain(batch), batch.labels)
        assert outcome.cloud_loss == pytest.approx(float(loss.detach()), rel=1e-5)
        grads = torch.autograd.grad(loss, list(plain.parameters()), allow_unused=True)
        with torch.no_grad():
            for parameter, grad in zip(plain.parameters(), grads, strict=True):
                if grad is not None:
                    parameter.sub_(0.3 * grad)
    found = dict(built.cut.named_parameters())
    for name, parameter in plain.named_parameters():
        np.testing.assert_allclose(found[name].detach(), parameter.detach(), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss(method: str) -> None:
    """Not a claim about accuracy: a sign error anywhere would raise it."""
    changes = {"run.rounds": 6, "federation.batch_size": 16, "zo.perturbations": 2, "data.public_per_class": 16}
    built = make(method, changes | {"method.cooperllm.lr": 0.2, "method.fwdllm.max_directions": 2}, evaluated=64)
    _, before = evaluate(built.cut, built.splits.dev)
    Tiny(built).play(6)
    assert evaluate(built.cut, built.splits.dev)[1] < before - 0.01


def rates(rounds: int, schedule: str = "linear") -> list[float]:
    settings = Settings.model_validate({"lr": 2.0, "schedule": schedule})
    return [settings.lr_at(number, rounds) for number in range(rounds)]


def test_a_constant_rate_is_constant() -> None:
    assert rates(7, "constant") == [2.0] * 7


@pytest.mark.parametrize("rounds", [1, 2, 9, 50, 100, 333])
def test_a_linear_rate_warms_up_and_falls_to_nearly_nothing(rounds: int) -> None:
    found = rates(rounds)
    warmup = max(1, round(0.06 * rounds))
    assert found[: warmup - 1] == pytest.approx([2.0 * (n + 1) / warmup for n in range(warmup - 1)])
    assert max(found) == pytest.approx(2.0)
    assert found.index(max(found)) in (warmup - 1, warmup)
    assert found[-1] == pytest.approx(2.0 / max(1, rounds - warmup))
    falling = found[warmup:]
    assert all(a > b for a, b in itertools.pairwise(falling))
    assert min(found) > 0


@pytest.mark.parametrize("method", sorted({name for name in ROWS if ROWS[name].linear} - {"cooperllm", "fedspzo"}))
def test_the_rate_in_force_is_the_schedules(method: str) -> None:
    built = make(method, {"run.rounds": 20, f"method.{method}.lr": 0.002, f"method.{method}.schedule": "linear"})
    tiny = Tiny(built)
    moved = []
    for outcome in tiny.play(3):
        assert outcome.lr == built.job.settings.lr_at(outcome.number, 20)
        moved.append(outcome.lr)
    assert moved == sorted(moved, reverse=True)


def test_a_rate_of_twice_the_size_moves_twice_as_far() -> None:
    for method in METHODS:
        steps = []
        for factor in (1, 2):
            lr = make_job(method).settings.lr * factor
            built = make(method, {f"method.{method}.lr": lr, "model.trainable": "bitfit"})
            start = flat(weights(built.trainable))
            Tiny(built).play(1)
            steps.append(flat(weights(built.trainable)) - start)
        np.testing.assert_allclose(steps[1], 2 * steps[0], atol=2e-3 * float(np.abs(steps[0]).max()), err_msg=method)


def test_settings_are_described_for_people() -> None:
    def described() -> Iterator[tuple[str, str, bool]]:
        for name, method in METHODS.items():
            for key, field in method.settings_type.model_fields.items():
                yield name, key, bool(field.description) or key == "lr"

    assert not [(name, key) for name, key, good in described() if not good]
