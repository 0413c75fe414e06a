"""The architectures of transformers that have a cut, and how each one is read: one table by `model_type`.

A model comes whole from the Auto class that a head needs, so that its weights keep the names that transformers
gives them. Nothing is loaded here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from fedbench.base.errors import ModelError, nearest
from fedbench.models.cut import Cut, Head
from fedbench.models.decoders import DecoderCut, Gpt2Cut, OptCut, RotaryCut
from fedbench.models.encoders import BertCut, DistilBertCut, RobertaCut
from fedbench.models.heads import Classifier, LabelWords, MaskWords, MeanPooled, NextToken

HeadKind = Literal["verbaliser", "prototype", "linear", "lm"]

#: What comes before the label words' rows of a masked language model: (transform, output layer).
_Masked = Callable[[Any], tuple[nn.Module, nn.Linear]]

#: What comes before the labels of a sequence classifier: (whole model) -> (before, layer).
_Classifying = Callable[[Any], tuple[nn.Module, nn.Linear]]


@dataclass(frozen=True)
class Family:
    """One architecture: its cut and its heads; `masked` is None for causal models.

    `fresh` are the starts of the names, in a sequence classifier, of what a checkpoint need not hold.
    """

    cut: type[Cut]
    masked: _Masked | None
    classifying: _Classifying
    fresh: tuple[str, ...]
    pooled: bool = False

    @property
    def causal(self) -> bool:
        """Whether tokens see only what is before them."""
        return self.masked is None


def _bert_masked(model: Any) -> tuple[nn.Module, nn.Linear]:
    return model.cls.predictions.transform, model.cls.predictions.decoder


def _roberta_masked(model: Any) -> tuple[nn.Module, nn.Linear]:
    return nn.Sequential(model.lm_head.dense, nn.GELU(), model.lm_head.layer_norm), model.lm_head.decoder


def _distilbert_masked(model: Any) -> tuple[nn.Module, nn.Linear]:
    return nn.Sequential(model.vocab_transform, model.activation, model.vocab_layer_norm), model.vocab_projector


def _bert_classifying(model: Any) -> tuple[nn.Module, nn.Linear]:
    return nn.Sequential(model.base_model.pooler.dense, nn.Tanh()), model.classifier


def _roberta_classifying(model: Any) -> tuple[nn.Module, nn.Linear]:
    return nn.Sequential(model.classifier.dense, nn.Tanh()), model.classifier.out_proj


def _distilbert_classifying(model: Any) -> tuple[nn.Module, nn.Linear]:
    return nn.Sequential(model.pre_classifier, nn.ReLU()), model.classifier


def _decoder(cut: type[DecoderCut]) -> Family:
    return Family(cut, None, lambda model: (cut.tail(model.base_model), model.score), ("score.",))


FAMILIES: dict[str, Family] = {
    "opt": _decoder(OptCut),
    "gpt2": _decoder(Gpt2Cut),
    "llama": _decoder(RotaryCut),
    "qwen2": _decoder(RotaryCut),
    "bert": Family(BertCut, _bert_masked, _bert_classifying, ("classifier.", "bert.pooler."), pooled=True),
    "roberta": Family(RobertaCut, _roberta_masked, _roberta_classifying, ("classifier.",), pooled=True),
    "distilbert": Family(
        DistilBertCut, _distilbert_masked, _distilbert_classifying, ("pre_classifier.", "classifier.")
    ),
}  # fmt: skip


def family_of(config: Any, source: str) -> Family:
    """Return the family of a transformers config; one without a cut, or with an odd setting, is a ModelError."""
    kind = str(config.model_type)
    if kind not in FAMILIES:
        allowed = ", ".join(FAMILIES)
        raise ModelError(f"{source}: architecture {kind!r} has no cut. Allowed: {allowed}.{nearest(kind, FAMILIES)}")
    family = FAMILIES[kind]
    if not family.causal and getattr(config, "is_decoder", False):
        raise ModelError(f"{source}: is_decoder = true in its config makes {kind} causal; allowed is false.")
    if getattr(config, "add_cross_attention", False):
        raise ModelError(f"{source}: add_cross_attention = true in its config; allowed is a model without an encoder.")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ModelError(
            f"{source}: use_sliding_window = true in its config; allowed is attention to all tokens before."
        )
    if getattr(config, "sinusoidal_pos_embds", False):
        raise ModelError(f"{source}: sinusoidal_pos_embds = true in its config; allowed are learned positions.")
    return family


def auto_class(family: Family, head: HeadKind) -> str:
    """Return the name of transformers' class that holds what a head needs."""
    if head == "prototype":
        return "AutoModel"
    if head == "linear":
        return "AutoModelForSequenceClassification"
    if head == "lm" and not family.causal:
        raise ModelError(
            "data.head = 'lm': next tokens need a causal model; allowed here: verbaliser, prototype, linear."
        )
    return "AutoModelForCausalLM" if family.causal else "AutoModelForMaskedLM"


def cut_of(family: Family, head: HeadKind, model: Any, classes: int, words: Sequence[int], mask: int) -> Cut:
    """Return the cut of a model of `auto_class`, its head not yet started where that is a new one."""
    made: Head
    if head == "linear":
        made = Classifier(*family.classifying(model), "last" if family.causal else "first")
        return family.cut(model.base_model, made)
    if head == "prototype":
        base = model.base_model
        if not family.causal:
            return family.cut(base, MeanPooled(base.config.hidden_size, classes))
        tail = _tail(family, base)
        return family.cut(base, Classifier(tail, nn.Linear(_read_width(base), classes), "last"))
    if family.masked is not None:
        made = MaskWords(*family.masked(model), words, mask)
    else:
        tail, output = _tail(family, model.base_model), model.get_output_embeddings()
        made = NextToken(tail, output, classes) if head == "lm" else LabelWords(tail, output, words)
    return family.cut(model, made)


def _tail(family: Family, base: Any) -> nn.Module:
    assert issubclass(family.cut, DecoderCut)
    return family.cut.tail(base)


def _read_width(base: Any) -> int:
    """Return the width of what a causal body gives: opt-350m's differs from that of its layers."""
    return int(getattr(base.config, "word_embed_proj_dim", None) or base.config.hidden_size)
