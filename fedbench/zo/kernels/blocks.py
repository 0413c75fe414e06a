"""64 float32 as one LLVM vector: the registers that the CPU kernels work in, and how they are loaded, made and stored.

A 64-bit word serves as the mask of a block: each bit picks +c or -c. Pointers are bare, nothing is checked here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

_intrinsic: Callable[[Any], Any] = intrinsic

_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, 64)
_MASK = ir.VectorType(ir.IntType(1), 64)


class _Block(types.Type):  # type: ignore[misc]
    """The Numba type of 64 float32 in registers; +, - and * work place by place."""


class _BlockModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


register_model(_Block)(_BlockModel)
_block = _Block("float32x64")
_pointer = types.CPointer(types.float32)


def _operation(symbol: Any, instruction: str) -> None:
    type_callable(symbol)(lambda context: lambda x, y: _block if x == y == _block else None)
    lower_builtin(symbol, _block, _block)(lambda context, b, sig, args: getattr(b, instruction)(*args))


_operation(operator.add, "fadd")
_operation(operator.sub, "fsub")
_operation(operator.mul, "fmul")


def _spread(b: Any, scalar: Any) -> Any:
    one = b.insert_element(ir.Constant(_VECTOR, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    return b.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), 64), [0] * 64))


def _place(b: Any, args: Any) -> Any:
    return b.bitcast(b.gep(args[0], [args[1]]), _VECTOR.as_pointer())


def _copy(b: Any, source: Any, target: Any, low: Any, high: Any) -> None:
    source, target = (b.bitcast(pointer, _FLOAT.as_pointer()) for pointer in (source, target))
    with cgutils.for_range_slice(b, low, high, ir.IntType(64)(1)) as (i, _):
        b.store(b.load(b.gep(source, [i])), b.gep(target, [i]))


@_intrinsic
def at(typing: Any, array: Any, offset: Any) -> Any:
    """A bare pointer to element `offset` of a contiguous array: unlike an array it costs no reference count."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.gep(context.make_array(sig.args[0])(context, b, args[0]).data, [args[1]])

    return types.CPointer(array.dtype)(array, types.intp), build


@_intrinsic
def all_places(typing: Any, c: Any) -> Any:
    """c in all 64 places."""
    return _block(types.float32), lambda context, b, sig, args: _spread(b, args[0])


@_intrinsic
def signed(typing: Any, word: Any, c: Any) -> Any:
    """+c where the word's bit is 0, -c where it is 1."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.select(b.bitcast(args[0], _MASK), _spread(b, b.fneg(args[1])), _spread(b, args[1]))

    return _block(types.uint64, types.float32), build


@_intrinsic
def woven(typing: Any, halves: Any) -> Any:
    """Places 0, 32, 1, 33, ... of a block."""
    order = ir.Constant(ir.VectorType(ir.IntType(32), 64), [i // 2 + i % 2 * 32 for i in range(64)])
    return _block(_block), lambda context, b, sig, args: b.shuffle_vector(args[0], args[0], order)


@_intrinsic
def load(typing: Any, pointer: Any, start: Any) -> Any:
    """64 neighbours from `start` on."""
    return _block(_pointer, types.intp), lambda context, b, sig, args: b.load(_place(b, args), align=4)


@_intrinsic
def store(typing: Any, pointer: Any, start: Any, value: Any) -> Any:
    """Write a block from `start` on."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        b.store(args[2], _place(b, args), align=4)
        return context.get_dummy_value()

    return types.void(_pointer, types.intp, _block), build


@_intrinsic
def load_part(typing: Any, pointer: Any, start: Any, low: Any, high: Any) -> Any:
    """The block at `start`, of which places low to high - 1 are read and the others are zero."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        buffer = cgutils.alloca_once(b, _VECTOR)
        b.store(ir.Constant(_VECTOR, None), buffer)
        _copy(b, _place(b, args), buffer, args[2], args[3])
        return b.load(buffer)

    return _block(_pointer, types.intp, types.intp, types.intp), build


@_intrinsic
def store_part(typing: Any, pointer: Any, start: Any, low: Any, high: Any, value: Any) -> Any:
    """Write places low to high - 1 of the block at `start`."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        buffer = cgutils.alloca_once(b, _VECTOR)
        b.store(args[4], buffer)
        _copy(b, buffer, _place(b, args), args[2], args[3])
        return context.get_dummy_value()

    return types.void(_pointer, types.intp, types.intp, types.intp, _block), build
