"""From `[model]` to a cut: the embedded model, a known shape, an installed package's folder, a folder or a hub id.

Everything wrong with a model is one ModelError with its source; no weight is changed here but those of a new head.
Weights that a checkpoint lacks are never made up, except those of a new head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fedbench.base.errors import ConfigError, ModelError
from fedbench.base.job import DataSection
from fedbench.data.hashed import hashed_words
from fedbench.data.prompt import Reading
from fedbench.data.rows import Splits
from fedbench.data.tokenise import Tokeniser
from fedbench.models import checkpoint, shapes, start
from fedbench.models.cut import Cut, Head
from fedbench.models.decoders import EmbeddedCut
from fedbench.models.families import Family, HeadKind, cut_of
from fedbench.models.heads import LabelWords, NextToken
from fedbench.models.origin import SHAPE, Origin, origin_of, source_of
from fedbench.models.residency import RESIDENT, Residency
from fedbench.models.start import features_of

__all__ = ["Origin", "build", "features_of", "of_shape", "origin_of", "reading_of", "source_of", "tokeniser_of"]


def build(model: Origin | str, data: DataSection, splits: Splits, seed: int, residency: Residency = RESIDENT) -> Cut:
    """Return the model of a job, its head made from `data.head`, in evaluation mode and float32."""
    origin = origin_of(model) if isinstance(model, str) else model
    head = origin.head(data.head)
    _fits(origin, splits)
    words, classes = splits.label_words or (), len(splits.label_names)
    if head == "verbaliser" and not words:
        raise ModelError(f"model.name = {origin.name!r}: a verbaliser needs label words; {_task(splits)} has none.")
    if origin.kind == "embedded":
        cut = _embedded(origin, head, words, classes)
        residency.place(cut)
    elif origin.kind == "shape":
        cut = _seeded(origin, head, classes, words, splits.mask_word or 0, seed, residency)
    else:
        cut = _checkpoint(origin, head, classes, words, splits.mask_word or 0, seed, residency)
    if head == "prototype" and not start.exported(cut, origin.folder):
        start.prototypes(cut.eval(), splits.public)
    cut.weights = origin.weights
    return cut.eval()


def tokeniser_of(origin: Origin) -> str | Tokeniser | None:
    """Return the tokeniser of a model, or the folder or hub id to read it from; None for the embedded model.

    A shape has none: its words are hashed.
    """
    if origin.kind == "shape":
        return hashed_words(int(origin.config.vocab_size), origin.name)
    return origin.source if origin.kind == "checkpoint" else None


def reading_of(origin: Origin, wanted: HeadKind | None) -> Reading | None:
    """Return where a verbaliser reads its label words in a text, or None for the other heads."""
    if origin.head(wanted) != "verbaliser":
        return None
    return "last" if origin.causal else "mask"


def of_shape(name: str, words: Sequence[int], seed: int, residency: Residency = RESIDENT) -> Cut:
    """Return a model of a known shape with seeded weights, read through its label words' rows.

    Encoders are read at the last token of id 0, or at the first position where there is none.
    """
    return _seeded(origin_of(SHAPE + name), "verbaliser", len(words), words, 0, seed, residency).eval()


def empty(origin: Origin, head: HeadKind, splits: Splits) -> tuple[Any, Cut]:
    """Return a whole model of transformers as `head` needs it, its weights all 0 (or new), and a cut of the same weights."""
    model, cut = _made(origin, head, len(splits.label_names), splits.label_words or (), splits.mask_word or 0, RESIDENT)
    RESIDENT.place(cut)
    return model, cut


def _embedded(origin: Origin, head: HeadKind, words: Sequence[int], classes: int) -> Cut:
    from fedbench.models.embedded.network import WEIGHTS, load_pretrained

    backbone = load_pretrained(origin.embedded_weights or WEIGHTS)
    made: Head
    if head == "lm":
        made = NextToken(backbone.final_norm, backbone.lm_head, classes)
    else:
        made = LabelWords(backbone.final_norm, backbone.lm_head, words)
    return EmbeddedCut(backbone, made)


def _seeded(
    origin: Origin, head: HeadKind, classes: int, words: Sequence[int], mask: int, seed: int, residency: Residency
) -> Cut:
    model, cut = _made(origin, head, classes, words, mask, residency)
    residency.place(cut)
    shapes.seed_weights(model, seed, residency)
    cut.weights = origin.weights
    return cut


def _checkpoint(
    origin: Origin, head: HeadKind, classes: int, words: Sequence[int], mask: int, seed: int, residency: Residency
) -> Cut:
    try:
        if residency is not RESIDENT and origin.folder is not None:
            model, cut = _made(origin, head, classes, words, mask, residency)
            stored = checkpoint.index(origin.folder)
            found = checkpoint.matched(stored, model, model.base_model_prefix)
            if found is not None:
                residency.place(cut)
                checkpoint.fill(model, found, residency)
                return cut
        model, missing = _loaded(origin, head, classes)
    except ModelError:
        raise
    except Exception as error:  # the library raises many types; all mean that no model can be had
        raise origin.unreadable(error) from None
    start.gaussians(model, missing, seed)
    with torch.random.fork_rng(devices=[]):
        cut = cut_of(_family(origin), head, model, classes, words, mask)
    residency.place(cut)
    return cut


def _made(
    origin: Origin, head: HeadKind, classes: int, words: Sequence[int], mask: int, residency: Residency
) -> tuple[Any, Cut]:
    """Return a model whose weights are still to come, and its cut."""
    import transformers

    auto, config, made = origin.skeleton(head, classes)
    del made["config"]
    with residency.skeleton(), torch.random.fork_rng(devices=[]):
        model = getattr(transformers, auto).from_config(config, **made)
        return model, cut_of(_family(origin), head, model, classes, words, mask)


def _loaded(origin: Origin, head: HeadKind, classes: int) -> tuple[Any, list[str]]:
    """Return the model of a checkpoint, and the names of the new head's weights that the checkpoint does not hold."""
    import transformers

    auto, _, made = origin.skeleton(head, classes)
    how = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with torch.random.fork_rng(devices=[]):
        model, told = getattr(transformers, auto).from_pretrained(**origin.where, **made, **how)
    missing = sorted({*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])})
    fresh = _family(origin).fresh if head == "linear" else ()
    wrong = [name for name in missing if not name.startswith(fresh)]
    if wrong:
        base = f"{model.base_model_prefix}."
        only_head = head in ("verbaliser", "lm") and not any(name.startswith(base) for name in wrong)
        what = "no language-model head" if only_head else "not all weights of its architecture"
        hint = f"; data.head = {head!r} needs one, prototype and linear do not" if only_head else ""
        raise ModelError(
            f"model.name = {origin.name!r}: the checkpoint holds {what}: {wrong[0]} is missing or has another shape "
            f"({len(wrong)} of {len(list(model.parameters()))} weights){hint}."
        )
    return model, missing


def _family(origin: Origin) -> Family:
    assert origin.family is not None
    return origin.family


def _fits(origin: Origin, splits: Splits) -> None:
    """Raise where rows have ids or lengths that a model has no embeddings for."""
    rows = (splits.train, splits.public, splits.dev, splits.test)
    if origin.kind == "embedded":
        if splits.source.get("private") != "embedded":
            raise ModelError(
                "model.name = 'embedded' reads the embedded task alone; data.private names another data set."
            )
        return
    vocabulary, positions = int(origin.config.vocab_size), int(origin.config.max_position_embeddings)
    if origin.config.model_type == "roberta":
        positions -= int(origin.config.pad_token_id) + 1
    largest, longest = max(int(r.ids.max()) for r in rows), max(int(r.lengths.max()) for r in rows)
    if largest >= vocabulary:
        raise ModelError(
            f"model.name = {origin.name!r}: token id {largest} is beyond its vocabulary of {vocabulary}: "
            "the tokeniser belongs to another model."
        )
    if longest > positions:
        raise ConfigError(f"data.max_length: found rows of {longest} tokens; {origin.name} has {positions} positions.")


def _task(splits: Splits) -> str:
    return str(splits.source.get("private.name", splits.source.get("private", "the data set")))
