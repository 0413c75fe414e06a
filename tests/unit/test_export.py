"""`fedbench export`: a folder that transformers, peft or fedbench itself loads, with the logits that the run ended with."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from textsets import make_set, make_tokeniser

from fedbench.__main__ import main
from fedbench.base.errors import EXIT_OK, EXIT_USER
from fedbench.data.rows import Batch
from fedbench.models import shapes
from fedbench.models.families import FAMILIES, HeadKind, auto_class
from fedbench.models.load import origin_of
from fedbench.results import reader
from fedbench.run import build, kept, launch
from fedbench.run.callbacks.metrics import evaluate
from fedbench.run.export import _job

Capture = pytest.CaptureFixture[str]

SET = ["--set", "results.save_weights=true"]

EMBEDDED = """
[run]
rounds = 2
[federation]
devices = 2
batch_size = 4
[data]
public_per_class = 4
[method]
name = "fedmezo"
[method.fedmezo]
lr = 0.01
"""

TEXT = """
[run]
rounds = 2
[federation]
devices = 2
batch_size = 4
[model]
name = "{model}"
[data]
private = "{data}"
public = "{data}"
public_per_class = 4
label_words = ["w1", "w2"]
[method]
name = "fedavg"
[method.fedavg]
lr = 0.1
"""


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No launcher, a working folder of its own, and signal handlers as they were."""
    for name in launch.SIZE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    numbers = (*launch.STOP_SIGNALS, *launch.ALONE_SIGNALS)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def ran(capsys: Capture, text: str, *words: str) -> Path:
    """Run a job and return its run file."""
    Path("job.toml").write_text(text)
    assert main(["run", "job.toml", "--results", "out", *words]) == EXIT_OK
    return Path(capsys.readouterr().out.strip())


def exported(capsys: Capture, run_file: Path, folder: str = "tuned") -> Path:
    """Export a run and return the folder; every file of it was printed."""
    capsys.readouterr()
    assert main(["export", str(run_file), "--out", folder]) == EXIT_OK
    printed = sorted(capsys.readouterr().out.split())
    assert printed == sorted(str(path) for path in Path(folder).iterdir())
    return Path(folder)


def tuned(run_file: Path) -> build.Built:
    """Return the run as it ended, by the weights that it kept."""
    run = reader.read(run_file)
    built = build.construct(_job(run, "test"))
    for tensor in built.trainable:
        tensor.assign(kept.read(run_file, run)[tensor.name])
    assert evaluate(built.cut, built.splits.test)[0] == run.summary.final_accuracy
    return built


def model_folder(kind: str, head: HeadKind, folder: Path) -> Path:
    """Write a small checkpoint with random weights and a tokeniser."""
    make_tokeniser(folder)
    config = shapes.config_of(f"{kind}-tiny")
    config.num_labels, config.pad_token_id = 2, 0
    if kind == "gpt2":
        config.vocab_size = 160
    with torch.random.fork_rng(devices=[]):
        model = getattr(transformers, auto_class(FAMILIES[kind], head)).from_config(config)
        draw = np.random.default_rng(3)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = 0.1 * draw.standard_normal(tuple(parameter.shape)).astype(np.float32)
                parameter.add_(torch.from_numpy(noise))
    model.save_pretrained(folder)
    return folder


def logits_of(folder: Path, base: Path, head: HeadKind, kind: str, batch: Batch, words: tuple[int, ...]) -> Any:
    """Return what transformers (with peft where the folder is peft's) makes of a batch in an exported folder."""
    auto = getattr(transformers, auto_class(FAMILIES[kind], head))
    if (folder / "adapter_config.json").exists():
        more = {"num_labels": 2} if head == "linear" else {}
        model = peft.PeftModel.from_pretrained(auto.from_pretrained(base, **more), folder)
    else:
        model = auto.from_pretrained(folder)
    with torch.inference_mode():
        out = model.eval()(input_ids=batch.ids.long(), attention_mask=batch.mask.long())
    if head == "linear":
        return out.logits
    if head == "prototype":
        own = load_file(folder / "fedbench_head.safetensors")
        weight = batch.mask[:, :, None].float()
        mean = (out.last_hidden_state * weight).sum(1) / weight.sum(1)
        return mean @ own["weight"].T + own["bias"]
    return out.logits[torch.arange(len(batch.lengths)), batch.lengths - 1][:, list(words)]


#: Architecture, head, trained part, file of the weights.
CASES: list[tuple[str, HeadKind, str, str]] = [
    ("bert", "prototype", "full", "model.safetensors"),
    ("bert", "linear", "bitfit", "model.safetensors"),
    ("opt", "verbaliser", "full", "model.safetensors"),
    ("qwen2", "verbaliser", "head", "model.safetensors"),
    ("opt", "verbaliser", "lora", "adapter_model.safetensors"),
    ("gpt2", "linear", "lora", "adapter_model.safetensors"),
    ("distilbert", "prototype", "lora", "adapter_model.safetensors"),
]


@pytest.mark.parametrize(("kind", "head", "part", "file"), CASES, ids=["-".join(case[:3]) for case in CASES])
def test_transformers_gives_the_logits_of_the_run(
    capsys: Capture, tmp_path: Path, kind: str, head: HeadKind, part: str, file: str
) -> None:
    base = model_folder(kind, head, tmp_path / "base")
    text = TEXT.format(model=base, data=make_set(tmp_path / "set"))
    run_file = ran(capsys, text, *SET, "--set", f"data.head={head}", "--set", f"model.trainable={part}")
    folder = exported(capsys, run_file)
    assert (folder / file).is_file()
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    built = tuned(run_file)
    rows = built.splits.test
    batch = rows.batch(np.arange(len(rows)))
    with torch.inference_mode():
        ours = built.cut(batch)
        start = build.construct(_job(reader.read(run_file), "test")).cut(batch)
    theirs = logits_of(folder, base, head, kind, batch, built.splits.label_words or ())
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(start, ours, rtol=1e-3, atol=1e-4), "training changed nothing, so nothing was shown"
    facts = json.loads((folder / "fedbench.json").read_text())
    assert (facts["head"], facts["trained"], facts["classes"]) == (head, part, ["bad", "good"])
    if file == "model.safetensors":  # and fedbench itself goes on from there
        again = ran(capsys, text.replace(str(base), str(folder)), "--set", f"data.head={head}", "--results", "again")
        assert reader.read(again).summary.initial_accuracy == facts["test_accuracy"]


@pytest.mark.parametrize("part", ["full", "bitfit", "lora"])
def test_the_embedded_model_is_loaded_by_its_folder(capsys: Capture, part: str) -> None:
    run_file = ran(capsys, EMBEDDED, *SET, "--set", f"model.trainable={part}")
    folder = exported(capsys, run_file)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "fedbench.json"}
    final = reader.read(run_file).summary.final_accuracy
    again = ran(capsys, EMBEDDED, "--set", f"model.name={folder}", "--results", "again")
    assert reader.read(again).summary.initial_accuracy == pytest.approx(final, abs=0 if part != "lora" else 0.005)
    assert reader.read(again).provenance["model"]["weights"] == f"the embedded model, tuned, of {folder}"
    assert origin_of(str(folder)).kind == "embedded"


def refused(capsys: Capture, run_file: Path, said: str, out: str = "refused") -> None:
    """Assert one sentence, exit 2 and no folder."""
    there = Path(out).exists()
    capsys.readouterr()
    assert main(["export", str(run_file), "--out", out]) == EXIT_USER
    told = capsys.readouterr()
    assert said in told.err
    assert (told.out, told.err.count("\n"), Path(out).exists()) == ("", 1, there)
    assert not list(Path.cwd().glob(".*.tmp"))


def test_a_run_without_weights_says_which_setting_keeps_them(capsys: Capture) -> None:
    run_file = ran(capsys, EMBEDDED)
    refused(capsys, run_file, "kept no weights. Make it again with --set results.save_weights=true --force")
    again = ran(capsys, EMBEDDED, *SET)
    assert again == run_file, "what is kept is no part of a run's name"
    refused(capsys, run_file, "kept no weights")
    forced = ran(capsys, EMBEDDED, *SET, "--force")
    assert forced == run_file
    assert exported(capsys, run_file).is_dir()


def test_what_can_not_be_exported_is_refused_and_leaves_nothing(capsys: Capture) -> None:
    run_file = ran(capsys, EMBEDDED, *SET)
    weights = kept.path_of(run_file)
    Path("full").mkdir()
    Path("full", "x").write_text("x")
    refused(capsys, run_file, "which is there already", "full")
    refused(capsys, run_file, "can't be written", "/proc/x/y")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(capsys, run_file, "holds other weights")
    weights.write_bytes(whole[:-10])
    refused(capsys, run_file, "can't be read")
    weights.unlink()
    refused(capsys, run_file, "no such file; the weights of a run lie there")
    adapted = ran(capsys, EMBEDDED, *SET, "--set", "model.trainable=adapter")
    refused(capsys, adapted, "bottleneck adapters have no place")


def test_a_folder_of_another_task_or_size_is_refused(capsys: Capture, tmp_path: Path) -> None:
    folder = exported(capsys, ran(capsys, EMBEDDED, *SET))
    save_file({"tokens.weight": torch.zeros(3, 3)}, folder / "model.safetensors")
    assert main(["run", "job.toml", "--set", f"model.name={folder}"]) == EXIT_USER
    assert "weights differ" in capsys.readouterr().err
    base = model_folder("bert", "prototype", tmp_path / "base")
    save_file({"weight": torch.zeros(5, 3), "bias": torch.zeros(5)}, base / "fedbench_head.safetensors")
    Path("text.toml").write_text(TEXT.format(model=base, data=make_set(tmp_path / "set")))
    assert main(["run", "text.toml"]) == EXIT_USER
    assert "Remove it to start from prototypes" in capsys.readouterr().err
