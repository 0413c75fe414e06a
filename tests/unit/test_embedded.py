"""The embedded task and model: ranges, determinism, no leakage, the stated zero-shot accuracy, and the recipe's start."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fedbench.base.errors import DataError, ModelError
from fedbench.data import embedded
from fedbench.data.rows import Rows
from fedbench.models.embedded import network, recipe

#: From docs/embedded.md.
ZERO_SHOT_DEV = 0.609
ZERO_SHOT_TEST = 0.623


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def texts(rows: Rows) -> set[bytes]:
    return {row.tobytes() for row in rows.ids}


@pytest.mark.parametrize("public", ["embedded", "embedded:poor"])
def test_splits_have_their_sizes_ranges_and_classes(public):
    splits = embedded.load(public, 32, 0)
    sizes = {"train": 4096 - 128, "public": 128, "dev": 512, "test": 1024}
    for name, size in sizes.items():
        rows = getattr(splits, name)
        assert rows.ids.shape == (size, 32), name
        assert rows.ids.min() >= embedded.PROMPT, name
        assert rows.ids.max() < embedded.VOCABULARY, name
        assert (rows.ids[:, -1] == embedded.PROMPT).all(), name
        assert not np.isin(rows.ids, range(embedded.LABEL_WORDS, embedded.TOPIC_START)).any(), name
        assert (rows.lengths == 32).all(), name
        assert (rows.labels == rows.groups // 2).all(), name
    assert (np.bincount(splits.public.labels) == 32).all()
    assert len(splits.label_names) == len(splits.label_words) == 4
    assert len(set(splits.label_words)) == 4


def test_words_of_the_own_topic_have_the_stated_share():
    topics = np.arange(8000) % embedded.TOPICS
    ids = embedded.write_texts(np.random.default_rng(0), topics)[:, :-1]
    topical = (ids >= embedded.TOPIC_START) & (ids < embedded.FUNCTION_START)
    own = topical & ((ids - embedded.TOPIC_START) // embedded.TOPIC_WORDS == topics[:, None])
    assert topical.mean() == pytest.approx(0.45, abs=0.01)
    assert own.mean() == pytest.approx(0.20 + 0.25 / 8, abs=0.01)
    assert np.unique(ids[topical]).size == embedded.TOPICS * embedded.TOPIC_WORDS


def test_the_same_key_gives_the_same_rows_and_the_seed_moves_only_the_public_ones():
    first, again, other = (embedded.load("embedded", 16, seed) for seed in (3, 3, 4))
    assert first.source == again.source
    assert first.public.sha256() != other.public.sha256()
    assert first.dev.sha256() == other.dev.sha256()
    assert first.test.sha256() == other.test.sha256()
    assert texts(first.train) | texts(first.public) == texts(other.train) | texts(other.public)


@pytest.mark.parametrize("public", ["embedded", "embedded:poor"])
def test_no_text_is_in_two_splits_or_twice_in_one(public):
    splits = embedded.load(public, 32, 1)
    parts = (splits.train, splits.public, splits.dev, splits.test)
    for rows in parts:
        assert len(texts(rows)) == len(rows)
    for a, b in itertools.combinations(parts, 2):
        assert not texts(a) & texts(b)


def test_the_poor_public_set_lacks_two_topics_of_two_classes_and_no_class():
    for seed in range(3):
        splits = embedded.load("embedded:poor", 32, seed)
        missing = set(range(embedded.TOPICS)) - set(splits.public.groups.tolist())
        assert missing == set(embedded.POOR_MISSING)
        assert len({topic // 2 for topic in missing}) == 2
        assert set(splits.train.groups.tolist()) == set(range(embedded.TOPICS))


@pytest.mark.parametrize(("public", "size", "most"), [("embedded", 1024, 1023), ("embedded:poor", 512, 511)])
def test_more_public_rows_than_a_class_has_is_an_error_that_names_the_bound(public, size, most):
    with pytest.raises(DataError, match=rf"data\.public_per_class: found {size}; allowed is 1 to {most}"):
        embedded.load(public, size, 0)


def test_a_batch_is_cut_to_its_longest_row():
    ids = np.array([[5, 6, 0, 0], [7, 0, 0, 0], [1, 2, 3, 4]], dtype=np.int32)
    labels = np.array([0, 1, 2])
    rows = Rows(ids, np.array([2, 1, 4], dtype=np.int32), labels, labels, 0)
    batch = rows.batch(np.array([1, 0]))
    assert batch.ids.tolist() == [[7, 0], [5, 6]]
    assert batch.mask.tolist() == [[True, False], [True, True]]
    assert batch.labels.tolist() == [1, 0]
    assert batch.lengths.tolist() == [1, 2]
    assert {t.dtype for t in (batch.ids, batch.labels, batch.lengths)} == {torch.int64}
    batch.ids.zero_()
    assert rows.ids[0, 0] == 5
    assert rows.take(np.array([1])).sha256() != rows.take(np.array([0])).sha256()


def test_rows_refuse_other_dtypes_and_lengths():
    ids, lengths, labels = np.zeros((3, 4), np.int32), np.ones(3, np.int32), np.zeros(3, np.int64)
    with pytest.raises(DataError, match="ids is int64"):
        Rows(ids.astype(np.int64), lengths, labels, labels, 0)
    with pytest.raises(DataError, match=r"lengths is int32 \[2\]; allowed is int32 \[3\]"):
        Rows(ids, lengths[:2], labels, labels, 0)


def test_the_shipped_weights_have_the_documented_size_and_zero_shot_accuracy():
    assert network.WEIGHTS.stat().st_size <= 1_000_000
    model = network.load_pretrained()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) == 334_848
    splits = embedded.load("embedded", 1, 0)
    assert recipe.accuracy(model, splits.dev) == pytest.approx(ZERO_SHOT_DEV, abs=0.02)
    assert recipe.accuracy(model, splits.test) == pytest.approx(ZERO_SHOT_TEST, abs=0.02)


def test_the_model_is_causal_and_keeps_rows_apart():
    model = network.load_pretrained()
    ids = torch.from_numpy(embedded.load("embedded", 1, 0).dev.ids[:4].astype(np.int64))
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        whole = model(ids, mask)
        changed = ids.clone()
        changed[:, 20:] = embedded.PAD
        changed[3] = embedded.PAD
        cut = model(changed, mask)
    assert whole.shape == (4, 32, embedded.VOCABULARY)
    torch.testing.assert_close(whole[:3, :20], cut[:3, :20])
    assert not torch.allclose(whole[:3, 20:], cut[:3, 20:])


def test_all_weights_sit_in_leaves_that_an_engine_can_replace_and_none_is_shared():
    model = network.load_pretrained()
    leaves = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.LayerNorm, torch.nn.Embedding))]
    held = [parameter for leaf in leaves for parameter in leaf.parameters(recurse=False)]
    assert len(held) == len({parameter.data_ptr() for parameter in held}) == len(list(model.parameters()))


def test_loading_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    network.load_pretrained()
    assert torch.equal(before, torch.get_rng_state())


def test_weights_of_another_shape_are_an_error_that_names_the_first():
    weights = network.load_pretrained().state_dict()
    weights["lm_head.weight"] = weights["lm_head.weight"][:10]
    with pytest.raises(ModelError, match=r"my\.file: weight lm_head\.weight has shape \(10, 64\)"):
        network.with_weights(weights, "my.file")


def test_three_steps_of_the_recipe_lower_the_loss_and_give_the_shipped_names_and_shapes():
    model = network.with_weights(recipe.initial_weights(), "recipe")
    losses = list(recipe.pretrain(model, 3))
    assert all(np.isfinite(losses))
    assert losses[0] > losses[1] > losses[2]
    shipped = network.load_pretrained().state_dict()
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in shipped.items()}
    again = list(recipe.pretrain(network.with_weights(recipe.initial_weights(), "recipe"), 3))
    assert again == losses
