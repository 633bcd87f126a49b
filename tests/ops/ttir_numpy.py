"""Numpy functions that a translated kernel calls; see :mod:`tests.ops.ttir_translate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

DTYPES: dict[str, type] = {
    "i1": np.bool_, "i8": np.int8, "i16": np.int16, "i32": np.int32, "i64": np.int64,
    "f16": np.float16, "bf16": np.float32, "f32": np.float32, "f64": np.float64,
    "index": np.int64,
}  # fmt: skip
SIZES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8}
UNSIGNED = {"b1": np.uint8, "i1": np.uint8, "i2": np.uint16, "i4": np.uint32, "i8": np.uint64}


class Pointer:
    """Elements ``at`` (an integer or an array of them) of one tensor's storage."""

    __slots__ = ("at", "memory")

    def __init__(self, memory: Any, at: Any):
        self.memory, self.at = memory, at


# What the translated lines call --------------------------------------------------------------


def _on_indices(function: Callable) -> Callable:
    def apply(x: Any, *args: Any) -> Any:
        if isinstance(x, Pointer):
            return Pointer(x.memory, function(x.at, *args))
        return function(x, *args)

    return apply


full = _on_indices(lambda x, shape: x if np.shape(x) == shape else np.broadcast_to(x, shape))
reshape = _on_indices(lambda x, before, after: np.reshape(np.broadcast_to(x, before), after))
expand = _on_indices(lambda x, axis: np.expand_dims(x, axis) if np.ndim(x) else x)
trans = _on_indices(lambda x, order: np.transpose(x, order) if np.ndim(x) else x)
first = _on_indices(lambda x: np.reshape(x, -1)[0])


def to_bf16(x: Any) -> Any:
    """Round float32 to the nearest bfloat16, ties to even."""
    x = np.asarray(x, np.float32)
    bits = x.view(np.uint32)
    bits = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), x, bits.view(np.float32))[()]


def widen_bf16(bits: Any) -> Any:
    """float32 of bfloat16's 16 bits."""
    return (np.asarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32)[()]


def narrow_bf16(x: Any) -> Any:
    """The 16 bits of values that :func:`to_bf16` has rounded."""
    return (np.asarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def unsigned(x: Any) -> Any:
    return x.astype(UNSIGNED[x.dtype.kind + str(x.dtype.itemsize)])


def _checked(operation: np.ufunc) -> Callable:
    """32-bit integer arithmetic that reports what wraps around."""

    def apply(run: Any, a: Any, b: Any) -> Any:
        out = operation(a, b)
        if (operation(a, b, dtype=np.int64) != out).any():
            run.fault("a 32-bit integer overflows")
        return out

    return apply


add32, sub32, mul32 = _checked(np.add), _checked(np.subtract), _checked(np.multiply)


def divide(run: Any, a: Any, b: Any, remainder: bool, signed: bool = True) -> Any:
    """Integer division towards zero, and its remainder, which has the sign of ``a``."""
    if not np.all(b):
        run.fault("an integer is divided by zero")
    if not signed:
        a, b = unsigned(a), unsigned(b)
    rest = np.fmod(a, b)
    return rest if remainder else (a - rest) // b


def select(condition: Any, a: Any, b: Any) -> Any:
    if not isinstance(a, Pointer):
        return np.where(condition, a, b)[()]
    if np.ndim(condition) == 0:
        return a if condition else b
    if a.memory is not b.memory:
        raise NotImplementedError("a block of pointers to two tensors")
    return Pointer(a.memory, np.where(condition, a.at, b.at))


def steps(low: Any, high: Any, step: Any) -> Iterator[Any]:
    kind = type(low)
    for k in range(int(low), int(high), int(step)):
        yield kind(k)


def fold(function: Callable, axis: int, *xs: Any) -> list[Any]:
    """``tt.reduce`` by any function, from first to last."""
    acc = [np.take(x, 0, axis) for x in xs]
    for k in range(1, xs[0].shape[axis]):
        found = function(*acc, *[np.take(x, k, axis) for x in xs])
        acc = list(found) if isinstance(found, tuple) else [found]
    return acc
