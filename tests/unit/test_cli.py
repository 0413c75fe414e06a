"""The command line: exit codes, one line on stderr for a user's error, data on stdout, and no traceback."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from synthetic_runs import make_run
from textsets import make_set, make_tokeniser, records, write
from tinyruns import shrunk

from fedbench.__main__ import main, parser
from fedbench.base.errors import EXIT_OK, EXIT_USER
from fedbench.data import hub
from fedbench.results import reader, writer
from fedbench.run import build, command, execute, launch

#: Keys of `show --json`: what users and checks of results rely on.
SHOWN = [
    "run_id", "method", "complete", "stop_reason", "rounds", "seed", "ranks", "devices", "final_accuracy",
    "best_accuracy", "initial_accuracy", "probe_accuracy", "target_accuracy", "rounds_to_target", "device_flops",
    "cloud_flops", "replay_ops", "uplink_bytes", "downlink_bytes", "uplink_bytes_per_device_round", "wire_bytes",
    "peak_device_bytes", "round_s_median", "sim_s", "hidden_fraction", "unaccounted_fraction", "repeatable",
    "weights_sha256",
    "trajectory_sha256",
]  # fmt: skip

JOB = """
[run]
rounds = 2
[federation]
devices = 3
batch_size = 2
[model]
trainable = "head"
[data]
public_per_class = 4
[method]
name = "fedmezo"
"""


class Called:
    """What a command line gave back."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def lines(self) -> list[str]:
        return self.err.splitlines()


Call = Callable[..., Called]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """Run a command line in this process, as a launcher's child or by hand is told by the environment alone."""
    numbers = (*launch.STOP_SIGNALS, *launch.ALONE_SIGNALS)
    handlers = [signal.getsignal(number) for number in numbers]

    def called(*words: str | Path) -> Called:
        try:
            code = main([str(word) for word in words])
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
        told = capsys.readouterr()
        return Called(code, told.out, told.err)

    yield called
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No launcher, no data folder of this machine, few rows to evaluate, and a working folder of its own."""
    for name in (*launch.SIZE_VARIABLES, "FEDBENCH_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    for module in (command, execute):
        monkeypatch.setattr(module, "construct", lambda job: shrunk(build.construct(job), 16))


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(JOB)
    return path


def refused(called: Called, *parts: str) -> None:
    """Assert a user's error: exit 2, one line on stderr, nothing on stdout, no run file."""
    assert called.code == EXIT_USER
    assert called.out == ""
    assert len(called.lines) == 1, called.err
    assert called.err.startswith("fedbench: ")
    assert "Traceback" not in called.err
    for part in parts:
        assert part in called.err
    assert not list(Path.cwd().rglob("*.h5"))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["VERB"]),
        (["rum"], ["'rum' is no verb", "run, show, report", "Nearest: run."]),
        (["--debug", "shwo"], ["'shwo' is no verb", "Nearest: show."]),
        (["quantum"], ["'quantum' is no verb"]),
        (["run"], ["JOB.toml", "fedbench run --help"]),
        (["show"], ["FILE", "fedbench show --help"]),
        (["report"], ["PATH"]),
        (["export", "x.h5"], ["--out", "fedbench export --help"]),
        (["export", "none.h5", "--out", "tuned"], ["none.h5"]),
        (["check", "-n", "0"], ["-n", "found '0'", "a whole number from 1"]),
        (["run", "job.toml", "--sett", "a=1"], ["unrecognized arguments: --sett a=1"]),
        (["run", "job.toml", "extra"], ["unrecognized arguments: extra"]),
        (["run", "job.toml", "-n", "0"], ["-n", "found '0'", "a whole number from 1"]),
        (["run", "job.toml", "-n", "two"], ["found 'two'"]),
        (["run", "job.toml", "-n", "-3"], ["-n"]),
        (["run", "job.toml", "--set"], ["--set"]),
        (["run", "none.toml"], ["none.toml: no such job file"]),
        (["run", "none.toml", "--dry-run"], ["none.toml: no such job file"]),
        (["show", "none.h5"], ["none.h5"]),
        (["report", "none.h5"], ["none.h5"]),
    ],
)
@pytest.mark.usefixtures("job")
def test_wrong_words_are_one_line_and_exit_2(call: Call, words: list[str], parts: list[str]) -> None:
    refused(call(*words), *parts)


@pytest.mark.parametrize("verb", ["run", "show", "report", "methods", "sweep", "check", "export", "bench", "trace"])
def test_every_verb_has_help_with_an_example(call: Call, verb: str) -> None:
    told = call(verb, "--help")
    assert told.code == EXIT_OK
    assert f"example:\n  fedbench {verb}" in told.out


def test_help_lists_every_verb(call: Call) -> None:
    told = call("--help")
    assert told.code == EXIT_OK
    verbs = next(action for action in parser()._actions if action.dest == "verb").choices
    assert verbs
    for verb in verbs:
        assert verb in told.out


def test_methods_lists_every_method_with_its_settings(call: Call) -> None:
    told = call("methods")
    assert (told.code, told.err) == (EXIT_OK, "")
    for name, method in build.METHODS.items():
        assert any(line.startswith(name) and method.summary in line for line in told.out.splitlines())
        for setting in method.settings_type.model_fields:
            assert f"    {setting} = " in told.out


def test_show_json_has_exactly_the_promised_keys(call: Call, tmp_path: Path) -> None:
    run = make_run(rounds=3, target=None)
    path = tmp_path / "runs" / "x.h5"
    writer.write(path, run)
    told = call("show", path, "--json")
    assert (told.code, told.err) == (EXIT_OK, "")
    shown = json.loads(told.out)
    assert list(shown) == SHOWN
    assert shown["target_accuracy"] is None
    assert shown["rounds_to_target"] is None
    assert shown["final_accuracy"] == run.summary.final_accuracy
    table = call("show", path)
    assert table.code == EXIT_OK
    assert run.summary.run_id in table.out


def test_a_cut_run_file_is_refused_in_one_line(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "cut.bin"
    writer.write(tmp_path / "x.bin", make_run(rounds=3))
    path.write_bytes((tmp_path / "x.bin").read_bytes()[:-100])
    refused(call("show", path, "--json"), "cut.bin")


def test_dry_run_checks_everything_and_writes_nothing(call: Call, job: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    told = call("run", job, "--dry-run", "--results", tmp_path / "out", "--set", "run.rounds=77")
    assert (told.code, told.out) == (EXIT_OK, "")
    assert str(tmp_path / "out" / "runs" / "fedmezo-") in told.err
    assert "77 rounds" in told.err
    assert sorted(tmp_path.rglob("*")) == before
    refused(call("run", job, "--dry-run", "--set", "zo.epsilom=1"), "zo.epsilom", "zo.epsilon")
    refused(call("run", job, "--dry-run", "--set", "data.public_per_class=9999"), "data.public_per_class: found 9999")
    refused(call("run", job, "--dry-run", "--set", "model.name=no/where/here"), "no folder no/where/here")


def test_a_run_prints_its_path_and_is_not_done_twice(call: Call, job: Path, tmp_path: Path) -> None:
    first = call("run", job, "--results", tmp_path / "out")
    assert first.code == EXIT_OK
    path = Path(first.out.strip())
    assert first.out == f"{path}\n"
    assert "Traceback" not in first.err
    written = path.stat().st_mtime_ns
    again = call("run", job, "--results", tmp_path / "out")
    assert (again.code, again.out, path.stat().st_mtime_ns) == (EXIT_OK, first.out, written)
    os.utime(path, ns=(0, 0))
    forced = call("run", job, "--results", tmp_path / "out", "--force")
    assert (forced.code, forced.out) == (EXIT_OK, first.out)
    assert path.stat().st_mtime_ns > 0
    summary = reader.read(path).summary
    assert (summary.rounds, summary.ranks, summary.devices, summary.peak_device_bytes) == (2, 1, 3, None)
    other = call("run", job, "--results", tmp_path / "out", "--set", "run.seed=1")
    assert other.out != first.out
    assert list(json.loads(call("show", path, "--json").out)) == SHOWN


def test_the_results_folder_is_the_jobs_unless_said_otherwise(call: Call, job: Path, tmp_path: Path) -> None:
    told = call("run", job, "--set", "results.dir=here/and there", "--dry-run")
    assert told.err.startswith("here/and there/runs/fedmezo-")
    assert call("run", job, "--set", "results.dir=a", "--results", "b", "--dry-run").err.startswith("b/runs/")
    assert call("run", job, "--dry-run").err.startswith("results/runs/")


def test_a_damaged_file_in_the_runs_place_is_moved_aside_and_made_anew(call: Call, job: Path) -> None:
    path = Path(call("run", job, "--results", "out").out.strip())
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    told = call("run", job, "--results", "out")
    assert told.code == EXIT_OK
    assert Path(told.out.strip()) == path
    assert "is not a complete run; it was moved to" in told.err
    assert reader.read(path).summary.complete
    assert (path.parent / "bad").is_dir()


def text_job(folder: Path, data: Path, model: Path) -> Path:
    """Return a job on text data with a model folder."""
    path = folder / "text.toml"
    path.write_text(
        f"[run]\nrounds = 1\n[federation]\ndevices = 2\nbatch_size = 2\n[model]\nname = '{model}'\n"
        f"[data]\nprivate = '{data}'\npublic = '{data}'\npublic_per_class = 2\n[method]\nname = 'fedmezo'\n"
    )
    return path


def flipped(folder: Path) -> None:
    raw = bytearray((folder / "train.jsonl.gz").read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    (folder / "train.jsonl.gz").write_bytes(raw)


#: what is wrong -> (what is done to a good data folder, what the message says)
DATA_FAULTS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "label out of range": (
        lambda folder: write(folder, "train", [*records(5), {"text": "x", "label": 7}]),
        ["train.jsonl.gz", "row 6", "label 7 is out of range"],
    ),
    "broken gzip": (flipped, ["train.jsonl.gz", "broken gzip"]),
    "empty file": (lambda folder: (folder / "train.jsonl.gz").write_bytes(b""), ["train.jsonl.gz", "empty"]),
    "no test file": (lambda folder: (folder / "test.jsonl.gz").unlink(), ["no test.jsonl.gz"]),
    "not JSON": (lambda folder: write(folder, "test", ["{oops"]), ["test.jsonl.gz", "line 1", "not JSON"]),
}


@pytest.mark.parametrize("fault", DATA_FAULTS)
@pytest.mark.parametrize("dry", [True, False], ids=["dry run", "run"])
def test_bad_data_are_one_line_before_anything_is_written(call: Call, tmp_path: Path, fault: str, dry: bool) -> None:
    break_it, parts = DATA_FAULTS[fault]
    data = make_set(tmp_path / "set")
    break_it(data)
    job = text_job(tmp_path, data, make_tokeniser(tmp_path / "model"))
    refused(call("run", job, "--results", "out", *(["--dry-run"] if dry else [])), *parts)
    assert not (tmp_path / "out").exists()


def test_a_data_set_that_is_nowhere_names_where_it_was_looked_for(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = text_job(tmp_path, Path("nowhere at all"), make_tokeniser(tmp_path / "model"))
    monkeypatch.setenv("FEDBENCH_DATA", str(make_set(tmp_path / "root" / "trec").parent))
    refused(call("run", job), "'nowhere at all' not found", str(tmp_path / "root"), "FEDBENCH_DATA", "it has trec")
    monkeypatch.setenv("FEDBENCH_DATA", str(tmp_path / "gone"))
    refused(call("run", job), "'nowhere at all' not found", str(tmp_path / "gone"))


def model_folder(folder: Path, config: dict[str, Any] | None) -> Path:
    make_tokeniser(folder)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


SMALL_BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 160,
}


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (SMALL_BERT, ["no model can be read there"]),
        (None, ["no model can be read there"]),
        ({"model_type": "t5"}, ["'t5' has no cut", "Allowed: opt"]),
        ({"model_type": "bertt"}, ["no model can be read there"]),
    ],
    ids=["no weights", "no config", "no cut", "no such type"],
)
def test_a_model_folder_that_holds_no_model_is_one_line(
    call: Call, tmp_path: Path, config: dict[str, Any] | None, parts: list[str]
) -> None:
    model = model_folder(tmp_path / "model", config)
    refused(call("run", text_job(tmp_path, make_set(tmp_path / "set"), model)), str(model), *parts)


def test_a_hub_that_can_not_be_reached_is_one_line_without_retries(
    call: Call, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "problem", lambda name, kind: f"the hub can't be reached ({kind} {name})")
    told = call("run", job, "--set", "model.name=nobody/nothing-of-the-sort")
    refused(told, "nothing of it downloaded before", "the hub can't be reached (model nobody/nothing-of-the-sort)")


@pytest.mark.parametrize("method", build.METHODS)
def test_every_method_runs_on_text_with_an_encoder(call: Call, tmp_path: Path, method: str) -> None:
    model = model_folder(tmp_path / "model", SMALL_BERT)
    transformers.BertModel(transformers.BertConfig(**SMALL_BERT), add_pooling_layer=False).save_pretrained(model)
    job = text_job(tmp_path, make_set(tmp_path / "set"), model)
    words = [f"--set=method.name={method}", "--set=model.trainable=bitfit"]
    if method == "meerkat":
        words.append("--set=method.meerkat.density=0.05")  # of 178 biases
    told = call("run", job, *words, "--results", "out")
    assert told.code == EXIT_OK, told.err
    run = reader.read(Path(told.out.strip()))
    assert run.summary.method == method
    assert np.isfinite(run.rounds["dev_loss"]).all()


def test_weights_that_are_no_weights_are_one_line(call: Call, tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model", SMALL_BERT)
    (model / "model.safetensors").write_bytes(b"not safetensors")
    refused(call("run", text_job(tmp_path, make_set(tmp_path / "set"), model)), str(model))


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["zo.epsilom=1e-3"], ["zo.epsilom", "Nearest: zo.epsilon.", "(From --set)"]),
        (["data.private=trec", "data.public=trec"], ["data.private", 'model.name = "embedded" has no tokeniser']),
        (["data.public=embedded:rich"], ["data.public: found 'embedded:rich'", "embedded:poor"]),
        (["data.private=embedded:poor"], ["data.private: found 'embedded:poor'"]),
        (["data.head=linear"], ["data.head = 'linear'", "verbaliser"]),
        (["model.name=package:not_there/x"], ["package not_there is not installed"]),
        (["method.name=fedspzo"], ["method.fedspzo.split", "nothing to train"]),
        (["federation.devices=100000"], ["federation.devices"]),
        (["federation.sampled=4"], ["sampled = 4 is more than devices = 3"]),
        (["--set"], ["--set --set: expected key=value"]),
    ],
)
def test_jobs_that_make_no_sense_are_one_line(call: Call, job: Path, settings: list[str], parts: list[str]) -> None:
    words = [word for setting in settings for word in (f"--set={setting}",)]
    refused(call("run", job, *words), *parts)


def test_under_a_launcher_the_ranks_asked_for_must_be_the_launchers(
    call: Call, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    refused(call("run", job, "-n", "2"), "-n: found 2; the launcher started 3 rank(s)")


def test_debug_shows_the_traceback_to_who_asks_for_it(job: Path) -> None:
    with pytest.raises(Exception, match=r"zo\.epsilom"):
        main(["--debug", "run", str(job), "--set", "zo.epsilom=1"])


def test_a_numerical_failure_is_one_line_and_not_the_users_error(
    call: Call, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = build.construct

    def broken(job_: build.Job) -> build.Built:
        built = shrunk(real(job_), 16)
        built.trainable.tensors[0].flat[:] = np.nan
        return built

    monkeypatch.setattr(execute, "construct", broken)
    told = call("run", job, "--results", "out")
    assert told.code == 1
    assert told.out == ""
    assert "is not a finite number" in told.err
    assert "Traceback" not in told.err
    assert not list(Path("out").rglob("*.h5"))
