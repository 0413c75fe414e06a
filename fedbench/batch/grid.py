"""What a sweep varies, as text: `--grid key=v1,v2`, factors such as `x0.46`, and files of arms.

Only text is read here; nothing is looked up in a job, and no run is named.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbench.base import config
from fedbench.base.errors import ConfigError, nearest

_FACTOR = re.compile(r"x(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+)")
_OPENING, _CLOSING = "[{", "]}"


@dataclass(frozen=True)
class Factor:
    """A multiple of the value that the job has."""

    by: float

    def __str__(self) -> str:
        return f"x{self.by:g}"


#: Dotted key -> a value, or a Factor.
Arm = Mapping[str, Any]


def parse_grid(text: str) -> list[dict[str, Any]]:
    """Return one arm per value of a `--grid key=v1,v2`; ConfigError where it is none."""
    key, separator, rest = text.partition("=")
    key = key.strip()
    words = [word.strip() for word in _split(rest)]
    if not separator or not all(key.split(".")) or not all(words):
        raise ConfigError(f"--grid {text}: expected key=v1,v2,... with a dotted key, such as run.rounds=10,20.")
    return [{key: _value(key, word)} for word in words]


def product(*factors: Sequence[Arm]) -> list[dict[str, Any]]:
    """Return all combinations of arms, the last varying fastest; ConfigError where two set the same key."""
    arms = []
    for parts in itertools.product(*factors):
        arm: dict[str, Any] = {}
        for part in parts:
            twice = next((key for key in part if key in arm), None)
            if twice is not None:
                raise ConfigError(f"{twice}: varied twice; allowed: each key in one --grid, or in the arms.")
            arm.update(part)
        arms.append(arm)
    return arms


def read_arms(path: Path) -> list[dict[str, Any]]:
    """Return the `[[arm]]` tables of a TOML file as dotted keys and values."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--grid-file {path}: no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--grid-file {path}: can't be read: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--grid-file {path}: not valid TOML: {error}.") from None
    for key in tree:
        if key != "arm":
            raise ConfigError(f"--grid-file {path}: unknown key {key}. Allowed: [[arm]].{nearest(key, ['arm'])}")
    arms = tree.get("arm")
    if not isinstance(arms, list) or not arms or not all(isinstance(arm, dict) for arm in arms):
        raise ConfigError(f"--grid-file {path}: expected [[arm]] tables, found {'none' if arms is None else arms!r}.")
    return [{key: _factor_or(value) for key, value in config.flatten(arm).items()} for arm in arms]


def told(arm: Arm) -> str:
    """Return an arm in the form of the command line."""
    return ", ".join(f"{key}={value}" for key, value in arm.items())


def _value(key: str, word: str) -> Any:
    """Return a Factor, a TOML value, or the word itself; a quoted `"x2"` stays a string."""
    return found if isinstance(found := _factor_or(word), Factor) else config.parse_setting(f"{key}={word}").value


def _factor_or(value: Any) -> Any:
    """Return a Factor for text of its form; files of arms have it as a string, since TOML knows no factors."""
    match = _FACTOR.fullmatch(value) if isinstance(value, str) else None
    return Factor(float(match[1])) if match else value


def _split(text: str) -> Iterator[str]:
    """Yield what stands between commas; those within brackets or quotes don't split."""
    depth, quote, start = 0, "", 0
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in _OPENING:
            depth += 1
        elif letter in _CLOSING:
            depth -= 1
        elif letter == "," and depth == 0:
            yield text[start:place]
            start = place + 1
    yield text[start:]
