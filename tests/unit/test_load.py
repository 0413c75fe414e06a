"""Models by name: folders of every architecture with every head, known shapes, and what is refused with a reason."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from textsets import make_set, prompt_tokeniser, records
from tinycuts import CAUSAL, KINDS, architecture, fill
from tinyruns import Tiny, make_job, shrunk

from fedbench.base.errors import ConfigError, ModelError
from fedbench.base.job import DataSection
from fedbench.data import embedded
from fedbench.data.rows import Splits
from fedbench.data.splits import load_splits
from fedbench.models import load
from fedbench.models.cut import Cut
from fedbench.models.families import HeadKind, auto_class
from fedbench.models.mapped import Mapped
from fedbench.run.build import construct

HEADS: tuple[HeadKind, ...] = ("verbaliser", "linear", "prototype", "lm")
CASES = [(kind, head) for kind in KINDS for head in HEADS if head != "lm" or kind in CAUSAL]
EVERY = pytest.mark.parametrize(("kind", "head"), CASES)
SETTINGS: dict[str, Any] = {"public_per_class": 5, "max_length": 20}


def folder_of(path: Path, kind: str, head: HeadKind) -> tuple[Path, Any]:
    """Write the model that a head needs, with a tokeniser, and return the folder and the model."""
    _, model = architecture(kind, head)
    model.save_pretrained(path)
    prompt_tokeniser(path, "bpe" if kind in CAUSAL or kind == "roberta" else "words")
    return path, model


def built(name: str, data: Path, head: HeadKind | None, seed: int = 0, **more: Any) -> tuple[Cut, Splits]:
    """Return the cut and the splits of a job on a small data set of two classes."""
    section = DataSection(private=str(data), public=str(data), head=head, **SETTINGS, **more)
    origin = load.origin_of(name)
    splits = load_splits(section, 0, load.tokeniser_of(origin), partial(load.reading_of, origin, head))
    return load.build(origin, section, splits, seed), splits


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [row | {"text": row["text"] + " film" * (i % 4)} for i, row in enumerate(records(60))]
    return make_set(tmp_path_factory.mktemp("data") / "set", train=rows)


@EVERY
def test_a_folder_gives_the_model_that_was_saved(kind: str, head: HeadKind, tmp_path: Path, data: Path) -> None:
    folder, model = folder_of(tmp_path / "model", kind, head)
    before = torch.random.get_rng_state()
    cut, splits = built(str(folder), data, head)
    assert torch.equal(torch.random.get_rng_state(), before)
    batch = splits.train.batch(np.arange(6))
    assert int(batch.lengths.min()) < int(batch.lengths.max())
    with torch.inference_mode():
        own = model(input_ids=batch.ids, attention_mask=batch.mask.long())
        state = cut.states(batch)
        out = cut(batch)
    rows = torch.arange(6)
    if head == "verbaliser":
        places = batch.lengths - 1 if kind in CAUSAL else (batch.ids == splits.mask_word).int().argmax(1)
        torch.testing.assert_close(out, own.logits[rows, places][:, list(splits.label_words or ())], rtol=0, atol=1e-5)
    elif head == "prototype":
        if kind in CAUSAL:
            with torch.inference_mode():
                features = cut.head.features(state.h, batch)
            torch.testing.assert_close(features, own.last_hidden_state[rows, batch.lengths - 1], rtol=0, atol=1e-5)
        else:
            found, expected = state.h[batch.mask], own.last_hidden_state[batch.mask]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    elif head == "lm":
        expected = torch.nn.functional.cross_entropy(
            own.logits[:, :-1].transpose(1, 2), batch.ids[:, 1:], reduction="none"
        )
        counted = batch.mask[:, 1:]
        expected = (expected * counted).sum(1) / counted.sum(1)
        torch.testing.assert_close(cut.head.losses(out, batch), expected.double(), rtol=0, atol=1e-5)
    else:  # 3 labels are stored and 2 are wanted: the last layer is new
        assert out.shape == (6, 2)
        assert 0.005 < float(cut.head.get_parameter("linear.weight").detach().std()) < 0.05
    assert cut.weights == f"the checkpoint {folder}"
    assert not cut.training


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_classifier_of_as_many_labels_is_kept(kind: str, tmp_path: Path, data: Path) -> None:
    model = architecture(kind, "linear")[1]
    import transformers

    config = copy.deepcopy(model.config)
    config.num_labels = 2
    two = getattr(transformers, auto_class(load.origin_of(f"shape:{kind.partition('-')[0]}-tiny").family, "linear"))
    model = two.from_config(config)
    fill(model, 5)
    model.save_pretrained(tmp_path / "model")
    prompt_tokeniser(tmp_path / "model", "words")
    cut, splits = built(str(tmp_path / "model"), data, "linear")
    batch = splits.dev.batch(np.arange(4))
    with torch.inference_mode():
        own = model.eval()(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
        torch.testing.assert_close(cut(batch), own, rtol=0, atol=1e-5)


def test_what_a_checkpoint_lacks_of_a_new_head_comes_from_the_seed(tmp_path: Path, data: Path) -> None:
    folder, _ = folder_of(tmp_path / "model", "bert", "verbaliser")
    one, again, other = (built(str(folder), data, "linear", seed)[0] for seed in (1, 1, 2))
    names = ["backbone.pooler.dense.weight", "head.linear.weight"]  # a masked language model has neither
    for name in names:
        first = one.get_parameter(name)
        assert torch.equal(first, again.get_parameter(name))
        assert not torch.equal(first, other.get_parameter(name))
        assert float(first.std()) == pytest.approx(0.02, rel=0.3)
    assert not one.get_parameter("head.linear.bias").any()
    layer = "backbone.encoder.layer.0.output.dense.weight"
    assert torch.equal(one.get_parameter(layer), other.get_parameter(layer))


@pytest.mark.parametrize(
    ("kind", "head"), [("bert", "verbaliser"), ("roberta", "verbaliser"), ("distilbert", "verbaliser"), ("llama", "lm")]
)
def test_a_checkpoint_without_an_output_layer_is_refused(kind: str, head: HeadKind, tmp_path: Path, data: Path) -> None:
    folder, _ = folder_of(tmp_path / "model", kind, "prototype")
    with pytest.raises(ModelError, match=rf"holds no language-model head: .* is missing .*data\.head = '{head}' needs"):
        built(str(folder), data, head)


def test_weights_that_are_missing_are_never_made_up(tmp_path: Path, data: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, _ = folder_of(tmp_path / "model", "gpt2", "verbaliser")
    weights = load_file(folder / "model.safetensors")
    gone = weights.pop("transformer.h.1.mlp.c_fc.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"holds not all weights of its architecture: transformer\.h\.1\.mlp\.c_fc"):
        built(str(folder), data, "verbaliser")
    weights["transformer.h.1.mlp.c_fc.weight"] = gone[:-1].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"c_fc\.weight is missing or has another shape \(1 of"):
        built(str(folder), data, "prototype")


@pytest.mark.parametrize(
    ("model_type", "settings", "said"),
    [
        ("t5", {}, r"architecture 't5' has no cut\. Allowed: opt, gpt2, llama, qwen2, bert, roberta, distilbert\."),
        ("robertas", None, r"no model can be read there"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, r"use_sliding_window = true"),
        ("bert", {"is_decoder": True}, r"is_decoder = true"),
        ("gpt2", {"add_cross_attention": True}, r"add_cross_attention = true"),
        ("distilbert", {"sinusoidal_pos_embds": True}, r"sinusoidal_pos_embds = true"),
    ],
)
def test_architectures_that_have_no_cut_are_refused(
    model_type: str, settings: dict[str, Any] | None, said: str, tmp_path: Path
) -> None:
    import transformers

    if settings is None:
        (tmp_path / "config.json").write_text('{"model_type": "robertas"}')
    else:
        transformers.AutoConfig.for_model(model_type, **settings).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=said):
        _ = load.origin_of(str(tmp_path)).family


def test_names_that_are_no_model_say_what_is_allowed() -> None:
    with pytest.raises(ModelError, match=r"'shape:opt-125': unknown shape\. Allowed: opt-125m, .* Nearest: opt-125m\."):
        _ = load.origin_of("shape:opt-125").config
    with pytest.raises(ModelError, match=r"no folder /none/such; allowed are a model folder and a hub id"):
        load.origin_of("/none/such")


@pytest.mark.parametrize(
    ("name", "head"), [("shape:bert-tiny", "lm"), ("embedded", "linear"), ("embedded", "prototype")]
)
def test_heads_that_a_model_can_not_have_are_refused(name: str, head: HeadKind) -> None:
    with pytest.raises(ModelError, match=rf"data\.head = '{head}': .*verbaliser"):
        load.origin_of(name).head(head)


def test_rows_that_a_model_has_no_place_for_are_refused(tmp_path: Path, data: Path) -> None:
    folder, _ = folder_of(tmp_path / "model", "roberta", "verbaliser")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"max_position_embeddings": 130', '"max_position_embeddings": 9')
    )
    with pytest.raises(ConfigError, match=r"data\.max_length: found rows of \d+ tokens; .* has 7 positions"):
        built(str(folder), data, "verbaliser")
    (folder / "config.json").write_text(config.replace('"vocab_size": 512', '"vocab_size": 200'))
    with pytest.raises(ModelError, match=r"is beyond its vocabulary of 200: the tokeniser belongs to another model"):
        built(str(folder), data, "verbaliser")


@pytest.mark.parametrize("kind", sorted({kind.partition("-")[0] for kind in KINDS}))
@pytest.mark.parametrize("head", [None, *HEADS])
def test_shapes_run_on_the_embedded_task_and_on_text(kind: str, head: HeadKind | None, data: Path) -> None:
    if head == "lm" and kind not in CAUSAL:
        return
    name = f"shape:{kind}-tiny"
    section = DataSection(head=head, public_per_class=4)
    task = load_splits(section, 0, None)
    for cut, splits in ((load.build(name, section, task, 0), task), built(name, data, head)):
        batch = splits.train.batch(np.arange(5))
        with torch.inference_mode():
            out = cut(batch)
            losses = cut.head.losses(out, batch)
        assert (losses.dtype, losses.shape) == (torch.float64, (5,))
        assert torch.isfinite(losses).all()
        assert ((cut.head.hits(out, batch) >= 0) & (cut.head.hits(out, batch) <= 1)).all()
        assert cut.weights.startswith(f"seeded weights of the shape {kind}-tiny")


@pytest.mark.parametrize("kind", ["opt", "roberta"])
def test_a_shapes_weights_are_the_seeds(kind: str) -> None:
    one, again, other = (load.of_shape(f"{kind}-tiny", [5, 9], seed) for seed in (0, 0, 1))
    state, same, changed = (cut.state_dict() for cut in (one, again, other))
    assert all(torch.equal(state[name], same[name]) for name in state)
    matrices = [name for name, value in state.items() if value.ndim > 1]
    assert not any(torch.equal(state[name], changed[name]) for name in matrices)


def test_the_embedded_model_learns_next_tokens_too() -> None:
    section = DataSection(head="lm", public_per_class=4)
    splits = load_splits(section, 0, None)
    cut = load.build("embedded", section, splits, 0)
    batch = splits.test.batch(np.arange(64))
    with torch.inference_mode():
        out = cut(batch)
    loss = float(cut.head.losses(out, batch).mean())
    assert 1.0 < loss < np.log(embedded.VOCABULARY) - 0.5  # it was pretrained on such texts
    assert float(cut.head.hits(out, batch).mean()) > 0.05


@pytest.mark.parametrize(
    ("kind", "head"), [("opt", "verbaliser"), ("roberta", "verbaliser"), ("gpt2", "lm"), ("bert", "linear")]
)
def test_mapped_weights_are_the_resident_ones(kind: str, head: HeadKind, tmp_path: Path, data: Path) -> None:
    folder, _ = folder_of(tmp_path / "model", kind, head)
    resident, splits = built(str(folder), data, head)
    section = DataSection(private=str(data), public=str(data), head=head, **SETTINGS)
    try:
        place = Mapped(tmp_path / "scratch")
    except ModelError as error:
        pytest.skip(f"mapped weights need a folder on a disk: {error}")
    mapped = load.build(str(folder), section, splits, 0, place)
    values = dict(mapped.named_parameters())
    for name, parameter in resident.named_parameters():
        assert torch.equal(parameter, values[name]), name
    batch = splits.dev.batch(np.arange(4))
    with torch.inference_mode():
        assert torch.equal(resident(batch), mapped(batch))


@pytest.mark.parametrize(
    ("kind", "head"), [("opt", None), ("opt", "lm"), ("roberta", "verbaliser"), ("roberta", "linear"), ("gpt2", None)]
)
@pytest.mark.parametrize("method", ["cooperllm", "fedspzo"])
def test_a_whole_run_on_text(kind: str, head: HeadKind | None, method: str, tmp_path: Path, data: Path) -> None:
    folder, _ = folder_of(tmp_path / "model", kind, head or "verbaliser")
    changes: dict[str, Any] = {
        "model.name": str(folder), "data.private": str(data), "data.public": str(data), "data.max_length": 16,
        "data.public_per_class": 5, "run.rounds": 2,
    }  # fmt: skip
    if head:
        changes["data.head"] = head
    tiny = Tiny(shrunk(construct(make_job(method, changes)), 8))
    tiny.run()
    rows = tiny.metrics.rows
    assert len(rows) == 3
    assert all(np.isfinite(row["dev_loss"]) and 0 <= row["test_accuracy"] <= 1 for row in rows)
    assert rows[0]["dev_loss"] != rows[-1]["dev_loss"]
