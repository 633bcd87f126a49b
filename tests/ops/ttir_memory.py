"""Tensors' storages as kernels see them, and the checks of what the programs of a launch touch."""

from __future__ import annotations

import bisect
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tests.ops.ttir_numpy import DTYPES, SIZES, Pointer, full, narrow_bf16, widen_bf16

MOST_UNMARKED = 2**22
VIEWS = {"bf16": np.uint16, "i1": np.bool_}


class KernelFault(RuntimeError):
    """A kernel does what no kernel may do; the message says which, where and what."""


class Memory:
    """One storage, and which steps of this launch wrote and read each of its elements."""

    def __init__(self, storage: torch.UntypedStorage, name: str):
        self.name, self.base, self.nbytes = name, storage.data_ptr(), storage.nbytes()
        self.reference = StorageWeakRef(storage)
        self.lost = ""
        self.launch = -1

    def open(self, launch: int) -> None:
        """Make the bytes accessible, and forget what earlier launches did."""
        if self.launch == launch:
            return
        self.launch = launch
        storage = torch.UntypedStorage._new_with_weak_ptr(self.reference.cdata)
        self.bytes = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        self.views: dict[str, np.ndarray] = {}
        self.unit = 0
        self.written = False
        self.unseen: list[tuple[int, int, Any, Any]] = []  # loads before any store
        self.unmarked = 0

    def close(self) -> None:
        self.launch = -1
        self.bytes = self.views = self.writer = self.reader = self.unseen = None

    def view(self, kind: str) -> np.ndarray:
        if kind not in self.views:
            size = SIZES[kind]
            whole = self.bytes[: self.nbytes // size * size]
            self.views[kind] = whole.view(VIEWS.get(kind, DTYPES[kind]))
        return self.views[kind]

    def cells(self, at: Any, size: int) -> Any:
        """Where the marks of elements are; there is a mark for every ``unit`` bytes."""
        if not self.unit:
            self.unit = size
            self.writer = np.full(self.nbytes // size + 1, -1)
            self.reader = self.writer.copy()
        if size < self.unit:
            self.writer, self.reader = (
                np.repeat(marks, self.unit // size) for marks in (self.writer, self.reader)
            )
            self.unit = size
        if size == self.unit:
            return at
        parts = size // self.unit
        return (np.reshape(at, -1)[:, None] * parts + np.arange(parts)).reshape(-1)


class Nowhere:
    """What an integer that is no tensor's address points to; a fault once it is used."""

    def __init__(self, lost: str):
        self.lost, self.base = lost, 0


class Space:
    """The storages that launches of one context have seen, by address."""

    def __init__(self, strict: bool, carries: bool):
        self.strict, self.carries = strict, carries
        self.kernels: Counter[str] = Counter()
        self.programs: Counter[str] = Counter()
        self.known: dict[int, Memory] = {}
        self.bases: list[int] = []
        self.step = 0

    def memory_of(self, tensor: torch.Tensor, name: str) -> Memory:
        if tensor.device.type != "cpu":
            raise KernelFault(f"{name} is on the device {tensor.device}, not on the CPU")
        storage = tensor.untyped_storage()
        base, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        memory = self.known.get(base)
        if memory is None or memory.reference.expired() or memory.nbytes != storage.nbytes():
            # Storages that were freed make room for this one.
            low = bisect.bisect_left(self.bases, base)
            high = bisect.bisect_left(self.bases, max(end, base + 1))
            for old in self.bases[low:high]:
                del self.known[old]
            self.bases[low:high] = [base]
            memory = self.known[base] = Memory(storage, name)
        return memory

    def find(self, address: int) -> Memory | Nowhere:
        k = bisect.bisect_right(self.bases, address) - 1
        memory = self.known[self.bases[k]] if k >= 0 else None
        if memory is None or not memory.base <= address < memory.base + memory.nbytes:
            return Nowhere(f"address {address:#x}, which is no known tensor's")
        if memory.reference.expired():
            return Nowhere(f"address {address:#x} of {memory.name}, which has been freed")
        return memory


class Run:
    """One launch: the program that runs, and the checks of what it touches."""

    def __init__(self, space: Space, kernel: Any, name: str, grid: Sequence[int]):
        self.space, self.kernel, self.name = space, kernel, name
        self.grid = (*(int(n) for n in grid), 1, 1)[:3]
        self.program = (0, 0, 0)
        self.started = self.launch = space.step = space.step + 1
        self.opened: list[Memory] = []

    def fault(self, what: str) -> None:
        frame = sys._getframe()
        while frame.f_code.co_filename != self.kernel.filename and frame.f_back:
            frame = frame.f_back
        origins = self.kernel.origins
        line = origins[frame.f_lineno - 1] if frame.f_back else ""
        raise KernelFault(f"{self.name}, program {self.program}, {line or 'launch'}: {what}")

    def enter(self, memory: Memory | Nowhere) -> None:
        if isinstance(memory, Memory) and memory.launch != self.launch:
            memory.open(self.launch)
            self.opened.append(memory)

    def programs(self) -> Iterator[None]:
        for k in range(math.prod(self.grid)):
            x, y, _ = self.grid
            self.program = (k % x, k // x % y, k // (x * y))
            self.space.step += 1
            self.started = self.space.step
            yield

    def barrier(self) -> None:
        self.space.step += 1

    def address(self, kind: str, pointer: Pointer) -> Any:
        return np.int64(pointer.memory.base) + pointer.at * np.int64(SIZES[kind])

    def pointer(self, kind: str, address: Any) -> Pointer:
        found = {id(m): m for a in np.unique(address) for m in [self.space.find(int(a))]}
        if len(found) > 1:
            raise NotImplementedError("a block of pointers to several tensors")
        memory = found.popitem()[1]
        self.enter(memory)
        if np.any((address - memory.base) % SIZES[kind]):
            self.fault(f"a pointer to {kind} is not aligned to its size")
        return Pointer(memory, (address - memory.base) // SIZES[kind])

    def inside(self, kind: str, memory: Memory, at: Any, mask: Any = None) -> None:
        size = memory.nbytes // SIZES[kind] if not memory.lost else 0
        wrong = at.view(np.uint64) >= size  # negative ones are huge
        if mask is not None:
            wrong = wrong & mask
        if wrong.any():
            if memory.lost:
                self.fault(f"uses {memory.lost}")
            bad = np.broadcast_to(at, wrong.shape)[wrong].flat[0]
            self.fault(f"element {bad} of {memory.name}, whose storage has {size}")

    def load(self, kind: str, pointer: Pointer, mask: Any = None, other: Any = None) -> Any:
        memory, at = pointer.memory, pointer.at
        if mask is None or mask.all():
            self.inside(kind, memory, at)
            self.note_load(memory, SIZES[kind], at)
            value = memory.view(kind)[at]
            return widen_bf16(value) if kind == "bf16" else value
        dtype = np.dtype(DTYPES[kind])
        if other is None:
            other = dtype.type("nan" if dtype.kind == "f" else 0)
        if not mask.any():
            return np.broadcast_to(other, np.broadcast_shapes(at.shape, mask.shape))[()]
        self.inside(kind, memory, at, mask)
        self.note_load(memory, SIZES[kind], at, mask)
        value = memory.view(kind)[np.where(mask, at, 0)]
        return np.where(mask, widen_bf16(value) if kind == "bf16" else value, other)[()]

    def note_load(self, memory: Memory, size: int, at: Any, mask: Any = None) -> None:
        if not memory.written:  # most tensors are never written, and need no marks
            memory.unseen.append((self.space.step, size, at, mask))
            memory.unmarked += at.size
            if memory.unmarked > MOST_UNMARKED:
                self.mark_unseen(memory)
            return
        cells = memory.cells(self.chosen(at, mask), size)
        writer = memory.writer[cells]
        if np.any((writer >= self.launch) & (writer < self.started)):
            self.fault(f"reads {memory.name} where another program of this launch writes")
        if self.space.strict and np.any(writer == self.space.step):
            self.fault(f"reads back {memory.name} where it wrote, without a barrier")
        self.mark_reader(memory, cells, self.space.step)

    @staticmethod
    def chosen(at: Any, mask: Any) -> Any:
        """The elements that a mask lets through."""
        if mask is None:
            return at
        at, mask = np.broadcast_arrays(at, mask)
        return at[mask]

    def mark_reader(self, memory: Memory, cells: Any, step: int) -> None:
        reader = memory.reader[cells]
        memory.reader[cells] = np.where(reader < self.launch, step, reader)

    def mark_unseen(self, memory: Memory) -> None:
        for step, size, at, mask in memory.unseen:
            self.mark_reader(memory, memory.cells(self.chosen(at, mask), size), step)
        memory.unseen.clear()
        memory.unmarked = 0

    def claim(self, memory: Memory, size: int, at: Any) -> Any:
        """Mark elements as written by this program; returns the marks' places."""
        cells = memory.cells(at, size)
        if not memory.written:
            memory.written = True
            self.mark_unseen(memory)
            cells = memory.cells(at, size)
        reader = memory.reader[cells]
        if np.any((reader >= self.launch) & (reader < self.started)):
            self.fault(f"writes {memory.name} where another program of this launch reads")
        return cells

    def store(
        self, kind: str, shape: tuple[int, ...], pointer: Pointer, value: Any, mask: Any = None
    ) -> None:
        memory = pointer.memory
        at, value = full(pointer.at, shape), full(value, shape)
        if mask is not None and not mask.all():
            used = full(mask, shape)
            if not used.any():
                return
            at, value = at[used], value[used]
        self.inside(kind, memory, at)
        cells = self.claim(memory, SIZES[kind], at)
        writer = memory.writer[cells]
        if np.any((writer >= self.launch) & (writer < self.started)):
            self.fault(f"writes {memory.name} where another program of this launch wrote")
        view = memory.view(kind)
        bits = np.asarray(narrow_bf16(value) if kind == "bf16" else value).astype(view.dtype)
        view[at] = bits
        integers = f"u{bits.itemsize}"
        if np.any(np.asarray(view[at]).view(integers) != bits.view(integers)):
            self.fault(f"stores different values to one element of {memory.name}")
        memory.writer[cells] = self.space.step
