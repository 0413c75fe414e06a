"""The micro-benchmarks on tiny models: that they run, report what they promise, measure side by side, and refuse nonsense."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest
import torch

from fedbench import __main__
from fedbench.base import account
from fedbench.base.errors import EXIT_OK, EXIT_USER
from fedbench.bench import harness
from fedbench.bench.harness import Options
from fedbench.bench.models import subject
from fedbench.bench.zo_step import Steps
from fedbench.zo.kernels import cpu

SMALL = ["--batch", "4", "--length", "8", "--repeats", "2"]

#: Benchmark -> the keys of its JSON that are fixed.
KEYS = {
    "zo-step": ("ratio_two_forwards", "speedup_over_mezo"),
    "perturb": ("ratio_two_memcpy",),
    "update": ("seconds_per_direction",),
    "codec": ("gb_per_s",),
}


def leaves(tree: Any) -> list[float]:
    """Return the numbers of a tree."""
    return [number for branch in tree.values() for number in leaves(branch)] if isinstance(tree, dict) else [tree]


@pytest.fixture(autouse=True)
def _threads_as_before() -> object:
    before = torch.get_num_threads()
    yield
    account.use_threads(before)
    cpu.set_threads(1)


@pytest.mark.parametrize(
    ("bench", "model"),
    [("zo-step", "shape:roberta-tiny"), ("perturb", "embedded"), ("update", "embedded"), ("codec", "embedded")],
)
def test_json_has_the_fixed_keys_for_each_number_of_threads(
    bench: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert __main__.main(["bench", bench, "--model", model, *SMALL, "--json"]) == EXIT_OK
    found = json.loads(capsys.readouterr().out)
    for place in (found, found["threads_1"], found["threads_2"]):
        for key in KEYS[bench]:
            values = leaves(place[key])
            assert values
            assert all(math.isfinite(value) and value > 0 for value in values)
        assert all(len(samples) >= 2 for samples in place["samples_s"].values())
    assert found[KEYS[bench][0]] == found["threads_2"][KEYS[bench][0]]
    assert found["options"]["model"] == model
    assert found["provenance"]["cpu"]


def test_threads_choose_what_stands_on_top(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "perturb", "--model", "embedded", *SMALL, "--threads", "1", "--json"]
    assert __main__.main(words) == EXIT_OK
    found = json.loads(capsys.readouterr().out)
    assert found["ratio_two_memcpy"] == found["threads_1"]["ratio_two_memcpy"]
    assert set(found) >= {"threads_1", "threads_2"}


def test_a_table_for_people_shows_the_first_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["bench", "update", "--model", "embedded", *SMALL]) == EXIT_OK
    assert "seconds_per_direction.64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["zo-stop"], "Nearest: zo-step."),
        (["perturb", "--model", "opt-126m"], "opt-126m"),
        (["perturb", "--model", "shape:opt-126m"], "Nearest: opt-125m."),
        (["perturb", "--trainable", "everything", "--model", "embedded"], "model.trainable: found 'everything'"),
        (["perturb", "--batch", "none"], "--batch"),
        (["overlap", "-n", "3"], "found -n 3; one device and its cloud are 2 ranks"),
        (["pipeline", "-n", "2", "--link", "fast"], "--link: found 'fast'; allowed: a rate"),
    ],
)
def test_nonsense_is_one_line_and_exit_2(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = __main__.main(["bench", *words])
    except SystemExit as error:
        code = int(str(error.code))
    text = capsys.readouterr()
    assert code == EXIT_USER
    assert said in text.err
    assert "Traceback" not in text.err
    assert not text.out


def test_arms_alternate_and_are_warmed_up_first() -> None:
    order: list[str] = []
    samples = harness.measure({name: lambda name=name: order.append(name) for name in "abc"}, 2)  # type: ignore[misc]
    assert "".join(order) == "abc" + "abc" + "cba"
    assert {name: len(values) for name, values in samples.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_ratio_is_formed_within_repetitions() -> None:
    found = harness.ratio([1.0, 20.0, 3.0, 4.0, 5.0, 6.0], [1.0, 10.0, 3.0, 4.0, 5.0, 6.0])
    assert found == {"value": 1.0, "low": 1.0, "high": 2.0}
    slow = harness.measure({"one": lambda: time.sleep(0.002), "two": lambda: time.sleep(0.02)}, 3)
    assert harness.ratio(slow["two"], slow["one"])["value"] > 3


def test_all_arms_of_a_step_see_the_same_losses_and_mezo_comes_back_to_its_weights() -> None:
    options = Options("embedded", batch=4, length=8)
    on = subject(options)
    steps = Steps(on)
    before = {t.name: t.flat.copy() for t in on.trainable}
    with torch.inference_mode():
        plain = float(steps._loss())
    plus, minus = on.stream.losses(on.batch, steps.direction, 1e-3)
    assert (plus + minus) / 2 == pytest.approx(plain, abs=1e-3)
    steps.mezo()
    moved = max(abs(t.flat - before[t.name]).max() for t in on.trainable)
    assert 0 < moved < 1e-5
