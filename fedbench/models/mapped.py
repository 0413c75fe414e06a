"""Weights in a working file: a rank's memory holds the stage that it visits, not the model.

The file is unlinked as soon as it is open, so that whatever ends the process leaves nothing behind; it is laid out by
stage and mapped shared, and every parameter is a view of the mapping. Memory that is given back loses no data: what
was written stays in the file. Bits are those of a resident model.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedbench.base.errors import ModelError
from fedbench.models.residency import Residency, rebind

_PAGE = mmap.PAGESIZE
_ALIGN = 64
_START_WRITING = 2  # SYNC_FILE_RANGE_WRITE
_IN_MEMORY = {0x01021994: "tmpfs", 0x858458F6: "ramfs"}

#: Embedding tables from this size on are read row by row from the file instead of through the mapping.
_LARGE_TABLE = 4 << 20


class Mapped(Residency):
    """The weights of one model in one unlinked file."""

    piece = 4 << 20
    picked_rows = 128

    def __init__(self, folder: Path) -> None:
        self._file = -1
        self._folder = folder
        _refuse_memory(folder)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
        self._map: mmap.mmap | None = None
        self._address = 0
        self._stages: list[tuple[int, int]] = []
        self._held: list[int] = []

    def place(self, cut: Any) -> None:
        """Lay all weights of a cut out by stage and make its parameters views of the file.

        Weights that have values keep them; those of a skeleton become 0.
        """
        spans, self._stages, size = _layout(cut)
        self._open(size)
        assert self._map is not None
        flat = np.frombuffer(self._map, np.float32)
        self._address = flat.ctypes.data

        def values_of(parameter: nn.Parameter) -> torch.Tensor:
            """Return a parameter's place in the file, with its values."""
            start, count = spans[id(parameter)]
            values = torch.from_numpy(flat[start // 4 : start // 4 + count]).view(parameter.shape)
            if not parameter.is_meta:
                values.copy_(parameter.detach())
                self.release(values.numpy(), written=True)
            return values

        rebind(cut, values_of)
        for module in cut.modules():
            if isinstance(module, nn.Embedding) and module.weight.nbytes >= _LARGE_TABLE:
                setattr(module, "forward", _Lookup(self, module))  # noqa: B010  (an instance takes another forward)
        cut.residency = self

    @contextmanager
    def visit(self, stage: int) -> Iterator[None]:
        """Hold a stage: the next one is read ahead meanwhile, and at the end the memory of this one is given back."""
        outer = stage in self._held
        self._held.append(stage)
        if not outer:
            self._read_ahead(stage + 1 if stage + 1 < len(self._stages) - 1 else 1)
        try:
            yield
        finally:
            self._held.remove(stage)
            if not outer:
                self._drop(*self._stages[stage])

    def release(self, array: np.ndarray[Any, Any], *, written: bool = False) -> None:
        """Give back the memory of a range of weights; writing what was changed starts without waiting for it."""
        start = array.ctypes.data - self._address
        if self._map is None or not 0 <= start < len(self._map):
            return  # a part of its own, such as LoRA's matrices, is in ordinary memory
        low, high = start // _PAGE * _PAGE, -(-(start + array.nbytes) // _PAGE) * _PAGE
        if written:
            self._libc.sync_file_range(self._file, low, high - low, _START_WRITING)
        self._drop(low, high)

    def rows(self, table: torch.Tensor, index: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return rows `index` (int64 [n]) of a matrix of the model, read from the file: float32 [n, columns]."""
        start, width = table.data_ptr() - self._address, table.shape[1] * 4
        out = np.empty((len(index), table.shape[1]), np.float32)
        for row, line in zip(index.tolist(), out, strict=True):
            if os.preadv(self._file, [line.data], start + row * width) != width:
                raise ModelError(f"the working file of model.mapped ended early at row {row} of {tuple(table.shape)}.")
        return out

    def bytes_held(self) -> int:
        """Return the bytes of the largest block, or of a piece of the embedding where that is larger."""
        return max([4 * self.piece, *(high - low for low, high in self._stages[1:])])

    def _open(self, size: int) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder, prefix="weights-") as file:
                os.posix_fallocate(file.fileno(), 0, size)
                self._map = mmap.mmap(file.fileno(), size, mmap.MAP_SHARED)
                self._file = os.dup(file.fileno())
        except OSError as error:
            raise ModelError(
                f"model.mapped = true: {size:,} bytes of weights can't be put into {self._folder} ({error.strerror}); "
                "set results.dir to a folder on a disk with room for them."
            ) from None

    def _read_ahead(self, stage: int) -> None:
        low, high = self._stages[stage]
        if self._map is not None and high > low:
            self._map.madvise(mmap.MADV_WILLNEED, low, high - low)

    def _drop(self, low: int, high: int) -> None:
        if self._map is not None and high > low:
            self._map.madvise(mmap.MADV_DONTNEED, low, high - low)

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)


class _Lookup:
    """The forward of a large embedding table: rows come from the file, so that no page of the table becomes resident.

    A fault in a mapping brings its neighbours in too, and rows picked all over a table would make it resident whole.
    Where gradients are wanted the table is read as ever.
    """

    def __init__(self, mapped: Mapped, module: nn.Embedding) -> None:
        self._mapped = mapped
        self._module = module
        self._plain = module.forward

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        weight = self._module.weight
        if torch.is_grad_enabled() and weight.requires_grad:
            return self._plain(ids)
        used, where = torch.unique(ids, return_inverse=True)
        rows = torch.from_numpy(self._mapped.rows(weight, used.numpy()))
        return rows.index_select(0, where.view(-1)).view(*ids.shape, -1)


def _layout(cut: Any) -> tuple[dict[int, tuple[int, int]], list[tuple[int, int]], int]:
    """Return where every parameter goes (byte, entries; by id), the byte range of every stage, and the file's size."""
    spans: dict[int, tuple[int, int]] = {}
    stages: list[tuple[int, int]] = []
    end = 0
    for modules in [*cut.stage_modules(), [cut]]:  # what no stage runs comes last
        start = end = -(-end // _PAGE) * _PAGE
        for parameter in (p for module in modules for p in module.parameters()):
            if id(parameter) in spans:
                continue
            if parameter.dtype != torch.float32:
                raise ModelError(f"model.mapped = true: found {parameter.dtype} weights; allowed: float32.")
            spans[id(parameter)] = end, parameter.numel()
            end = -(-(end + 4 * parameter.numel()) // _ALIGN) * _ALIGN
        stages.append((start, -(-end // _PAGE) * _PAGE))
    return spans, stages[:-1], stages[-1][1]


def _refuse_memory(folder: Path) -> None:
    """Raise ModelError where files of `folder` lie in memory: mapping them would save nothing."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    facts = ctypes.create_string_buffer(256)
    if ctypes.CDLL(None).statfs(os.fsencode(there), facts) != 0:
        return
    kind = ctypes.c_long.from_buffer(facts).value & 0xFFFFFFFF
    if kind in _IN_MEMORY:
        raise ModelError(
            f"model.mapped = true: {folder} is on {_IN_MEMORY[kind]}, whose files are memory; "
            "set results.dir to a folder on a disk."
        )
