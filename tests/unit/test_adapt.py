"""Codecs chosen by the cloud: from nominal rates alone, the same on all ranks and after a stop, and written down."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from synthetic_runs import make_run
from tinyruns import WORKING, Tiny, make, same, weights

from fedbench.base.errors import ConfigError
from fedbench.base.records import CODEC_COLUMNS
from fedbench.codec.allocate import LADDER
from fedbench.codec.frame import Note
from fedbench.results import writer
from fedbench.run.adapt import Rates
from fedbench.run.callbacks.checkpoint import SaveCheckpoint, take_up
from fedbench.run.ckpt import Checkpoint, Store

#: A device that computes a round in a tenth of a second, so that the link's rate alone decides.
ADAPTIVE: dict[str, Any] = {
    "run.rounds": 4,
    "comm.codec": "adaptive",
    "profile.flops_per_s": 1e8,
    "data.public_per_class": 20,
    "zo.perturbations": 2,
    "method.cooperllm_plus.p2": 2,
}
METHODS = ("cooperllm", "cooperllm_plus")


def bits_at(rate: str, method: str = "cooperllm") -> list[float]:
    """Return the bits of each unit in the first round on a link of some rate."""
    tiny = Tiny(make(method, ADAPTIVE | {"link.down": rate}, evaluated=4))
    (outcome,) = tiny.play(1)
    return [bits for _, bits in outcome.bits]


@pytest.mark.parametrize("method", METHODS)
def test_bits_follow_the_rate(method: str) -> None:
    slow, middling, fast = (bits_at(rate, method) for rate in ("100kbit/s", "4Mbit/s", "100Gbit/s"))
    assert slow.count(LADDER[0].bits) > len(slow) / 2
    assert set(slow) <= {LADDER[0].bits, 32.0}, "units of a few entries travel raw"
    assert set(fast) == {LADDER[-1].bits, LADDER[0].bits}, "raw, but for biases whose gradient is zero"
    assert len(set(middling)) > 1
    assert np.mean(slow) < np.mean(middling) < np.mean(fast)


def test_without_a_bound_the_guide_travels_raw_and_the_numbers_are_those_of_raw() -> None:
    raw, adaptive = (
        Tiny(make("cooperllm", ADAPTIVE | changes, evaluated=4)) for changes in ({"comm.codec": "raw"}, {})
    )
    outcomes = [tiny.play(2) for tiny in (raw, adaptive)]
    assert same(weights(raw.built.trainable), weights(adaptive.built.trainable))
    told = len(outcomes[1][0].bits)
    saved = outcomes[0][0].plan_bytes + told - outcomes[1][0].plan_bytes
    assert 0 < saved < 1000, "the choice is charged, a byte a unit; biases whose gradient is zero take less than raw"
    assert raw.runner.trajectory.digest != adaptive.runner.trajectory.digest, "and joins the trajectory"


@pytest.mark.parametrize("method", WORKING)
def test_every_method_plays_with_codecs_that_are_chosen(method: str) -> None:
    (outcome,) = Tiny(make(method, ADAPTIVE | {"link.down": "4Mbit/s"}, evaluated=4)).play(1)
    assert bool(outcome.bits) == (method in METHODS), "guides alone may lose something"


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_stop_changes_no_choice_and_no_bit(method: str, feedback: bool, tmp_path: Any) -> None:
    changes = ADAPTIVE | {"link.down": "4Mbit/s", "comm.error_feedback": feedback, "comm.guide_lag": 1}
    straight = Tiny(make(method, changes, evaluated=4))
    straight.run()
    first = Tiny(make(method, changes, evaluated=4))
    store = Store(tmp_path, "config", pytest.fail)
    first.metrics.started()
    for _ in range(2):
        first.metrics.played(*first.play(1))
    SaveCheckpoint(store, first.runner, first.metrics, 0).save()
    second = Tiny(make(method, changes, evaluated=4))
    checkpoint = store.newest()
    assert isinstance(checkpoint, Checkpoint)
    take_up(checkpoint, second.runner, second.metrics)
    second.run()
    assert second.metrics.codec_rows == straight.metrics.codec_rows
    assert {number for number, _, _ in straight.metrics.codec_rows} == set(range(4))
    assert same(weights(second.built.trainable), weights(straight.built.trainable))
    assert second.runner.trajectory.digest == straight.runner.trajectory.digest


@pytest.mark.parametrize("codec", ["int8", "int4", "sign", "topk"])
def test_a_stale_coded_guide_comes_back_from_a_checkpoint_as_it_travelled(codec: str, tmp_path: Any) -> None:
    changes = ADAPTIVE | {"comm.codec": codec, "method.cooperllm.guide_every": 3}
    straight = Tiny(make("cooperllm", changes, evaluated=4))
    straight.run()
    first = Tiny(make("cooperllm", changes, evaluated=4))
    store = Store(tmp_path, "config", pytest.fail)
    first.metrics.started()
    for _ in range(2):
        first.metrics.played(*first.play(1))
    SaveCheckpoint(store, first.runner, first.metrics, 0).save()
    second = Tiny(make("cooperllm", changes, evaluated=4))
    checkpoint = store.newest()
    assert isinstance(checkpoint, Checkpoint)
    kept = [a for name, a in checkpoint.arrays.items() if name.startswith("method/guide/")]
    assert sum(a.nbytes for a in kept) < 4 * second.built.trainable.size, "what a checkpoint keeps is coded"
    take_up(checkpoint, second.runner, second.metrics)
    second.run()
    assert same(weights(second.built.trainable), weights(straight.built.trainable))


def test_measured_rates_follow_what_devices_tell() -> None:
    config = make("cooperllm", ADAPTIVE | {"link.down": "1Mbit/s"}).job.config
    rates, nominal = Rates(config, measured=True), Rates(config, measured=False)
    hidden = Note(0.0, 1.0, 3e9)
    rates.observe([hidden])
    assert rates.bit_s == 2e6, "nobody waited: the link carries more than the job says"
    rates.observe([Note(0.0, 1.0, 3e9, link_bit_s=9e6), Note(0.0, 0.5, 3e9, link_bit_s=8e6)])
    assert rates.bit_s == 8e6, "the slowest link's, as it was seen"
    assert rates.flops_per_s == 3e9, "the slowest device's"
    rates.observe([hidden])
    assert rates.bit_s == pytest.approx(8.4e6), "and from then on the plan grows slowly"
    again = Rates(config, measured=True)
    again.restore(rates.state())
    for found in (rates, again):
        found.observe([hidden])
    assert again.bit_s == rates.bit_s == pytest.approx(8.82e6), "a stop forgets nothing"
    nominal.observe([Note(0.0, 1.0, 3e9, link_bit_s=9e6)])
    assert nominal.bit_s == 1e6


def chosen_file(folder: Any, rows: list[tuple[int, str, float]]) -> str:
    """Return a run file with these choices."""
    codec = {name: np.array(values) for name, values in zip(CODEC_COLUMNS, zip(*rows, strict=True), strict=False)}
    writer.write(folder / "adaptive.h5", make_run(codec=codec))
    return str(folder / "adaptive.h5")


def test_a_run_replays_the_codecs_that_another_chose(tmp_path: Any) -> None:
    job = ADAPTIVE | {"link.down": "4Mbit/s"}
    straight = Tiny(make("cooperllm", job, evaluated=4))
    straight.run()
    path = chosen_file(tmp_path, straight.metrics.codec_rows)
    replay = {"comm.adapt": "replay", "comm.replay": path, "link.down": "1kbit/s"}
    second = Tiny(make("cooperllm", job | replay, evaluated=4))
    second.run()
    assert second.runner.trajectory.digest == straight.runner.trajectory.digest
    with pytest.raises(ConfigError, match="round 4"):
        Tiny(make("cooperllm", job | replay | {"run.rounds": 5}, evaluated=4)).run()


def test_only_an_adaptive_run_can_be_replayed(tmp_path: Any) -> None:
    built = make("cooperllm", ADAPTIVE | {"comm.adapt": "replay", "comm.replay": chosen_file(tmp_path, [])})
    with pytest.raises(ConfigError, match="no chosen codecs"):
        Tiny(built)


@pytest.mark.parametrize(
    "changes",
    [
        {"comm.adapt": "replay"},
        {"comm.replay": "x.h5"},
        {"comm.adapt": "replay", "comm.replay": "x", "comm.codec": "int8"},
    ],
)
def test_a_replay_needs_its_file_and_an_adaptive_codec(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="replay"):
        make("cooperllm", ADAPTIVE | changes)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("codec", ["raw", "int4"])
def test_a_guide_that_is_sent_again_has_the_same_bits_and_is_charged_each_time(method: str, codec: str) -> None:
    changes = ADAPTIVE | {"comm.codec": codec, "federation.local_steps": 2, "run.rounds": 2}
    keeping, resending = (
        Tiny(make(method, changes | {"comm.guide_reuse": reuse}, evaluated=4)) for reuse in ("keep", "resend")
    )
    for tiny in (keeping, resending):
        tiny.run()
    assert same(weights(keeping.built.trainable), weights(resending.built.trainable))
    assert keeping.runner.trajectory.digest == resending.runner.trajectory.digest
    for kept, sent in zip(keeping.metrics.rows[1:], resending.metrics.rows[1:], strict=True):
        again = sent["downlink_bytes"] - kept["downlink_bytes"]
        outline = kept["kept_bytes"] - again / 3
        assert 0 < outline < 2000, "two exchanges, probe and update in each: sent once and then three times again"
        assert sent["kept_bytes"] == 0


def test_a_stale_guide_is_never_sent_again() -> None:
    with pytest.raises(ConfigError, match="guide_every = 1"):
        make("cooperllm", ADAPTIVE | {"comm.guide_reuse": "resend", "method.cooperllm.guide_every": 2})
