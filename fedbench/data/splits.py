"""From raw text to the four splits of a run: private train, public, dev and test.

Test rows are never changed; every other split gives up the rows that it shares with a
split before it (test, dev file, public, dev cut from train, train), and the source counts
them. Each draw is a function of the seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast, get_args

import numpy as np

from fedbench.base import rng
from fedbench.base.errors import ConfigError, DataError
from fedbench.base.job import DataSection
from fedbench.data import embedded
from fedbench.data.clean import Pool
from fedbench.data.load import find_folder, read
from fedbench.data.prompt import Prompt, Reading, prompt_of
from fedbench.data.raw import RawSplit, RawSplits
from fedbench.data.rows import Rows, Splits
from fedbench.data.tokenise import Tokeniser, load_tokeniser

DEV_SHARE = 0.1


def load_splits(
    data: DataSection,
    seed: int,
    tokeniser_source: str | Tokeniser | None,
    reading: Callable[[], Reading | None] | None = None,
) -> Splits:
    """Return the splits of a job's [data]: the embedded task, or text by a tokeniser or that of a folder or hub id.

    Where `reading`, asked for once the data are read, names a place to read at, texts stand in the job's template and
    the splits have the label words to read there.
    """
    if data.private == "embedded":
        if data.public not in get_args(embedded.Public):
            allowed = f"{', '.join(get_args(embedded.Public))}, as data.private = 'embedded'"
            raise ConfigError(f"data.public: found {data.public!r}; allowed: {allowed}.")
        splits = embedded.load(cast(embedded.Public, data.public), data.public_per_class, seed)
        return shuffle_public(splits, seed) if data.public_labels == "shuffled" else splits
    if data.private == "embedded:poor":
        raise ConfigError("data.private: found 'embedded:poor'; that is a public set: allowed here is embedded.")
    if data.public in get_args(embedded.Public):
        allowed = f"{data.private!r} (its own rows) or another text data set, as data.private = {data.private!r}"
        raise ConfigError(f"data.public: found {data.public!r}; allowed: {allowed}.")
    if tokeniser_source is None:
        raise ConfigError(f'data.private: {data.private!r} is text; model.name = "embedded" has no tokeniser for it.')
    tokeniser = load_tokeniser(tokeniser_source) if isinstance(tokeniser_source, str) else tokeniser_source
    private = read(data.private, text_columns=data.text_columns, label_column=data.label_column)
    public = None
    if not _same(data.private, data.public):
        public = read(data.public, text_columns=data.text_columns, label_column=data.label_column)
    prompt = words = None
    place = None if reading is None else reading()
    if place is not None:
        prompt = prompt_of(data.template, place, tokeniser, paired=private.train.pairs is not None)
        words = prompt.label_words(_words(data, private))
    splits = prepare(
        private,
        public,
        tokeniser,
        max_length=data.max_length,
        public_per_class=data.public_per_class,
        public_labels=data.public_labels,
        seed=seed,
        prompt=prompt,
    )
    return replace(splits, label_words=words, mask_word=tokeniser.mask) if words else splits


def prepare(
    private: RawSplits,
    public: RawSplits | None,
    tokeniser: Tokeniser,
    *,
    max_length: int,
    public_per_class: int,
    public_labels: str,
    seed: int,
    prompt: Prompt | None = None,
) -> Splits:
    """Return the tokenised splits; `public` None takes the public rows out of the private train split.

    Public: `public_per_class` rows a class, drawn by the seed from a train split. Dev: the
    set's own file, or a tenth of each class of what remains of train. DataError where
    a class has too few rows or the public classes are not the private ones.
    """
    counts: dict[str, int] = {}
    used = Pool.of(private.test).present()
    train = Pool.of(private.train)
    dev = None
    if private.dev is not None:
        dev = Pool.of(private.dev)
        counts["dev_in_test"] = dev.drop(used)
        used |= dev.present()
    counts["train_in_test_or_dev"] = train.drop(used)
    pool = train
    if public is not None:
        pool = Pool.of(_relabel(public, private))
        counts["public_in_test_or_dev"] = pool.drop(used)
    stream = rng.generator(seed, "public")
    public_pool = pool.take(pool.draw(np.full(len(private.label_names), public_per_class), stream))
    _enough(public_pool, private, public_per_class)
    own = public_pool.rows.size if public is None else 0
    counts["train_in_public"] = train.drop(public_pool.present()) - own
    if dev is None:
        sizes = np.bincount(train.labels(), minlength=len(private.label_names))
        wanted = np.maximum(np.rint(DEV_SHARE * sizes).astype(np.int64), 1)
        dev = train.take(train.draw(wanted, rng.generator(seed, "dev")))
        counts["train_in_dev"] = train.drop(dev.present()) - dev.rows.size
    _all_classes(train, private, public_per_class)
    pools = {"train": train, "public": public_pool, "dev": dev, "test": Pool.of(private.test)}
    rows = {name: _encode(pool, tokeniser, prompt, max_length) for name, pool in pools.items()}
    source = {f"private.{key}": value for key, value in private.provenance.items()}
    source |= {f"public.{key}": value for key, value in (public or private).provenance.items() if key != "test.sha256"}
    source |= {"tokeniser.sha256": tokeniser.sha256, "public_labels": "given"}
    source |= {} if prompt is None else {"template": prompt.template}
    source |= {f"removed.{key}": str(value) for key, value in counts.items()}
    train_rows, public_rows, dev_rows, test_rows = (rows[name] for name in ("train", "public", "dev", "test"))
    splits = Splits(train_rows, public_rows, dev_rows, test_rows, private.label_names, None, source)
    return shuffle_public(splits, seed) if public_labels == "shuffled" else splits


def shuffle_public(splits: Splits, seed: int) -> Splits:
    """Return the splits with the public labels in a seeded random order: same texts, same count of each label."""
    order = rng.generator(seed, "shuffle-labels").permutation(len(splits.public))
    shuffled = replace(splits.public, labels=splits.public.labels[order])
    return replace(splits, public=shuffled, source=splits.source | {"public_labels": "shuffled"})


def _same(private: str, public: str) -> bool:
    """Return whether two names mean one data set: the same name, or the same folder."""
    if private == public:
        return True
    mine, theirs = find_folder(private), find_folder(public)
    return mine is not None and theirs is not None and mine.resolve() == theirs.resolve()


def _relabel(public: RawSplits, private: RawSplits) -> RawSplit:
    """Return the public train split with the private set's label numbers, matched by name where both have names."""
    mine, theirs = private.label_names, public.label_names
    fit = len(mine) == len(theirs)
    if fit and private.named and public.named:
        order = {name.lower(): label for label, name in enumerate(mine)}
        fit = {name.lower() for name in theirs} == set(order)
        if fit:
            to_private = np.array([order[name.lower()] for name in theirs])
            return replace(public.train, labels=to_private[public.train.labels])
    if not fit:
        raise DataError(
            f"data.public: {public.name} has {len(theirs)} classes ({', '.join(theirs)}); allowed are the "
            f"{len(mine)} classes of data.private = {private.name} ({', '.join(mine)})."
        )
    return public.train


def _enough(drawn: Pool, private: RawSplits, per_class: int) -> None:
    found = np.bincount(drawn.labels(), minlength=len(private.label_names))
    if found.min() < per_class:
        short = int(found.argmin())
        raise DataError(
            f"{drawn.split.where}: data.public_per_class = {per_class}, but class {short} "
            f"({private.label_names[short]}) has only {found[short]} different texts that are not in test or dev."
        )


def _all_classes(train: Pool, private: RawSplits, per_class: int) -> None:
    left = np.bincount(train.labels(), minlength=len(private.label_names))
    if left.min() == 0:
        gone = int(left.argmin())
        raise DataError(
            f"{train.split.where}: class {gone} ({private.label_names[gone]}) has no row left to train on once the "
            f"public rows (data.public_per_class = {per_class}) and the dev rows are out."
        )


def _words(data: DataSection, private: RawSplits) -> tuple[str, ...]:
    """Return the label words of a job: its own, or the classes' names in lower case."""
    words = data.label_words or tuple(name.lower() for name in private.label_names)
    if len(words) != len(private.label_names):
        raise ConfigError(
            f"data.label_words: found {len(words)} ({', '.join(words)}); {private.name} has "
            f"{len(private.label_names)} classes ({', '.join(private.label_names)})."
        )
    return words


def _encode(pool: Pool, tokeniser: Tokeniser, prompt: Prompt | None, max_length: int) -> Rows:
    split = pool.split
    texts = [split.texts[row] for row in pool.rows]
    pairs = None if split.pairs is None else [split.pairs[row] for row in pool.rows]
    ids, lengths = (prompt or tokeniser).encode(texts, pairs, max_length)
    labels = pool.labels()
    return Rows(ids, lengths, labels, labels.copy(), tokeniser.pad)
