"""Guides as they travel: every entry in one unit, rows for tables that are nearly empty, the same bits however cut."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
from tinyruns import Tiny, make, same, weights, written_out

from fedbench.algorithms.base import Round
from fedbench.base.arrays import Arrays, Unit
from fedbench.base.errors import WireError
from fedbench.codec import frame
from fedbench.models.trainable import Tensor
from fedbench.run.build import Built
from fedbench.zo import layout, span
from fedbench.zo.layout import Cutting, Layout, columns_of, row_sparse
from fedbench.zo.span import Span

OPT: dict[str, Any] = {"model.name": "shape:opt-tiny", "data.public_per_class": 16}
KINDS = ("public", "classes", "layers")
METHODS = ("cooperllm", "cooperllm_plus")
#: Entries of a tile: as shipped, and so few that every matrix is many units.
TILES = (layout.TILE_ENTRIES, 1000, 64)


@pytest.fixture
def tiles_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that sets the entries of a tile everywhere."""

    def set_(entries: int) -> None:
        monkeypatch.setattr(layout, "TILE_ENTRIES", entries)
        monkeypatch.setattr(span, "TILE_ENTRIES", entries)

    return set_


def made(built: Built) -> tuple[Layout, Arrays, Cutting, Arrays]:
    """Return a method's layout, its guides whole, their cutting and their units."""
    method: Any = built.algorithm
    at = Round(0, 0, built.sampled(0), 0.1)
    whole, plan = method._guides.whole(at)[1], method.plan(at)
    return method._guides.layout, whole, Cutting(method._guides.layout, plan), plan


@pytest.mark.parametrize("entries", TILES)
@pytest.mark.parametrize("kind", KINDS)
def test_units_hold_every_entry_that_is_not_zero_once(kind: str, entries: int, tiles_of: Any) -> None:
    tiles_of(entries)
    lay, whole, cutting, plan = made(make("cooperllm", {"method.cooperllm.guide": kind, "data.public_per_class": 16}))
    assert len({unit.name for unit in cutting.units()}) == len(cutting.units())
    assert all(plan[unit.name].shape == unit.shape for unit in cutting.units())
    assert max(unit.shape[0] for unit in cutting.units()) <= entries
    squares = sum(float(np.square(plan[unit.name].astype(np.float64)).sum()) for unit in cutting.units())
    assert squares == pytest.approx(lay.count, abs=1e-5)
    for t in lay.trainable:
        for j in lay.of(t):
            guide, factor = Span(cutting, plan).mix(np.eye(lay.count)[j])
            np.testing.assert_array_equal(factor * written_out(guide, t), whole[lay.name(j, t)].reshape(-1))


@pytest.mark.parametrize("model", ["embedded", "shape:opt-tiny"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stages_norms_and_biases_travel_before_its_matrices(kind: str, model: str, tiles_of: Any) -> None:
    tiles_of(1000)
    changes = {"model.name": model, "method.cooperllm.guide": kind, "data.public_per_class": 16}
    lay, _, cutting, _ = made(make("cooperllm", changes))
    of = {tile.name: t for t in lay.trainable for j in lay.of(t) for tile in cutting.tiles(j, t)}
    tensors = [of[unit.name] for unit in cutting.units()]
    assert cutting.stages() == [tensor.stage for tensor in tensors]
    places = [(tensor.stage, tensor.parameter.ndim > 1) for tensor in tensors]
    assert places == sorted(places)
    assert len(set(places)) > lay.trainable.tensors[-1].stage + 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_runs_have_the_same_bits_whole_in_tiles_and_without_rows(
    method: str, kind: str, tiles_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {f"method.{method}.guide": kind, "data.public_per_class": 16, "federation.devices": 1}
    changes |= {"zo.distribution": "gaussian"} if kind == "layers" else {"zo.perturbations": 2}
    changes |= {"method.cooperllm_plus.p2": 2} if method == "cooperllm_plus" else {}
    found, sent = [], []
    for entries, dense in ((TILES[0], False), (TILES[1], False), (TILES[0], True)):
        tiles_of(entries)
        if dense:
            monkeypatch.setattr(Layout, "_rows", lambda *_: np.empty(0, np.int32))
        tiny = Tiny(make(method, changes))
        sent.append(tiny.play(1)[0].plan_bytes)
        found.append(weights(tiny.built.trainable))
    assert same(found[0], found[1])
    assert same(found[0], found[2])
    assert sent[0] == sent[1] < sent[2], "rows are less than whole tables"


def test_any_range_and_any_rows_are_those_of_the_whole(tiles_of: Any) -> None:
    tiles_of(700)
    lay, whole, cutting, plan = made(make("cooperllm", {"method.cooperllm.guide": "classes", **OPT}))
    coef = np.array([0.3, -1.0, 2.0, 0.5])
    guide, _ = Span(cutting, plan).mix(coef)
    draw = np.random.default_rng(1)
    kinds = set()
    for t in lay.trainable:
        first, *others = (whole[lay.name(j, t)].reshape(-1) for j in range(4))
        expected = float(coef[0]) * first
        for c, other in zip(coef[1:], others, strict=True):
            expected = expected + float(c) * other
        for _ in range(5):
            first_entry = int(draw.integers(0, t.size))
            count = int(draw.integers(1, t.size - first_entry + 1))
            at = first_entry
            for low, high, values in guide.pieces(t, first_entry, count):
                assert low == at < high
                np.testing.assert_array_equal(values if values.size else np.zeros(high - low), expected[low:high])
                at = high
            assert at == first_entry + count
        columns = columns_of(t)
        rows = draw.integers(0, t.size // columns, 9)
        np.testing.assert_array_equal(guide.rows(t, rows, columns), expected.reshape(-1, columns)[rows])
        kinds.add(cutting.rows(t) is None)
    assert kinds == {True, False}


class Alive:
    """Counts decoded guide units that are alive at a time, and their bytes: `frame.unpack` with a ledger."""

    def __init__(self) -> None:
        self._unpack = frame.unpack
        self._sizes: dict[int, int] = {}
        self.count = self.most = self.most_bytes = self.number = 0

    def __call__(self, bytes_: Any, unit: Unit, *arguments: Any) -> Any:
        array, note = self._unpack(bytes_, unit, *arguments)
        if unit.name == "scalars" or unit.name.startswith("rows/"):
            return array, note
        array = np.array(array)  # as from a codec: never a view of the frame
        self.number += 1
        number = self.number
        self._sizes[number] = array.nbytes
        weakref.finalize(array, self._sizes.pop, number)
        self.most = max(self.most, len(self._sizes))
        self.most_bytes = max(self.most_bytes, sum(self._sizes.values()))
        return array, note


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_at_most_two_decoded_units_exist(
    method: str, kind: str, tiles_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Probing and updating: the one that is read, and at most the one before it; a mix adds a tile of its own."""
    tiles_of(2048)
    changes = {f"method.{method}.guide": kind, "data.public_per_class": 16, "federation.devices": 1}
    tiny = Tiny(make(method, changes | ({"method.cooperllm_plus.p2": 1} if method == "cooperllm_plus" else {})))
    alive = Alive()
    monkeypatch.setattr(frame, "unpack", alive)
    gc.collect()
    tiny.play(1)
    assert alive.number > 100, "units were decoded as they were read"
    assert alive.most <= 2
    assert alive.most_bytes <= 2 * 4 * 2048


OUTLINES = {"descending": [3, 1], "twice": [2, 2], "beyond": [1, 10_000_000], "negative": [-1, 4]}


@pytest.mark.parametrize("rows", OUTLINES.values(), ids=OUTLINES)
def test_an_outline_that_is_no_list_of_rows_is_refused(rows: list[int]) -> None:
    built = make("cooperllm")
    lay: Layout = built.algorithm._guides.layout  # type: ignore[attr-defined]
    (unit, *_) = lay.outline_units()
    with pytest.raises(WireError, match="ascending rows"):
        Cutting(lay, {unit.name: np.array(rows, np.int32)})


def test_tables_of_rows_are_embeddings_and_heads_of_label_words() -> None:
    built = make("cooperllm", OPT)
    found: list[Tensor] = row_sparse(built.cut, built.trainable)
    assert [t.name.rpartition("embed_")[2] for t in found] == ["tokens.weight", "positions.weight"]
