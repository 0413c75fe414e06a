"""The model and the batch of a benchmark: any `[model] name` or a known shape, random ids, nothing padded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedbench.base import config
from fedbench.base.account import Meter
from fedbench.base.job import DataSection, ModelSection
from fedbench.base.rng import generator
from fedbench.bench.harness import Options
from fedbench.data.rows import Batch, Rows, Splits
from fedbench.models import load, parts
from fedbench.models.cut import Cut
from fedbench.models.origin import SHAPE, origin_of
from fedbench.models.residency import RESIDENT, Residency
from fedbench.models.shapes import SHAPES
from fedbench.models.trainable import Trainable, select
from fedbench.zo.stream import Stream

#: The label words of a benchmark's two classes, the id that stands for the mask, and the least id of a text.
WORDS, MASK, FIRST = (5, 9), 3, 10

_PUBLIC_ROWS = 8


@dataclass(frozen=True)
class Subject:
    """What a benchmark works on."""

    cut: Cut
    trainable: Trainable
    stream: Stream
    batch: Batch


def subject(options: Options, residency: Residency = RESIDENT, micro_batch: int = 0) -> Subject:
    """Return the model with its trainable part, its stream, and one batch.

    Causal models are read through label words, encoders through prototypes of random rows.
    """
    name = SHAPE + options.model if options.model in SHAPES else options.model
    asked = {"name": name, "trainable": options.trainable}
    section = config.validate(ModelSection, asked, prefix=("model",), source="the command line")
    origin = origin_of(section.name)
    vocabulary = 256 if origin.kind == "embedded" else int(origin.config.vocab_size)
    public = rows(_PUBLIC_ROWS, 8, vocabulary)
    splits = Splits(public, public, public, public, ("a", "b"), WORDS, {"private": section.name}, MASK)
    cut = load.build(origin, DataSection(), splits, 0, residency)
    part = section.trainable or "full"
    parts.add(cut, part, section, 0)
    trainable = select(cut, part)
    stream = Stream(cut, trainable, Meter(), gaussian=False, micro_batch=micro_batch)
    batch = rows(options.batch, options.length, vocabulary).batch(np.arange(options.batch))
    return Subject(cut, trainable, stream, batch)


def rows(count: int, length: int, vocabulary: int) -> Rows:
    """Return rows of one length with random ids and both labels in turn."""
    ids = generator(0, "bench rows", count, length).integers(FIRST, vocabulary, (count, length)).astype(np.int32)
    labels = np.arange(count, dtype=np.int64) % len(WORDS)
    return Rows(ids, np.full(count, length, np.int32), labels, labels.copy(), 0)
