"""Templates and label words: one token a class, a text that gives way, a template that never does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from textsets import make_set, prompt_tokeniser

from fedbench.base.errors import ConfigError
from fedbench.base.job import DataSection
from fedbench.data.hashed import hashed_words
from fedbench.data.prompt import Reading, prompt_of
from fedbench.data.splits import load_splits
from fedbench.data.tokenise import Tokeniser, load_tokeniser

TEXTS = ["a good film", "the plot was bad " * 9, "bad"]


@pytest.fixture(params=["bpe", "words"])
def tokeniser(request: pytest.FixtureRequest, tmp_path: Path) -> Tokeniser:
    return load_tokeniser(str(prompt_tokeniser(tmp_path / "model", request.param)))


def text_of(tokeniser: Tokeniser, ids: Sequence[int]) -> str:
    """Return ids as text, without the special tokens at the ends."""
    words = [tokeniser.token(int(i)) for i in ids]
    joined = "".join(words) if any("Ġ" in word for word in words) else " ".join(words)
    return joined.replace("Ġ", " ").removeprefix("<s>").removeprefix("[CLS] ").removesuffix("[SEP]").strip()


@pytest.mark.parametrize("reading", ["mask", "last"])
def test_the_text_gives_way_and_the_template_stays(tokeniser: Tokeniser, reading: Reading) -> None:
    prompt = prompt_of("{text} It was {mask}.", reading, tokeniser, paired=False)
    whole, whole_lengths = prompt.encode(TEXTS, None, 200)
    ids, lengths = prompt.encode(TEXTS, None, 16)
    assert lengths[0] == whole_lengths[0] < 16 < whole_lengths[1]
    assert np.array_equal(ids[0, : lengths[0]], whole[0, : lengths[0]])
    assert lengths[1] in (15, 16)
    assert (ids.dtype, lengths.dtype) == (np.int32, np.int32)
    for row, length in zip(ids, lengths, strict=True):
        text = text_of(tokeniser, row[:length]).lower()
        if reading == "mask":
            assert list(row[:length]).count(tokeniser.mask) == 1
            before, _, after = text.partition(str(tokeniser.mask_token).lower())
            assert before.strip().endswith("it was")
            assert after.strip().startswith(".")
        else:
            assert text.endswith("it was")


def test_of_a_pair_the_longer_text_is_cut(tokeniser: Tokeniser) -> None:
    prompt = prompt_of(None, "last", tokeniser, paired=True)
    ids, lengths = prompt.encode(["bad bad bad bad bad bad bad bad bad bad"], ["good"], 12)
    text = text_of(tokeniser, ids[0, : lengths[0]]).lower()
    assert "good it was" in text
    assert 1 <= text.count("bad") < 10


def test_a_length_without_room_for_the_template_is_refused(tokeniser: Tokeniser) -> None:
    prompt = prompt_of(None, "mask", tokeniser, paired=False)
    with pytest.raises(ConfigError, match=r"data\.max_length: found 4; the template .* leave no room for text"):
        prompt.encode(TEXTS, None, 4)


def test_a_mask_token_in_a_text_is_no_place_to_read(tokeniser: Tokeniser) -> None:
    prompt = prompt_of("{mask} {text}", "mask", tokeniser, paired=False)
    ids, _ = prompt.encode([f"good {tokeniser.mask_token} film"], None, 30)
    assert ids[0].tolist().count(tokeniser.mask) == 1


@pytest.mark.parametrize(
    ("template", "reading", "paired", "said"),
    [
        ("It was {mask}.", "mask", False, r"must have \{text\} once each"),
        ("{text} {text}", "last", False, r"must have \{text\} once each"),
        ("{text} It was {mask}.", "mask", True, r"must have \{text\} and \{text2\} once each"),
        ("{text} {text2} {mask}", "mask", False, r"has \{text2\}, but the data set has no second texts"),
        ("{text} It was", "mask", False, r"must have \{mask\} once"),
        ("{mask} {text} {mask}", "mask", False, r"must have \{mask\} once"),
        ("{mask}: {text}", "last", False, r"has \{mask\} before a text"),
        ("{text} is {label}", "last", False, r"has the field \{label\}"),
    ],
)
def test_templates_that_fit_nothing_are_errors(
    template: str, reading: Reading, paired: bool, said: str, tokeniser: Tokeniser
) -> None:
    with pytest.raises(ConfigError, match=said):
        prompt_of(template, reading, tokeniser, paired=paired)


@pytest.mark.parametrize("template", [None, "{text} It was", "{text}", "Well: {text} All in all it was {mask}!"])
def test_label_words_are_what_a_causal_model_would_go_on_with(template: str | None, tokeniser: Tokeniser) -> None:
    prompt = prompt_of(template, "last", tokeniser, paired=False)
    words = prompt.label_words(["good", "bad"])
    for word, number in zip(["good", "bad"], words, strict=True):
        ends = tokeniser.plain(f"It was {word}")
        assert ends[-1] == number
        assert tokeniser.token(number) in (word, f"Ġ{word}")


def test_label_words_at_the_mask_stand_as_the_template_has_them(tmp_path: Path) -> None:
    bpe = load_tokeniser(str(prompt_tokeniser(tmp_path / "bpe", "bpe")))
    spaced = prompt_of("{text} It was {mask}.", "mask", bpe, paired=False).label_words(["good"])
    first = prompt_of("{mask}: {text}", "mask", bpe, paired=False).label_words(["good"])
    assert [bpe.token(n) for n in (*spaced, *first)] == ["Ġgood", "good"]


def test_words_that_are_no_single_token_say_what_they_are(tmp_path: Path) -> None:
    bpe = prompt_of(None, "last", load_tokeniser(str(prompt_tokeniser(tmp_path / "bpe", "bpe"))), paired=False)
    with pytest.raises(ConfigError, match=r"data\.label_words: 'qzx' is \d tokens \('Ġ', 'q', .*data\.label_words to"):
        bpe.label_words(["good", "qzx"])
    words = prompt_of(None, "mask", load_tokeniser(str(prompt_tokeniser(tmp_path / "w", "words"))), paired=False)
    with pytest.raises(ConfigError, match=r"data\.label_words: 'qzx' is not in the vocabulary"):
        words.label_words(["good", "qzx"])
    with pytest.raises(ConfigError, match=r"'GOOD' and 'good' are the same token"):
        words.label_words(["good", "GOOD"])


def test_a_tokeniser_without_a_mask_token_has_no_masked_verbaliser(tmp_path: Path) -> None:
    folder = prompt_tokeniser(tmp_path / "model", "words")
    tree = json.loads((folder / "tokenizer.json").read_text())
    del tree["model"]["vocab"]["[MASK]"]
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] != "[MASK]"]
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="has no mask token"):
        prompt_of(None, "mask", load_tokeniser(str(folder)), paired=False)


def test_splits_carry_the_words_and_the_template(tmp_path: Path) -> None:
    folder, data = prompt_tokeniser(tmp_path / "model", "words"), str(make_set(tmp_path / "set"))
    section = DataSection(private=data, public=data, public_per_class=5, max_length=16)
    splits = load_splits(section, 0, str(folder), lambda: "mask")
    tokeniser = load_tokeniser(str(folder))
    assert [tokeniser.token(i) for i in splits.label_words or ()] == ["bad", "good"]  # the classes' names
    assert splits.mask_word == tokeniser.mask
    assert splits.source["template"] == "{text} It was {mask}."
    assert ((splits.train.ids == tokeniser.mask).sum(1) == 1).all()
    own = section.model_copy(update={"label_words": ("film", "plot")})
    assert load_splits(own, 0, str(folder), lambda: "mask").label_words != splits.label_words
    plain = load_splits(section, 0, str(folder))
    assert (plain.label_words, plain.mask_word) == (None, None)
    three = section.model_copy(update={"label_words": ("film", "plot", "bad")})
    with pytest.raises(ConfigError, match=r"data\.label_words: found 3 \(film, plot, bad\); .* has 2 classes \(bad, "):
        load_splits(three, 0, str(folder), lambda: "mask")


def test_hashed_words_are_ids_of_the_vocabulary_and_say_what_they_are() -> None:
    tokeniser = hashed_words(300, "shape:x")
    ids, lengths = tokeniser.encode(["A good film", "a good"], ["again", "x"], 3)
    assert lengths.tolist() == [3, 3]
    assert ids[0, 0] == ids[1, 0]  # case is no difference
    assert 4 <= ids.min() <= ids.max() < 300
    assert tokeniser.sha256 == "none: hashed words"
    prompt = prompt_of(None, "mask", tokeniser, paired=False)
    ids, _ = prompt.encode(TEXTS, None, 9)
    assert ((ids == tokeniser.mask).sum(1) == 1).all()
    assert len(set(prompt.label_words(["bad", "good"]))) == 2
