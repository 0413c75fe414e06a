"""From a job file to its frozen models (`job.py`): defaults < TOML < `--set`.

An unknown key, a wrong type or a value that is not allowed is one ConfigError with
the key's path, what was found, what is allowed, the nearest name and where it came
from. The tables of `[method.<name>]` stay raw here; `run/build.py` checks them with
the method's own `Settings`.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from fedbench.base.errors import ConfigError, nearest
from fedbench.base.job import Config

_Model = TypeVar("_Model", bound=BaseModel)


class Setting(NamedTuple):
    """One `--set KEY=VALUE`, the value read as TOML, or as a string where it is not TOML."""

    path: tuple[str, ...]
    value: Any


def parse_setting(text: str) -> Setting:
    """Return the key's path and the value of one `--set` argument."""
    name, separator, raw = text.partition("=")
    path = tuple(name.strip().split("."))
    if not separator or not all(path):
        raise ConfigError(f"--set {text}: expected key=value with a dotted key, such as --set run.rounds=20.")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    return Setting(path, value)


def load(path: Path, settings: Sequence[Setting] = ()) -> Config:
    """Return the checked job of a file with `--set` values laid over it."""
    tree = read(path)
    for setting in settings:
        put(tree, setting)
    return check(tree, source=str(path), overridden=frozenset(s.path for s in settings))


def read(path: Path) -> dict[str, Any]:
    """Return the raw tree of a job file: TOML, or JSON where its name ends in .json, as sweeps write it."""
    form, loads = ("JSON", json.loads) if path.suffix == ".json" else ("TOML", tomllib.loads)
    try:
        tree = loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such job file.") from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not valid {form}: {error}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}.") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: found {tree!r}; expected a job's tables.")
    return tree


def check(tree: Mapping[str, Any], *, source: str, overridden: frozenset[tuple[str, ...]] = frozenset()) -> Config:
    """Return the config of a raw tree, or raise ConfigError that names `source` or `--set`."""
    method = tree.get("method")
    name = method.get("name") if isinstance(method, dict) else method
    if not isinstance(method, dict) or not isinstance(name, str):
        found = (
            "missing" if name is None else f"found {name!r}" if isinstance(method, dict) else f"found method = {name!r}"
        )
        said = origin(("method", "name"), source, overridden)
        raise ConfigError(f'method.name: {found}; a job names its method, such as name = "cooperllm". (From {said})')
    return validate(Config, tree, prefix=(), source=source, overridden=overridden)


def validate(
    model: type[_Model],
    tree: Mapping[str, Any],
    *,
    prefix: tuple[str, ...],
    source: str,
    overridden: frozenset[tuple[str, ...]] = frozenset(),
) -> _Model:
    """Return `model` filled from `tree`; the first fault becomes a ConfigError in one sentence."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        unknown = first["type"] == "extra_forbidden"
        location = tuple(str(part) for part in first["loc"] if unknown or not _is_type_tag(part))
        path = (*prefix, *location)
        said = origin(path, source, overridden)
        raise ConfigError(f"{_sentence(model, first, path, location)} (From {said})") from None


def origin(path: tuple[str, ...], source: str, overridden: frozenset[tuple[str, ...]]) -> str:
    """Return where a key came from: `--set` where that reached it, else `source`."""
    return "--set" if any(path[: len(o)] == o or o[: len(path)] == path for o in overridden) else source


def as_tree(config: BaseModel) -> dict[str, Any]:
    """Return a model as a tree that JSON can hold."""
    return config.model_dump(mode="json")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a tree as dotted keys and leaf values."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def put(tree: dict[str, Any], setting: Setting, source: str = "--set") -> None:
    """Lay one value over a raw tree, in place; ConfigError where its path leads through a value."""
    node = tree
    for part in setting.path[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{'.'.join(setting.path)}: {part} is a value, not a table. (From {source})")
        node = child
    node[setting.path[-1]] = setting.value


def _is_type_tag(part: Any) -> bool:
    return isinstance(part, int) or (isinstance(part, str) and part in {"float", "int", "str", "none", "literal"})


def _sentence(model: type[BaseModel], fault: Any, path: tuple[str, ...], location: tuple[str, ...]) -> str:
    dotted = ".".join(path)
    if fault["type"] == "extra_forbidden":
        siblings = _fields_of(model, location[:-1])
        parent = ".".join(path[:-1])
        names = {f"{parent}.{name}" if parent else name: default for name, default in siblings.items()}
        shown = ", ".join(f"{name} = {default}" if default is not None else name for name, default in names.items())
        return f"{dotted}: unknown key. Allowed: {shown}.{nearest(dotted, names)}"
    found = fault.get("input")
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "literal_error" and isinstance(found, str):
        options = [o.strip("'") for o in message.removeprefix("Input should be ").replace(" or ", ", ").split(", ")]
        message += "." + nearest(found, options)
    if fault["type"] == "missing":
        return f"{dotted}: missing."
    if fault["type"] == "model_type":
        return f"{dotted}: found {found!r}; expected a table."
    if fault["type"] == "value_error":
        return f"{dotted}: {message}."
    return f"{dotted}: found {found!r}; {message[0].lower()}{message[1:]}".rstrip(".") + "."


def _fields_of(model: type[BaseModel], location: tuple[str, ...]) -> dict[str, Any]:
    """Return name -> default (as text) of the table at `location`."""
    for part in location:
        field = model.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return {}
        model = field.annotation
    shown: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        literal = _literal_options(field.annotation)
        nested = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        default = None if nested or field.is_required() else repr(field.default)
        shown[name] = f"{default} ({' | '.join(literal)})" if literal else default
    return shown


def _literal_options(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(o) for o in get_args(annotation)]
    return [option for argument in get_args(annotation) for option in _literal_options(argument)]
