"""Runs whose guides are coded: what all ranks decode, what is counted, what survives a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinyruns import WORKING, Tiny, make, make_job, same, weights

from fedbench.base.identity import config_sha256
from fedbench.codec.codecs import CODECS
from fedbench.codec.frame import coded_bytes
from fedbench.run.callbacks.checkpoint import SaveCheckpoint, take_up
from fedbench.run.ckpt import Store

LOSSY = [name for name in CODECS if name != "raw"]
GUIDED = ("cooperllm", "cooperllm_plus")
SMALL: dict[str, Any] = {"run.rounds": 2, "federation.devices": 2, "federation.batch_size": 2}


def played(method: str, changes: dict[str, Any]) -> Tiny:
    tiny = Tiny(make(method, SMALL | changes, evaluated=8))
    assert tiny.run() == "rounds"
    return tiny


@pytest.mark.parametrize("method", GUIDED)
@pytest.mark.parametrize("codec", CODECS)
def test_a_plan_costs_what_its_codecs_formula_says(method: str, codec: str) -> None:
    built = make(method, SMALL | {"comm.codec": codec}, evaluated=8)
    outcome = Tiny(built).play(1)[0]
    cutting = built.algorithm._guides._cutting  # type: ignore[attr-defined]
    sizes, outline = [unit.entries for unit in cutting.units()], sum(len(rows) for rows in cutting.outline.values())
    chosen = CODECS[codec]
    assert outcome.plan_bytes - 4 * outline == sum(min(4 * size, chosen.coded_bytes(size)) for size in sizes)
    assert outcome.plan_bytes - 4 * outline <= 4 * sum(sizes) * (chosen.bits / 32 + 0.01)
    assert outcome.up_bytes == 2 * [4 * built.algorithm.upload_units(None, 0)[0].entries]  # type: ignore[arg-type]


@pytest.mark.parametrize("method", WORKING)
def test_only_guides_are_coded(method: str) -> None:
    """Bases, masks, seeds, probabilities, replies: whatever isn't a guide arrives to the bit."""
    digests = set()
    for codec in ("raw", "sign"):
        tiny = Tiny(make(method, SMALL | {"comm.codec": codec}, evaluated=8))
        tiny.play(1)
        digests.add(tiny.runner.trajectory.digest)
    assert len(digests) == (2 if method in GUIDED else 1)


def test_without_overlap_a_device_has_the_whole_plan_before_it_computes_and_the_same_bits() -> None:
    link = {"link.clock": "paced", "link.down": "100Mbit/s"}
    digests = []
    for overlap in (True, False):
        tiny = Tiny(make("cooperllm", SMALL | link | {"comm.overlap": overlap}, evaluated=8))
        tiny.clock.keep(2, 10_000)
        tiny.play(2)
        digests.append(tiny.runner.trajectory.digest)
        for number in range(2):
            kept = [span for round_, span in tiny.clock.spans if round_ == number]
            computes = min(span.start_s for span in kept if span.kind == "compute")
            waits = [s.start_s for s in kept if s.kind == "wait" and s.unit.startswith("plan/")]
            assert (max(waits) > computes) == overlap
    assert digests[0] == digests[1]


@pytest.mark.parametrize("estimator", ["guided", "corrected", "mixing"])
def test_lz4_around_codes_changes_no_bit(estimator: str) -> None:
    settings = {"comm.codec": "int2", "method.cooperllm.estimator": estimator}
    plain, lz4 = played("cooperllm", settings), played("cooperllm", settings | {"comm.lz4": True})
    assert same(weights(plain.built.trainable), weights(lz4.built.trainable))
    assert plain.runner.trajectory.digest == lz4.runner.trajectory.digest


@pytest.mark.parametrize("codec", LOSSY)
def test_the_guide_that_all_use_is_the_decoded_one_and_of_length_1(codec: str) -> None:
    built = make("cooperllm", SMALL | {"comm.codec": codec}, evaluated=8)
    tiny = Tiny(built)
    tiny.play(1)
    span = built.algorithm._guides._span  # type: ignore[attr-defined]
    units = span.cutting.units()
    square = sum(float(np.square(span.units[unit.name], dtype=np.float64).sum()) for unit in units)
    assert square == pytest.approx(1.0, rel=1e-5)
    coded = sum(coded_bytes(unit, CODECS[codec]) < unit.raw_bytes for unit in units)
    assert coded > len(units) / 2


def test_error_feedback_changes_the_guides_from_the_second_on() -> None:
    digests: dict[bool, list[bytes]] = {}
    for feedback in (False, True):
        tiny = Tiny(make("cooperllm", SMALL | {"comm.codec": "sign", "comm.error_feedback": feedback}, evaluated=8))
        digests[feedback] = []
        for _ in range(2):
            tiny.play(1)
            digests[feedback].append(tiny.runner.trajectory.digest)
        assert bool(tiny.runner.plans.coder.state()) == feedback
    assert digests[False][0] == digests[True][0]
    assert digests[False][1] != digests[True][1]


@pytest.mark.parametrize("guide_every", [1, 2])
def test_a_stop_loses_nothing_of_what_coding_lost(guide_every: int, tmp_path: Path) -> None:
    changes = SMALL | {
        "run.rounds": 4, "comm.codec": "int2", "comm.error_feedback": True, "method.cooperllm.guide_every": guide_every,
    }  # fmt: skip
    straight = played("cooperllm", changes)
    store = Store(tmp_path / "ckpt", config_sha256(make_job("cooperllm", changes).tree), print)
    for stop in (1, 3, 4):  # each in what stands for a new process
        tiny = Tiny(make("cooperllm", changes, evaluated=8))
        saver = SaveCheckpoint(store, tiny.runner, tiny.metrics, 1)
        checkpoint = store.newest()
        if checkpoint is not None:
            take_up(checkpoint, tiny.runner, tiny.metrics)
        ended = tiny.run(saver, wants_to_stop=lambda tiny=tiny, stop=stop: tiny.runner.next_round >= stop)
        assert ended == ("rounds" if stop == 4 else "stopped")
    assert same(weights(tiny.built.trainable), weights(straight.built.trainable))
    assert tiny.runner.trajectory.digest == straight.runner.trajectory.digest
    found, expected = tiny.runner.plans.coder.state(), straight.runner.plans.coder.state()
    assert expected
    assert same(found, expected)


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_four_and_eight_bits_learn_what_float32_learns(codec: str) -> None:
    """Guides that are turned by a tenth of a degree or six: the weights go nearly the same way."""
    start = weights(make("cooperllm", SMALL, evaluated=8).trainable)
    raw, coded = (weights(played("cooperllm", {"comm.codec": name}).built.trainable) for name in ("raw", codec))
    steps = [np.concatenate([(end[name] - start[name]).astype(np.float64) for name in start]) for end in (raw, coded)]
    assert steps[0] @ steps[1] / np.sqrt((steps[0] @ steps[0]) * (steps[1] @ steps[1])) > 0.98
