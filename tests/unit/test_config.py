"""The job file: every fault is one sentence with key, finding, what is allowed, the nearest name and the origin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedbench.base.config import Setting, as_tree, check, flatten, load, parse_setting
from fedbench.base.errors import EXIT_USER, ConfigError
from fedbench.base.job import OUTSIDE_HASH
from fedbench.run.build import METHODS, Job, resolve

NAMED = "[method]\nname = 'fedmezo'\n"


def resolved(folder: Path, text: str, *settings: str) -> Job:
    """Return the job of a TOML text with `--set` arguments, as the command line makes it."""
    path = folder / "job.toml"
    path.write_text(text if "[method]" in text else f"{text}\n{NAMED}", encoding="utf-8")
    parsed = [parse_setting(setting) for setting in settings]
    return resolve(load(path, parsed), str(path), frozenset(setting.path for setting in parsed))


#: (job file, what the message must say besides its origin)
BAD_FILES: list[tuple[str, list[str]]] = [
    (
        "[zo]\nepsilom = 1e-3",
        ["zo.epsilom: unknown key", "zo.epsilon = 0.001", "zo.perturbations = 1", "Nearest: zo.epsilon."],
    ),
    ("[rnu]\nrounds = 3", ["rnu: unknown key", "Allowed: run, federation, model, data", "Nearest: run."]),
    ("[zo.deep]\nx = 1", ["zo.deep: unknown key", "zo.epsilon"]),
    ("zo = 3", ["zo: found 3; expected a table"]),
    ("[run]\nrounds = 'x'", ["run.rounds: found 'x'", "valid integer"]),
    ("[run]\nrounds = true", ["run.rounds: found True", "valid integer"]),
    ("[run]\nrounds = 2.0", ["run.rounds: found 2.0", "valid integer"]),
    ("[run]\nrounds = 0", ["run.rounds: found 0", "greater than or equal to 1"]),
    ("[run]\nrounds = [5]", ["run.rounds: found [5]", "valid integer"]),
    ("[run.rounds]\nx = 5", ["run.rounds: found {'x': 5}", "valid integer"]),
    ("[run]\nint = 5", ["run.int: unknown key", "Nearest: run."]),
    ("[run]\nseed = -1", ["run.seed: found -1", "greater than or equal to 0"]),
    ("[run]\nseed = 2147483648", ["run.seed: found 2147483648", "less than 2147483648"]),
    ("[run]\ntarget_accuracy = 80", ["run.target_accuracy: found 80", "less than or equal to 1"]),
    ("[run]\nthreads = 0", ["run.threads: found 0"]),
    ("[federation]\nbatch_size = 1", ["federation.batch_size: found 1", "greater than or equal to 2"]),
    ("[federation]\ndevices = 2\nsampled = 3", ["federation: sampled = 3 is more than devices = 2"]),
    ("[federation]\nsampled = 'all'", ["federation.sampled: found 'all'", "valid integer"]),
    ("[federation]\nalpha = 0", ["federation.alpha: found 0", "greater than 0"]),
    (
        "[federation]\npartition = 'dirichlett'",
        ["federation.partition: found 'dirichlett'", "'iid', 'dirichlet', 'shards' or 'keyed'", "Nearest: dirichlet."],
    ),
    (
        "[model]\ntrainable = 'fulll'",
        ["model.trainable: found 'fulll'", "'full', 'bitfit', 'lora', 'adapter' or 'head'", "Nearest: full."],
    ),
    ("[model]\ntrainable = 3", ["model.trainable: found 3", "'full', 'bitfit', 'lora', 'adapter' or 'head'"]),
    ("[data]\nhead = 'verbalizer'", ["data.head: found 'verbalizer'", "Nearest: verbaliser."]),
    ("[data]\ntext_columns = []", ["data.text_columns: found []", "at least 1"]),
    ("[data]\ntext_columns = ['a', 'b', 'c']", ["data.text_columns: found ['a', 'b', 'c']", "at most 2"]),
    ("[data]\ntext_columns = 'text'", ["data.text_columns: found 'text'"]),
    ("[data]\ntext_columns = [1]", ["data.text_columns: found 1", "valid string"]),
    ("[data]\nprivate = 1", ["data.private: found 1", "valid string"]),
    ("[zo]\nepsilon = nan", ["zo.epsilon: found nan", "finite"]),
    ("[zo]\nepsilon = inf", ["zo.epsilon: found inf", "finite"]),
    ("[zo]\nepsilon = -1.0", ["zo.epsilon: found -1.0", "greater than 0"]),
    ("[zo]\nepsilon = '1e-3'", ["zo.epsilon: found '1e-3'", "valid number"]),
    ("[comm]\nlz4 = 1", ["comm.lz4: found 1", "valid boolean"]),
    ("[comm]\ndeadline_s = 0", ["comm.deadline_s: found 0", "greater than 0"]),
    ("[comm]\npoll_interval = '1'", ["comm.poll_interval: found '1'", "20ms", "us, ms, s, min"]),
    ("[comm]\npoll_interval = 1.0", ["comm.poll_interval: found 1.0", "valid string"]),
    ("[link]\ndown = '100 Mbit'", ["link.down: found '100 Mbit'", "100Mbit/s", "Gbit/s"]),
    ("[link]\nup = '0bit/s'", ["link.up: found '0bit/s'", "more than 0"]),
    ("[link]\nlatency = '-1ms'", ["link.latency: found '-1ms'", "20ms"]),
    ("[profile]\nname = 'ltr'", ["profile.name: found 'ltr'", "'3g', 'lte', '5g'", "Nearest: lte."]),
    ("[profile]\nname = '6g'", ["profile.name: found '6g'", "Nearest: 5g."]),
    ("[profile]\ndevice = 'jetson'", ["profile.device: found 'jetson'", "Nearest: jetson-nano."]),
    ("[profile]\nmemory = 4", ["profile.memory: found 4", "valid string"]),
    ("[profile]\nmemory = '4'", ["profile.memory: found '4'", "512MB", "GiB"]),
    ("[profile]\nmemory = '0B'", ["profile.memory: found '0B'", "more than 0 B"]),
    ("[profile]\nflops_per_s = 0", ["profile.flops_per_s: found 0", "greater than 0"]),
    ("[profile]\ndropout = 1.5", ["profile.dropout: found 1.5", "less than or equal to 1"]),
    ("[profile]\ndeadline_s = 0", ["profile.deadline_s: found 0", "greater than 0"]),
    ("[profile]\ndeadline = 3", ["profile.deadline: unknown key", "Nearest: profile.deadline_s."]),
    ("[profile]\ntrunk = '10G'", ["profile.trunk: found '10G'", "100Mbit/s"]),
    ("[run]\ntrain_every = 0", ["run.train_every: found 0", "greater than or equal to 1"]),
    ("[link]\nclock = 'real'", ["link.clock: found 'real'", "'none', 'paced' or 'virtual'"]),
    ("[method]\nlr = 1", ["method.name: missing", 'name = "cooperllm"']),
    ("[method]\nname = 3", ["method.name: found 3"]),
    ("method = 'fedmezo'\n#[method]", ["method.name: found method = 'fedmezo'"]),
    (
        "[method]\nname = 'fedmzeo'",
        ["method.name: found 'fedmzeo'", ", ".join(sorted(METHODS)), "Nearest: fedmezo."],
    ),
    (
        f"{NAMED}[method.fedmzeo]\nlr = 1",
        ["method.fedmzeo: unknown method table", "Allowed: name, ", "Nearest: fedmezo."],
    ),
    (f"{NAMED}lr = 1", ["method.lr: unknown method table"]),
    (f"{NAMED}fedavg = 1", ["method.fedavg: found 1; expected a table"]),
    (
        f"{NAMED}[method.fedmezo]\nlrr = 1",
        ["method.fedmezo.lrr: unknown key", "method.fedmezo.lr = 0.002", "Nearest: method.fedmezo.lr."],
    ),
    (f"{NAMED}[method.fedmezo]\nschedule = 'line'", ["method.fedmezo.schedule: found 'line'", "Nearest: linear."]),
    (f"{NAMED}[method.cooperllm]\nalpha = 1.5", ["method.cooperllm.alpha: found 1.5", "less than or equal to 1"]),
    (f"{NAMED}[method.fedspzo]\np2 = 0", ["method.fedspzo.p2: found 0"]),
    ("[x\n", ["not valid TOML", "line 1"]),
]


@pytest.mark.parametrize(("text", "parts"), BAD_FILES, ids=[text.strip()[:40] for text, _ in BAD_FILES])
def test_a_bad_job_file_is_one_sentence_that_helps(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(tmp_path, text)
    message = str(caught.value)
    for part in (*parts, str(tmp_path / "job.toml")):
        assert part in message
    assert "\n" not in message
    assert "pydantic" not in message
    assert caught.value.exit_code == EXIT_USER


#: (`--set` argument, what the message must say)
BAD_SETTINGS: list[tuple[str, list[str]]] = [
    ("zo.epsilom=1", ["zo.epsilom: unknown key", "Nearest: zo.epsilon."]),
    ("run.rounds=abc", ["run.rounds: found 'abc'", "valid integer"]),
    ("run.rounds='5'", ["run.rounds: found '5'"]),
    ("run.rounds=", ["run.rounds: found ''"]),
    ("run.rounds.x=3", ["run.rounds: found {'x': 3}"]),
    ("run=3", ["run: found 3; expected a table"]),
    ("method.name=fedmez", ["method.name: found 'fedmez'", "Nearest: fedmezo."]),
    ("method=fedmezo", ["method.name: found method = 'fedmezo'"]),
    ("method.lr=1", ["method.lr: unknown method table"]),
    ("method.fedmezo=1", ["method.fedmezo: found 1; expected a table"]),
    ("method.fedmezo.lr=-1", ["method.fedmezo.lr: found -1"]),
    ("method.fedspzo.splitt=1", ["method.fedspzo.splitt: unknown key", "Nearest: method.fedspzo.split."]),
    ("comm.codec=int99", ["comm.codec: found 'int99'", "'raw'"]),
    ("comm.error_feedback=true", ["comm: error_feedback = true has nothing to give back with codec = 'raw'"]),
    ("federation.sampled=99", ["federation: sampled = 99 is more than devices = 8"]),
]


@pytest.mark.parametrize(("setting", "parts"), BAD_SETTINGS)
def test_a_bad_setting_says_that_it_came_from_the_command_line(tmp_path: Path, setting: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(tmp_path, "", "run.seed=3", setting)
    for part in (*parts, "(From --set)"):
        assert part in str(caught.value)


def test_a_fault_of_the_file_is_not_blamed_on_settings_beside_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.rounds: found 'x'.*\(From .*job\.toml\)"):
        resolved(tmp_path, "[run]\nrounds = 'x'", "run.seed=3", "zo.epsilon=0.1")


@pytest.mark.parametrize("text", ["run.rounds", "=3", "", "run..rounds=3", ".rounds=3", "run.=3"])
def test_a_setting_without_key_or_value_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected key=value with a dotted key"):
        parse_setting(text)


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("run.rounds=20", ("run", "rounds"), 20),
        ("zo.epsilon=1e-3", ("zo", "epsilon"), 1e-3),
        ("run.stop_at_target=true", ("run", "stop_at_target"), True),
        ("data.private=trec", ("data", "private"), "trec"),
        ('data.private="trec"', ("data", "private"), "trec"),
        ("data.private=a/b c.jsonl", ("data", "private"), "a/b c.jsonl"),
        ("model.name=package:x/model", ("model", "name"), "package:x/model"),
        ("data.private=a=b", ("data", "private"), "a=b"),
        ("data.private=", ("data", "private"), ""),
        ("data.private=True", ("data", "private"), "True"),
        ('data.text_columns=["a", "b"]', ("data", "text_columns"), ["a", "b"]),
        ("run={rounds = 5}", ("run",), {"rounds": 5}),
        (" run.rounds = 7", ("run", "rounds"), 7),
    ],
)
def test_a_setting_is_toml_and_else_a_string(text: str, path: tuple[str, ...], value: Any) -> None:
    assert parse_setting(text) == Setting(path, value)


def test_defaults_give_way_to_the_file_and_the_file_to_settings(tmp_path: Path) -> None:
    text = "[run]\nrounds = 7\nseed = 1\n[method]\nname = 'fedspzo'\n[method.fedspzo]\np1 = 2\np2 = 3\n"
    job = resolved(tmp_path, text, "run.seed=5", "method.fedspzo.p2=9", "run.seed=6")
    assert (job.config.run.rounds, job.config.run.seed, job.config.run.threads) == (7, 6, 1)
    assert job.settings.model_dump()["p1"] == 2
    assert job.settings.model_dump()["p2"] == 9
    assert job.settings.model_dump()["split"] == -1


def test_a_setting_may_name_the_method_and_make_tables(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text("")
    config = load(path, [parse_setting("method.name=fedavg"), parse_setting("method.fedavg.lr=0.5")])
    assert resolve(config, "x").settings.lr == 0.5


def test_only_the_active_methods_settings_count_but_all_are_checked(tmp_path: Path) -> None:
    text = f"{NAMED}[method.fedavg]\nlr = 0.7\n[method.fedmezo]\nlr = 0.3\n"
    job = resolved(tmp_path, text)
    assert job.settings.lr == 0.3
    assert job.tree["method"] == {"name": "fedmezo", "settings": {"lr": 0.3, "schedule": "constant"}}
    assert resolved(tmp_path, text, "method.fedavg.lr=0.1").run_id == job.run_id
    assert resolved(tmp_path, text, "method.fedmezo.lr=0.1").run_id != job.run_id
    with pytest.raises(ConfigError, match=r"method\.fedavg\.lr: found 0"):
        resolved(tmp_path, text, "method.fedavg.lr=0")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lr", ["0", "-0.1", "nan", "true", "'x'"])
def test_every_methods_step_size_is_a_positive_number(tmp_path: Path, method: str, lr: str) -> None:
    with pytest.raises(ConfigError, match=rf"method\.{method}\.lr: found "):
        resolved(tmp_path, f"[method]\nname = '{method}'\n[method.{method}]\nlr = {lr}\n")


def test_names_follow_what_can_change_a_result_and_nothing_else(tmp_path: Path) -> None:
    plain = resolved(tmp_path, "")
    assert plain.run_id == f"fedmezo-{plain.run_id[-12:]}"
    assert set(plain.run_id[-12:]) <= set("0123456789abcdef")
    changed = {
        "run.rounds": 5, "run.seed": 1, "run.eval_every": 9, "run.eval_first": 4, "run.target_accuracy": 0.5,
        "run.stop_at_target": "true", "run.threads": 2, "run.ranks": 3,
        "run.launcher": "srun-pmix", "federation.devices": 9, "federation.sampled": 3,
        "federation.partition": "shards", "federation.alpha": 0.1, "federation.local_steps": 2,
        "federation.batch_size": 4, "model.name": "x", "model.trainable": "head", "model.mapped": "true",
        "model.device": "cuda", "model.micro_batch": 4, "model.dtype": "bfloat16", "model.lora_rank": 4,
        "model.lora_alpha": 8, "model.adapter_reduction": 8, "data.private": "x",
        "data.public": "embedded:poor", "data.text_columns": '["a"]', "data.label_column": "y", "data.head": "linear",
        "data.template": "{text} so {mask}", "data.label_words": '["a", "b"]',
        "data.max_length": 9, "data.public_per_class": 3, "data.public_labels": "shuffled", "zo.epsilon": 0.1,
        "zo.perturbations": 3, "zo.distribution": "gaussian", "comm.codec": "int4", "comm.lz4": "true",
        "comm.error_feedback": "true", "comm.deadline_s": 3, "comm.guide_lag": 1, "comm.guide_reuse": "resend",
        "comm.adapt": "measured", "comm.replay": "x.h5", "profile.flops_per_s": 1e9, "comm.overlap": "false",
        "comm.progress": "none", "comm.poll_interval": "2ms", "comm.chunk_bytes": 8192, "comm.topology": "tree",
        "comm.edges": 3, "link.clock": "paced", "link.down": "1Mbit/s", "link.up": "2Mbit/s", "link.latency": "1ms",
        "link.jitter": "2ms", "run.train_every": 2, "federation.rows": 8, "profile.name": "lte",
        "profile.device": "jetson-nano", "profile.memory": "1GiB",
        "profile.cloud_flops_per_s": 1e12, "profile.spread": 0.3, "profile.trunk": "1Gbit/s",
        "profile.trunk_latency": "3ms", "profile.dropout": 0.2, "profile.deadline_s": 4.0,
        "results.dir": "x", "results.checkpoint_every": 3, "results.checkpoint_s": 9, "results.trace_rounds": 3,
        "results.save_weights": "true",
    }  # fmt: skip
    with_codec = {  # what a key can't be set without
        "comm.error_feedback": ("comm.codec=int8",),
        "comm.replay": ("comm.codec=adaptive", "comm.adapt=replay"),
    }
    ids = {
        key: resolved(tmp_path, "", *with_codec.get(key, ()), f"{key}={value}").run_id for key, value in changed.items()
    }
    for key, run_id in ids.items():
        assert (run_id == plain.run_id) == (key in OUTSIDE_HASH), key
    known = set(flatten(as_tree(plain.config))) - {"method.name"}
    assert set(changed) == known, "a key without a test"
    others = [run_id for key, run_id in ids.items() if key not in OUTSIDE_HASH]
    assert len(set(others)) == len(others)


def test_values_that_say_the_default_are_the_default(tmp_path: Path) -> None:
    plain = resolved(tmp_path, "")
    for setting in ("federation.sampled=8", "model.trainable=full", "run.rounds=100", "method.fedmezo.lr=2e-3"):
        assert resolved(tmp_path, "", setting).run_id == plain.run_id, setting


def test_a_config_can_not_be_changed_afterwards(tmp_path: Path) -> None:
    config: Any = resolved(tmp_path, "").config
    with pytest.raises(ValueError, match="frozen"):
        config.run.rounds = 3
    with pytest.raises(ValueError, match="frozen"):
        config.run = None


def test_files_that_can_not_be_read_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: no such job file"):
        load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="can't be read"):
        load(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"[data]\nprivate = '\xff'\n")
    with pytest.raises(ConfigError, match=r"latin\.toml: can't be read"):
        load(tmp_path / "latin.toml")


def test_a_job_in_json_is_the_job_in_toml(tmp_path: Path) -> None:
    toml, other = tmp_path / "job.toml", tmp_path / "job.json"
    toml.write_text(f"{NAMED}[run]\nrounds = 7\n")
    other.write_text('{"method": {"name": "fedmezo"}, "run": {"rounds": 7}, "model": {"trainable": null}}')
    assert load(other) == load(toml)
    for text, said in (("{", "not valid JSON"), ("[1]", r"found \[1\]; expected a job's tables")):
        other.write_text(text)
        with pytest.raises(ConfigError, match=rf"job\.json: {said}"):
            load(other)


def test_a_tree_survives_json(tmp_path: Path) -> None:
    job = resolved(tmp_path, "[data]\ntext_columns = ['a']")
    tree = as_tree(job.config)
    assert check(tree, source="again") == job.config
    assert tree["data"]["text_columns"] == ["a"]
