"""The job file as frozen models: defaults < TOML < `--set`.

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
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedbench.base.errors import ConfigError, nearest

_Model = TypeVar("_Model", bound=BaseModel)


class Section(BaseModel):
    """Base of all tables: frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RunSection(Section):
    """[run]"""

    rounds: int = Field(100, ge=1, description="rounds to play")
    seed: int = Field(0, ge=0, lt=2**31, description="the seed of every random stream")
    eval_every: int = Field(1, ge=1, description="rounds between evaluations; the start and the last round always are")
    target_accuracy: float | None = Field(None, ge=0, le=1, description="dev accuracy whose first round is recorded")
    stop_at_target: bool = Field(False, description="end the run at the target instead of going on")
    threads: int = Field(1, ge=1, le=256, description="threads per rank")
    ranks: int = Field(1, ge=1, description="processes; -n or the launcher's world size replaces it")


class FederationSection(Section):
    """[federation]"""

    devices: int = Field(8, ge=1, description="devices in total")
    sampled: int | None = Field(None, ge=1, description="devices that take part in a round; unset: all")
    partition: Literal["iid", "dirichlet", "shards"] = Field("iid", description="how private rows are shared out")
    alpha: float = Field(0.5, gt=0, description="concentration of the Dirichlet partition; small is uneven")
    local_steps: int = Field(1, ge=1, description="steps of a device in one round")
    batch_size: int = Field(16, ge=2, description="private rows of one step")

    @model_validator(mode="after")
    def _sampled_fits(self) -> FederationSection:
        if self.sampled is not None and self.sampled > self.devices:
            raise ValueError(f"sampled = {self.sampled} is more than devices = {self.devices}")
        return self

    @property
    def sampled_devices(self) -> int:
        """Devices that take part in one round."""
        return self.devices if self.sampled is None else self.sampled


class ModelSection(Section):
    """[model]"""

    name: str = Field(
        "embedded", description="embedded, a folder, a hub id, package:NAME/SUBFOLDER, or shape:NAME (seeded weights)"
    )
    trainable: Literal["full", "bitfit", "lora", "adapter", "head"] | None = Field(
        None, description="the part that is trained; unset: the method's own default"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="how frozen matrices are stored; what is trained, and all arithmetic, is float32"
    )
    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="where weights lie and everything is computed; cuda: the ranks of a host share its GPUs"
    )
    mapped: bool = Field(False, description="keep weights in a file and the stage at hand alone in memory; same bits")
    micro_batch: int = Field(0, ge=0, description="rows that a probe runs through a stage at a time; 0: all")

    lora_rank: int = Field(8, ge=1, description="rank of LoRA's matrices")
    lora_alpha: int = Field(16, ge=1, description="LoRA's scale times its rank")
    adapter_reduction: int = Field(16, ge=1, description="width of the states over that of an adapter's bottleneck")

    @model_validator(mode="after")
    def _fits(self) -> ModelSection:
        if self.micro_batch == 1:
            raise ValueError("micro_batch = 1 would run single rows, which have other bits; allowed: 0, or from 2")
        if self.mapped and self.dtype != "float32":
            raise ValueError("mapped = true keeps float32 files; allowed with it: dtype = 'float32'")
        if self.mapped and self.device != "cpu":
            raise ValueError("mapped = true maps memory of the host; allowed with it: device = 'cpu'")
        return self


class DataSection(Section):
    """[data]"""

    private: str = Field(
        "embedded", description="devices' data: embedded, a folder, a name under FEDBENCH_DATA, a hub id"
    )
    public: str = Field(
        "embedded", description="the cloud's data: as private, or embedded:poor; equal to private: cut off it"
    )
    text_columns: Annotated[tuple[str, ...], Field(strict=False, min_length=1, max_length=2)] = Field(
        ("text", "text2"), description="column of the text, and of the second text of a pair where there is one"
    )
    label_column: str = Field("label", description="column of the integer label")
    head: Literal["verbaliser", "prototype", "linear", "lm"] | None = Field(
        None, description="what is read off; unset: verbaliser (causal models) or prototype; lm: next tokens"
    )
    template: str | None = Field(
        None, description="a verbaliser's prompt; unset: {text} It was {mask}. (causal models: up to {mask})"
    )
    label_words: Annotated[tuple[str, ...] | None, Field(strict=False, min_length=2)] = Field(
        None, description="a verbaliser's words, one token a class; unset: the classes' names in lower case"
    )
    max_length: int = Field(64, ge=4, description="tokens of a row at most")
    public_per_class: int = Field(32, ge=1, description="public rows a class")
    public_labels: Literal["given", "shuffled"] = Field(
        "given", description="shuffled: the control without label information"
    )


class ZoSection(Section):
    """[zo]"""

    epsilon: float = Field(1e-3, gt=0, description="probing step per coordinate (root mean square)")
    perturbations: int = Field(1, ge=1, description="directions of one local step")
    distribution: Literal["rademacher", "gaussian"] = Field("rademacher", description="distribution of directions")


class CommSection(Section):
    """[comm]"""

    codec: Literal["raw"] = Field("raw", description="how units are coded: raw is float32 as it is")
    lz4: bool = Field(False, description="LZ4 frames around units that shrink by it")
    deadline_s: float = Field(300.0, gt=0, description="longest wait for a message before all ranks end")


class ResultsSection(Section):
    """[results]"""

    dir: str = Field("results", description="folder of run files and checkpoints")
    checkpoint_every: int = Field(0, ge=0, description="rounds between checkpoints; 0: at a stop alone")


class Config(Section):
    """A whole job: one run."""

    run: RunSection = RunSection()
    federation: FederationSection = FederationSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    zo: ZoSection = ZoSection()
    method: dict[str, Any]
    comm: CommSection = CommSection()
    results: ResultsSection = ResultsSection()

    @property
    def method_name(self) -> str:
        """The active method."""
        return str(self.method["name"])


#: Keys that can't change a result; everything else is part of `run_id`.
OUTSIDE_HASH = frozenset({"results.dir", "results.checkpoint_every", "comm.deadline_s"})

#: Keys that change times and files but never the numbers of a run.
OUTSIDE_TRAJECTORY = OUTSIDE_HASH | {"run.ranks", "model.mapped"}


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
