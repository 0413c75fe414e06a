"""A tokeniser for models without one: white space cuts a text into words, and a word's key is its id.

It is for speed and memory on real texts alone: two words may share an id, and no id means what a model has learned.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedbench.base.rng import tensor_key
from fedbench.data.tokenise import Tokeniser

#: Ids below this one are special: 0 pads, 1 is the mask token.
_SPECIAL = 4
_PAD, _MASK = 0, 1
_MASK_TOKEN = "[MASK]"


def hashed_words(vocabulary: int, source: str) -> Tokeniser:
    """Return the tokeniser of a vocabulary of that size; `source` says which model it stands in for."""

    def plain(text: str) -> list[int]:
        return [
            _MASK if _MASK_TOKEN in word else _SPECIAL + tensor_key(word.lower()) % (vocabulary - _SPECIAL)
            for word in text.split()
        ]

    def rows(texts: Sequence[str], pairs: Sequence[str] | None, max_length: int) -> list[list[int]]:
        joined = texts if pairs is None else [f"{text} {pair}" for text, pair in zip(texts, pairs, strict=True)]
        return [plain(text)[:max_length] for text in joined]

    return Tokeniser(
        _PAD, vocabulary, "none: hashed words", source, rows, plain, str, mask=_MASK, mask_token=_MASK_TOKEN
    )
