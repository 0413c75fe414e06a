"""The dual forward: both losses are those of plain forwards with perturbed weights, and no weight is ever touched."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tinycuts import batch_for, bert_cut, embedded_cut, odd_cut, plain_losses
from tinyruns import same, weights
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fedbench.base.account import Meter
from fedbench.base.errors import ModelError
from fedbench.base.job import ModelSection
from fedbench.data.rows import Batch
from fedbench.models import parts
from fedbench.models.cut import Cut
from fedbench.models.trainable import PARTS, Tensor, Trainable, select
from fedbench.zo.direction import AT_WEIGHTS, Direction, Terms, as_keys, direction_key
from fedbench.zo.kernels import reference
from fedbench.zo.ranges import OnDemand, pieces_of
from fedbench.zo.stream import Probe, Stream

CUTS: dict[str, Callable[[], Cut]] = {"embedded": embedded_cut, "bert": bert_cut}
MODELS = pytest.mark.parametrize("model", CUTS)
H = 2e-3
LOSS_TOLERANCE = 1e-6


@functools.cache
def original(model: str, part: str = "full") -> Cut:
    cut = CUTS[model]()
    parts.add(cut, part, ModelSection(lora_rank=2), 0)
    return cut


def guide_of(direction: Direction, tensor: Tensor) -> np.ndarray:
    """Return the guide of a whole tensor, flat, or nothing where there is none."""
    ((_, _, values),) = pieces_of(direction.guide, tensor, 0, tensor.size)
    return values


class Bench:
    """A fresh copy of a cut with a stream, and its own plain copy to compare with."""

    def __init__(self, model: str, part: str = "full", *, gaussian: bool = False) -> None:
        self.cut = copy.deepcopy(original(model, part))
        self.trainable: Trainable = select(self.cut, part)
        self.meter = Meter()
        self.stream = Stream(self.cut, self.trainable, self.meter, gaussian=gaussian)
        self.model, self.gaussian = model, gaussian

    def direction(self, p: int = 0, *, guided: bool = False) -> Direction:
        key = as_keys([direction_key(0, 1, 2, 3, p)])[0]
        if not guided:
            return Direction(key)
        draw = np.random.default_rng(p)
        guide = {t.name: draw.standard_normal(tuple(t.parameter.shape)).astype(np.float32) for t in self.trainable}
        return Direction(key, 0.7, OnDemand(guide.__getitem__), -0.4)

    def walk(self, steps: int) -> Terms:
        keys = as_keys([direction_key(9, 0, step, 0, 0) for step in range(steps)])
        return Terms(keys, np.linspace(-3e-3, 2e-3, steps, dtype=np.float32))

    def perturbed(self, direction: Direction, walk: Terms, h: float) -> list[dict[str, np.ndarray]]:
        """Return the weights at w - walk + h u and w - walk - h u by the kernels' specification."""
        copies: list[dict[str, np.ndarray]] = [{}, {}]
        for t in self.trainable:
            plus, minus = (np.empty(t.size, np.float32) for _ in range(2))
            reference.pair(
                t.flat,
                0,
                reference.stream_keys(walk.keys, t.key),
                walk.coef,
                reference.stream_keys(direction.key[None], t.key)[0],
                h * direction.z_scale,
                guide_of(direction, t),
                h * direction.guide_scale,
                plus,
                minus,
                self.gaussian,
            )
            copies[0][t.name], copies[1][t.name] = plus, minus
        return copies


@MODELS
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full rows"])
@pytest.mark.parametrize(
    ("guided", "steps", "gaussian"),
    [(False, 0, False), (False, 0, True), (True, 0, False), (False, 3, False), (True, 2, True)],
)
def test_both_losses_are_those_of_plain_forwards(
    model: str, part: str, padded: bool, guided: bool, steps: int, gaussian: bool
) -> None:
    bench = Bench(model, part, gaussian=gaussian)
    batch = batch_for(bench.cut, padded=padded, seed=steps)
    direction, walk = bench.direction(guided=guided), bench.walk(steps)
    found = bench.stream.losses(batch, direction, H, walk)
    expected = [plain_losses(original(model, part), moved, batch) for moved in bench.perturbed(direction, walk, H)]
    assert found == pytest.approx(expected, rel=LOSS_TOLERANCE)
    assert abs(expected[0] - expected[1]) > 20 * LOSS_TOLERANCE, "the two losses are too close to tell + from -"


@MODELS
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("micro", [0, 2])
@pytest.mark.parametrize(("guided", "steps"), [(False, 0), (True, 2)])
def test_a_one_sided_loss_is_that_of_a_plain_forward(
    model: str, part: str, micro: int, guided: bool, steps: int
) -> None:
    bench = Bench(model, part)
    bench.stream.micro_batch = micro
    batch = batch_for(bench.cut, padded=True, seed=steps)
    direction, walk = bench.direction(guided=guided), bench.walk(steps)
    moved = bench.perturbed(direction, walk, H)[0]
    still = bench.perturbed(direction, walk, 0.0)[0]
    plus, zero = bench.stream.loss(batch, direction, H, walk), bench.stream.loss(batch, direction, 0.0, walk)
    expected = [plain_losses(original(model, part), w, batch) for w in (moved, still)]
    assert [plus, zero] == pytest.approx(expected, rel=LOSS_TOLERANCE)
    assert abs(plus - zero) > 20 * LOSS_TOLERANCE
    flops = bench.meter.take()
    assert flops == 2 * bench.cut.forward_flops(*batch.ids.shape), "one stream costs one forward"
    bench.stream.losses(batch, direction, H, walk)
    assert bench.meter.take() == flops


@MODELS
@pytest.mark.parametrize("padded", [True, False])
def test_states_of_one_stream_serve_two(model: str, padded: bool) -> None:
    """Directions behind a boundary alone: from clean states h0 both ways, or from h0 once more."""
    bench = Bench(model)
    batch = batch_for(bench.cut, padded=padded)
    direction = bench.direction()
    for boundary in range(1, bench.cut.stages):
        clean = bench.stream.run(bench.stream.begin(batch, 1), range(boundary), Probe(direction, 0.0, sides=1))
        assert not isinstance(clean, torch.Tensor | Batch)
        behind = [t for t in bench.trainable if t.stage >= boundary]
        moved = bench.perturbed(direction, AT_WEIGHTS, H)
        own = [{t.name: copy[t.name] for t in behind} for copy in moved]
        expected = [plain_losses(original(model), w, batch) for w in own]
        two = bench.stream.end(bench.stream.both(clean), boundary, Probe(direction, H))
        (one,) = bench.stream.end(clean, boundary, Probe(direction, H, sides=1))
        assert [*two, one] == pytest.approx([*expected, expected[0]], rel=LOSS_TOLERANCE), boundary


@MODELS
def test_with_nothing_to_perturb_with_both_streams_have_the_same_bits(model: str) -> None:
    bench = Bench(model)
    batch = batch_for(bench.cut)
    plus, minus = bench.stream.losses(batch, bench.direction(), 0.0)
    assert plus == minus
    assert plus == pytest.approx(plain_losses(original(model), {}, batch), rel=LOSS_TOLERANCE)


@MODELS
def test_the_opposite_direction_swaps_the_losses_bit_for_bit(model: str) -> None:
    bench = Bench(model, "bitfit")
    batch = batch_for(bench.cut)
    assert bench.stream.losses(batch, bench.direction(), H) == bench.stream.losses(batch, bench.direction(), -H)[::-1]


@MODELS
@pytest.mark.parametrize("part", PARTS)
def test_many_probes_leave_every_bit_and_the_plain_forward_as_they_were(model: str, part: str) -> None:
    bench = Bench(model, part)
    batch = batch_for(bench.cut, rows=2, length=6)
    state = {name: tensor.clone() for name, tensor in bench.cut.state_dict().items()}
    before = weights(bench.trainable)
    with torch.inference_mode():
        logits = bench.cut(batch)
    for p in range(1000 if part == "full" else 100):
        bench.stream.losses(batch, bench.direction(p, guided=p % 2 == 1), 0.5, bench.walk(p % 3))
    assert same(weights(bench.trainable), before)
    for name, tensor in bench.cut.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert not bench.stream.active
    with torch.inference_mode():
        assert torch.equal(bench.cut(batch), logits)


@MODELS
def test_gradients_still_flow_through_the_plain_forward(model: str) -> None:
    bench, plain = Bench(model), copy.deepcopy(original(model))
    batch = batch_for(bench.cut)
    bench.stream.losses(batch, bench.direction(), H)
    for cut in (bench.cut, plain):
        torch.nn.functional.cross_entropy(cut(batch), batch.labels).backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in bench.cut.named_parameters():
        if expected[name] is not None:
            assert parameter.grad is not None, name
            assert torch.equal(parameter.grad, expected[name]), name


@MODELS
def test_a_run_from_any_boundary_equals_the_whole_bit_for_bit(model: str) -> None:
    bench = Bench(model)
    batch = batch_for(bench.cut)
    probe = Probe(bench.direction(guided=True), H, bench.walk(2))
    whole = bench.stream.losses(batch, probe.direction, H, probe.walk)
    for boundary in range(1, bench.cut.stages):
        state = bench.stream.run(bench.stream.begin(batch), range(boundary), probe)
        assert bench.stream.end(state, boundary, probe) == whole, boundary
        # The states at the boundary serve again, and another direction behind it changes the losses.
        other = Probe(bench.direction(1), H, AT_WEIGHTS)
        assert bench.stream.end(state, boundary, other) != whole
        assert bench.stream.end(state, boundary, probe) == whole, boundary


@MODELS
def test_every_visit_of_a_stage_is_counted_once(model: str) -> None:
    bench = Bench(model)
    batch, stages = batch_for(bench.cut), bench.cut.stages
    bench.stream.losses(batch, bench.direction(), H)
    assert bench.stream.block_runs == [1] * stages
    probe = Probe(bench.direction(), H, AT_WEIGHTS)
    state = bench.stream.run(bench.stream.begin(batch), range(2), probe)
    for _ in range(3):
        bench.stream.end(state, 2, probe)
    assert bench.stream.block_runs == [2, 2] + [4] * (stages - 2)


@MODELS
def test_flops_are_two_forwards_and_stages_add_up(model: str) -> None:
    bench = Bench(model)
    batch = batch_for(bench.cut, rows=4, length=9)
    forward = bench.cut.forward_flops(4, 9)
    bench.stream.losses(batch, bench.direction(), H)
    assert bench.meter.take() == 2 * forward
    assert bench.meter.take() == 0.0
    per_stage = []
    for stage in range(bench.cut.stages):
        probe = Probe(bench.direction(), H, AT_WEIGHTS)
        state = bench.stream.run(bench.stream.begin(batch), range(stage), probe) if stage else bench.stream.begin(batch)
        bench.meter.take()
        bench.stream.run(state, range(stage, stage + 1), probe)
        per_stage.append(bench.meter.take())
    assert sum(per_stage) == 2 * forward
    assert all(flops == 2 * bench.cut.stage_flops(stage, 4, 9) for stage, flops in enumerate(per_stage))


@pytest.mark.parametrize("make", [embedded_cut, bert_cut, lambda: bert_cut("eager")], ids=["embedded", "bert", "eager"])
@pytest.mark.parametrize(("rows", "length"), [(2, 1), (3, 8), (7, 12)])
def test_counted_flops_are_what_torch_counts_with_plain_attention(
    make: Callable[[], Cut], rows: int, length: int
) -> None:
    cut = make()
    batch = batch_for(cut, rows, length, padded=length > 3)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        cut(batch)
    assert cut.forward_flops(rows, length) == counter.get_total_flops()


@pytest.mark.parametrize("part", ["full", "bitfit"])
def test_a_trainable_tensor_in_an_unknown_leaf_is_an_error(part: str) -> None:
    cut = odd_cut()
    with pytest.raises(ModelError, match=r"blocks\.1\.ffn_in\..* sits in no leaf that can be perturbed \(Linear, "):
        Stream(cut, select(cut, part), Meter(), gaussian=False)


def test_an_unknown_leaf_that_is_frozen_is_none_of_the_streams_business() -> None:
    cut = odd_cut()
    plain = copy.deepcopy(cut)
    trainable = select(cut, "head")
    stream = Stream(cut, trainable, Meter(), gaussian=False)
    batch = batch_for(cut)
    direction = Direction(as_keys([direction_key(0, 0, 0, 0, 0)])[0])
    assert stream.losses(batch, direction, 0.0)[0] == pytest.approx(plain_losses(plain, {}, batch), rel=LOSS_TOLERANCE)


def test_parts_are_what_their_names_say() -> None:
    for model in CUTS:
        cut = copy.deepcopy(original(model))
        full = {t.name: t.stage for t in select(cut, "full")}
        assert {name for name, p in cut.named_parameters() if p.requires_grad} == set(full)
        assert sum(t.size for t in select(cut, "full")) == sum(p.numel() for p in cut.parameters())
        bitfit = {t.name for t in select(cut, "bitfit")}
        assert all("bias" in name or name.startswith("head.") for name in bitfit)
        assert {name for name in full if "bias" in name} <= bitfit
        head = {t.name: t.stage for t in select(cut, "head")}
        assert set(head.values()) == {cut.stages - 1}
        assert {name for name, p in cut.named_parameters() if p.requires_grad} == set(head)
