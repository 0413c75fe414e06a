"""A tuned cut as a model folder: transformers' layout, peft's for LoRA, and one of its own for the embedded model.

Values are never changed, but that LoRA is merged into the embedded model's matrices. What has no place in a layout goes
into a file of its own (a linear head on plain features), or is refused (bottleneck adapters).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from fedbench.base.errors import ConfigError
from fedbench.base.job import ModelSection
from fedbench.data.rows import Splits
from fedbench.models import load, parts
from fedbench.models.cut import Cut
from fedbench.models.embedded import network
from fedbench.models.families import HeadKind
from fedbench.models.origin import CONFIG_FILE, EMBEDDED_TYPE, WEIGHTS_FILE, Origin
from fedbench.models.start import HEAD_FILE

_PEFT_FILE = "adapter_model.safetensors"
_BASE_LAYER = ".base_layer"

#: Files of a tokeniser that are copied as they are.
_TOKENISER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt"),
    *("vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja"),
)


class Tuned(NamedTuple):
    """A cut with its tuned weights, what it was made from, and the part that was trained."""

    cut: Cut
    origin: Origin
    head: HeadKind
    part: str
    section: ModelSection
    splits: Splits


def write(folder: Path, tuned: Tuned) -> None:
    """Fill an empty folder."""
    if tuned.part == "adapter":
        raise ConfigError(
            "model.trainable = 'adapter': bottleneck adapters have no place in a folder of transformers or peft; allowed "
            "for an export: full, bitfit, lora, head."
        )
    if tuned.origin.kind == "embedded":
        _write_embedded(folder, tuned)
        return
    model, cut = load.empty(tuned.origin, tuned.head, tuned.splits)
    parts.add(cut, tuned.part, tuned.section, 0)
    _copy(tuned.cut, cut)
    if tuned.head == "linear":
        model.config.id2label = dict(enumerate(tuned.splits.label_names))
        model.config.label2id = {name: number for number, name in enumerate(tuned.splits.label_names)}
    if tuned.part == "lora":
        _write_lora(folder, tuned, model, cut)
    else:
        model.save_pretrained(folder)
    if tuned.head == "prototype":
        head: Any = cut.head
        save_file({name: t.detach().clone() for name, t in head.linear.named_parameters()}, folder / HEAD_FILE)
    _write_tokeniser(folder, tuned.origin)


def _copy(tuned: Cut, other: Cut) -> None:
    """Give another cut of the same making the tuned one's weights, as float32."""
    values = dict(tuned.named_parameters())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(values[name])


def _write_lora(folder: Path, tuned: Tuned, model: Any, cut: Cut) -> None:
    """Write the LoRA matrices, and a sequence classifier's own layers, as peft does."""
    kept: dict[str, torch.Tensor] = {}
    whole: set[str] = set()
    own = {id(p) for name, p in cut.named_parameters() if name.startswith("head.")}
    for name, parameter in model.named_parameters():
        if "lora_" in name or id(parameter) in own:
            kept[f"base_model.model.{name.replace('.default', '')}"] = parameter.detach().contiguous()
        if id(parameter) in own:
            whole.add(name.rpartition(".")[0])
    task = {"linear": "SEQ_CLS", "verbaliser": "CAUSAL_LM" if tuned.origin.causal else None, "lm": "CAUSAL_LM"}
    section = tuned.section
    config = parts.lora_config(
        cut,
        section.lora_rank,
        section.lora_alpha,
        base_model_name_or_path=tuned.origin.source,
        task_type=task.get(tuned.head),
        modules_to_save=sorted(whole) or None,
        inference_mode=True,
    )
    config.save_pretrained(folder)
    save_file(kept, folder / _PEFT_FILE, metadata={"format": "pt"})


def _write_embedded(folder: Path, tuned: Tuned) -> None:
    """Write the embedded model: its shape and the task's words as JSON, weights in float32."""
    backbone: Any = tuned.cut.backbone
    for module in backbone.modules():
        if hasattr(module, "merge") and hasattr(module, "base_layer"):
            module.merge()
    weights = {n.replace(_BASE_LAYER, ""): t for n, t in backbone.state_dict().items() if "lora_" not in n}
    save_file({name: t.detach().contiguous() for name, t in weights.items()}, folder / WEIGHTS_FILE)
    shape = {"vocab_size": network.VOCABULARY, "max_position_embeddings": network.POSITIONS}
    shape |= {"hidden_size": network.WIDTH, "num_hidden_layers": network.LAYERS}
    shape |= {"num_attention_heads": network.HEADS, "intermediate_size": network.FFN}
    config = {"model_type": EMBEDDED_TYPE, "dtype": "float32", **shape}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_tokeniser(folder: Path, origin: Origin) -> None:
    """Copy a folder's tokeniser as it is, or save the one of a hub id; a shape has none."""
    if origin.kind == "shape":
        return
    if origin.folder is None:
        import transformers

        transformers.AutoTokenizer.from_pretrained(**origin.where).save_pretrained(folder)
        return
    for name in _TOKENISER:
        if (origin.folder / name).is_file():
            shutil.copyfile(origin.folder / name, folder / name)
