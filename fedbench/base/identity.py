"""What makes two runs the same run: the name that a resolved config gives itself.

A name depends on the config alone, never on time, host or order of keys.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from fedbench.base.job import OUTSIDE_HASH

_DIGITS = 12


def canonical_json(tree: Mapping[str, Any]) -> str:
    """Return a tree as compact JSON with sorted keys; NaN or infinity raise ValueError."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def hashed_view(tree: Mapping[str, Any], outside: Collection[str]) -> dict[str, Any]:
    """Return `tree` without the dotted keys in `outside`; a table that this empties goes too."""
    return _view(tree, frozenset(outside), "")


def config_sha256(tree: Mapping[str, Any], outside: Collection[str] = OUTSIDE_HASH) -> str:
    """Return the hex SHA-256 of a resolved config without the keys in `outside`."""
    return hashlib.sha256(canonical_json(hashed_view(tree, outside)).encode()).hexdigest()


def run_id(config: Mapping[str, Any]) -> str:
    """Return `METHOD-` and 12 hex digits for a resolved config tree, where `method` has `name` and `settings`."""
    return f"{config['method']['name']}-{config_sha256(config)[:_DIGITS]}"


def _view(tree: Mapping[str, Any], outside: frozenset[str], prefix: str) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in tree.items():
        dotted = prefix + name
        if dotted in outside:
            continue
        if any(key.startswith(f"{dotted}.") for key in outside) and isinstance(value, Mapping):
            child = _view(value, outside, f"{dotted}.")
            if child or not value:
                kept[name] = child
        else:
            kept[name] = value
    return kept
