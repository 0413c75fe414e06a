"""The embedded task: a synthetic language with topics, a classification task in it, and its data, all from keys.

Nothing is downloaded or read from disk. The data set is one fixed set: a run's seed chooses
only which of its train rows are public.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from fedbench.base import rng
from fedbench.base.errors import DataError
from fedbench.data.rows import Rows, Splits

Public = Literal["embedded", "embedded:poor"]

VOCABULARY = 256
LENGTH = 32
TOPICS = 8
TOPIC_WORDS = 24
CLASSES = 4

#: Token ids, in blocks: pad, prompt, one label word a topic, the topics' words, function words, noise.
PAD = 0
PROMPT = 1
LABEL_WORDS = 2
TOPIC_START = LABEL_WORDS + TOPICS
FUNCTION_START = TOPIC_START + TOPICS * TOPIC_WORDS
FUNCTION_WORDS = 22
NOISE_START = FUNCTION_START + FUNCTION_WORDS

#: What a position holds: a word of the text's topic, of a topic drawn evenly from all, a function word, else noise.
P_TOPIC = 0.20
P_ANY_TOPIC = 0.25
P_FUNCTION = 0.35

#: Seed of the fixed data set and of the pretraining texts; never the seed of a run.
DATA_SEED = 20_240_501
TRAIN_ROWS = 4096
DEV_ROWS = 512
TEST_ROWS = 1024

#: Topics that the poor public set lacks: the halves of two classes that no verbaliser names, so that neither
#: pretraining nor the public rows say where they belong.
POOR_MISSING = (3, 7)


def write_texts(stream: np.random.Generator, topics: np.ndarray) -> np.ndarray:
    """Return one text for each topic of `topics` int64 [n] as ids int32 [n, LENGTH], the prompt token last."""
    shape = (topics.shape[0], LENGTH - 1)
    kind = stream.random(shape)
    any_topic = (topics[:, None] + stream.integers(0, TOPICS, shape)) % TOPICS
    of_topic = np.where(kind < P_TOPIC, topics[:, None], any_topic)
    topical = TOPIC_START + of_topic * TOPIC_WORDS + (stream.random(shape) * TOPIC_WORDS).astype(np.int64)
    share = 1.0 / np.arange(1, FUNCTION_WORDS + 1)  # function words follow Zipf's law
    edges = np.cumsum(share / share.sum())[:-1]
    function = FUNCTION_START + np.searchsorted(edges, stream.random(shape))
    noise = stream.integers(NOISE_START, VOCABULARY, shape)
    topic_share = P_TOPIC + P_ANY_TOPIC
    words = np.where(kind < topic_share, topical, np.where(kind < topic_share + P_FUNCTION, function, noise))
    return np.concatenate([words, np.full((shape[0], 1), PROMPT)], axis=1).astype(np.int32)


def class_of(topics: np.ndarray) -> np.ndarray:
    """Return the class of each topic, int64: topics 2c and 2c + 1 are class c."""
    return topics.astype(np.int64) // (TOPICS // CLASSES)


def verbaliser() -> tuple[int, ...]:
    """Return one token id a class: the label word of the class's first topic."""
    return tuple(LABEL_WORDS + c * (TOPICS // CLASSES) for c in range(CLASSES))


def load(public: Public, public_per_class: int, seed: int) -> Splits:
    """Return the fixed data set, with `public_per_class` train rows a class made public by `seed`.

    Every split but `embedded:poor`'s public rows has all topics in equal shares before the public rows
    leave. More public rows than a class has is a DataError.
    """
    pool = _split("train", TRAIN_ROWS)
    allowed = np.ones(len(pool), dtype=bool) if public == "embedded" else ~np.isin(pool.groups, POOR_MISSING)
    stream = rng.generator(seed, "public")
    chosen = []
    for c in range(CLASSES):
        candidates = np.flatnonzero(allowed & (pool.labels == c))
        if not 1 <= public_per_class < candidates.size:
            raise DataError(
                f"data.public_per_class: found {public_per_class}; allowed is 1 to {candidates.size - 1} "
                f"on the {public} task, where class {c} has {candidates.size} rows to choose from."
            )
        chosen.append(stream.choice(candidates, public_per_class, replace=False))
    index = stream.permutation(np.concatenate(chosen))
    private = np.ones(len(pool), dtype=bool)
    private[index] = False
    splits = {
        "train": pool.take(private),
        "public": pool.take(index),
        "dev": _split("dev", DEV_ROWS),
        "test": _split("test", TEST_ROWS),
    }
    per_class = TOPICS // CLASSES
    names = tuple("topics " + " and ".join(str(c * per_class + i) for i in range(per_class)) for c in range(CLASSES))
    source = {"private": "embedded", "public": public} | {f"{k}_sha256": rows.sha256() for k, rows in splits.items()}
    return Splits(**splits, label_names=names, label_words=verbaliser(), source=source, mask_word=PROMPT)


def rows_of(stream: np.random.Generator, topics: np.ndarray) -> Rows:
    """Return one row for each topic of `topics` int64 [n], its text written by the stream."""
    ids = write_texts(stream, topics)
    return Rows(ids, np.full(topics.size, LENGTH, dtype=np.int32), class_of(topics), topics, PAD)


def _split(name: str, rows: int) -> Rows:
    stream = rng.generator(DATA_SEED, f"embedded.{name}")
    return rows_of(stream, stream.permutation(np.arange(rows, dtype=np.int64) % TOPICS))
