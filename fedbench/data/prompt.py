"""Prompts and label words: a text inside a template, and the one token a class that a verbaliser reads.

A text that is too long gives way; the template never does. Nothing here knows a model beyond its tokeniser.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedbench.base.errors import ConfigError
from fedbench.data.tokenise import Tokeniser

#: The prompt where `data.template` is unset: for single texts and for pairs.
TEMPLATE = "{text} It was {mask}."
PAIR_TEMPLATE = "{text} {text2} It was {mask}."

#: Where a verbaliser reads: at the mask token, or after the last token.
Reading = Literal["mask", "last"]

_FIELD = re.compile(r"\{([^{}]*)\}")
_FIELDS = ("text", "text2", "mask")
_NO_LIMIT = 1 << 20


@dataclass(frozen=True)
class Prompt:
    """A template checked against its use: for `last` it ends where the label word would follow."""

    template: str
    reading: Reading
    tokeniser: Tokeniser

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return `ids` int32 [n, longest row] and `lengths` int32 [n] of prompts of at most `max_length` tokens.

        A prompt that is too long loses characters at the end of its text, of a pair at that of the longer one. A
        `max_length` without room for the template and some text is a ConfigError.
        """
        columns = self._cleaned(texts, pairs)
        fails = np.array([max(map(len, row)) for row in zip(*columns, strict=True)])
        rows = self._rows(columns, range(len(fails)), fails)
        long = [i for i, row in enumerate(rows) if len(row) > max_length]
        fits = np.zeros(len(rows), np.int64)
        # The most characters of which a prompt fits, by halving: `fails` are known to be too many.
        while open_ := [i for i in long if fails[i] - fits[i] > 1]:
            keep = (fits + fails) // 2
            for index, row in zip(open_, self._rows(columns, open_, keep), strict=True):
                (fits if len(row) <= max_length else fails)[index] = keep[index]
        if long and fits[long].min() < 1:
            raise ConfigError(
                f"data.max_length: found {max_length}; the template {self.template!r} and the special tokens of "
                f"{self.tokeniser.source} leave no room for text."
            )
        for index, row in zip(long, self._rows(columns, long, fits), strict=True):
            rows[index] = row
        return self.tokeniser.padded(rows, texts)

    def label_words(self, words: Sequence[str]) -> tuple[int, ...]:
        """Return the token id of each label word as it stands in the template.

        A word that is not one token, is unknown, or is the token of another class is a ConfigError.
        """
        before = _FIELD.sub("", self.template.partition("{mask}")[0]).lstrip()
        if self.reading == "last":
            before = f"{before or 'text'} " if not before[-1:].isspace() else before
        found: dict[int, str] = {}
        for word in words:
            ids = self._word_ids(before, word)
            if len(ids) != 1 or ids[0] == self.tokeniser.unknown:
                said = "is not in the vocabulary" if len(ids) == 1 else f"is {len(ids)} tokens ({self._pieces(ids)})"
                raise ConfigError(
                    f"data.label_words: {word!r} {said} of {self.tokeniser.source}; allowed are words that are one "
                    "token each. Set data.label_words to one such word a class."
                )
            if ids[0] in found:
                raise ConfigError(f"data.label_words: {word!r} and {found[ids[0]]!r} are the same token {ids[0]}.")
            found[ids[0]] = word
        return tuple(found)

    def _word_ids(self, before: str, word: str) -> list[int]:
        """Return the tokens that a word adds behind the template's own text."""
        start = self.tokeniser.plain(before.rstrip())
        whole = self.tokeniser.plain(before + word)
        return whole[len(start) :] if whole[: len(start)] == start else self.tokeniser.plain(word)

    def _pieces(self, ids: Sequence[int]) -> str:
        return ", ".join(repr(self.tokeniser.token(i)) for i in ids)

    def _cleaned(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[list[str]]:
        """Return the texts without any mask token of their own."""
        mask = self.tokeniser.mask_token
        columns = [list(column) for column in (texts, pairs) if column is not None]
        return [[text.replace(mask, " ") if mask else text for text in column] for column in columns]

    def _rows(self, columns: Sequence[Sequence[str]], index: Sequence[int], keep: np.ndarray) -> list[list[int]]:
        """Return the token ids of the prompts at `index`, each text cut to its entry of `keep`."""
        prompts = []
        for i in index:
            parts = _FIELD.split(self.template)  # text and fields in turn
            for place in range(1, len(parts), 2):
                field = parts[place]
                whole = self.tokeniser.mask_token if field == "mask" else columns[_FIELDS.index(field)][i][: keep[i]]
                parts[place] = whole or ""
            prompts.append("".join(parts))
        return self.tokeniser.rows(prompts, None, _NO_LIMIT) if prompts else []


def prompt_of(template: str | None, reading: Reading, tokeniser: Tokeniser, *, paired: bool) -> Prompt:
    """Return the prompt of `data.template`; a template that does not fit data or model is a ConfigError."""
    text = template or (PAIR_TEMPLATE if paired else TEMPLATE)
    fields = _FIELD.findall(text)
    unknown = [field for field in fields if field not in _FIELDS]
    wanted = ("text", "text2") if paired else ("text",)
    problem = ""
    if unknown:
        problem = f"has the field {{{unknown[0]}}}"
    elif any(fields.count(name) != 1 for name in wanted):
        problem = f"must have {' and '.join(f'{{{name}}}' for name in wanted)} once each"
    elif not paired and "text2" in fields:
        problem = "has {text2}, but the data set has no second texts"
    elif fields.count("mask") > 1 or (reading == "mask" and "mask" not in fields):
        problem = "must have {mask} once: the model is read at its mask token"
    elif reading == "last" and "mask" in fields and fields[-1] != "mask":
        problem = "has {mask} before a text, but a causal model is read at the end"
    if problem:
        raise ConfigError(f"data.template: {text!r} {problem}; allowed fields: {{text}}, {{text2}}, {{mask}}.")
    if reading == "mask" and (tokeniser.mask is None or not tokeniser.mask_token):
        raise ConfigError(f"data.head = 'verbaliser': the tokeniser of {tokeniser.source} has no mask token.")
    if reading == "last":
        text = text.partition("{mask}")[0].rstrip() if "mask" in fields else text
    return Prompt(text, reading, tokeniser)
