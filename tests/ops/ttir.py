"""Runs what Triton's compiler makes of a kernel, on a CPU, and watches its memory.

Triton's interpreter runs the Python of a kernel, a GPU what the compiler makes of it, and the two
may differ: a loop may not carry a name, integers have types, arguments are specialised. This module
compiles a kernel to TTIR for sm_90 as a launch on a GPU would, translates that to numpy
(:mod:`tests.ops.ttir_translate`) and runs every program of the grid on the tensors of the call::

    with launches_on_cpu() as log:
        kernel[grid](x, y, n, BLOCK=64)
    log.kernels, log.programs  # Counters by the kernel's name

A :class:`KernelFault` names the kernel, the program and the line if

- an access lies outside its tensor's storage, or an address belongs to no tensor any more,
- a 32-bit integer overflows or an integer is divided by zero,
- two programs write one element, or one reads what another writes in the same launch,
- lanes store different values to one element,
- with ``strict``, a program loads what it stored without a barrier in between,
- a name is rebound in a loop that does not carry it.

Masked loads without ``other`` give NaN, since a device may give anything. Not shown: whatever comes
after TTIR (layouts, shared memory, ptxas), and time. Not modelled: early returns, calls that are
not inlined, tensor descriptors, atomics, dots, scans, gathers, while loops: no kernel has them.

Tests skip if this module raises ImportError: without Triton, with another release of it than this
module knows, or if Triton interprets kernels in this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, code_generator
from triton.compiler.compiler import make_backend
from triton.runtime import jit
from triton.runtime.cache import get_cache_manager

from tests.ops import ttir_numpy
from tests.ops.ttir_memory import KernelFault, Run, Space
from tests.ops.ttir_numpy import DTYPES, Pointer, to_bf16
from tests.ops.ttir_translate import Translator

if not hasattr(jit.JITFunction, "_pack_args"):
    raise ImportError("this Triton compiles by other means than 3.6")
if knobs.runtime.interpret:
    raise ImportError("TRITON_INTERPRET is set: there is nothing to compile")

TARGET = GPUTarget("cuda", 90, 32)
MOST_PROGRAMS = 200_000


# Compilation -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One specialisation of a kernel: TTIR, Python source and function, argument types.

    ``dropped`` has a message for each name that a loop rebinds but does not carry.
    """

    text: str
    source: str
    function: Callable[..., None]
    types: list[str]
    origins: list[str]
    filename: str
    dropped: list[str]


_CHECKS = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # cached text has their results
_compiled: dict[str, Compiled] = {}
_binders: dict[Any, Callable] = {}


@contextlib.contextmanager
def _watching_carries() -> Iterator[list[str]]:
    """Notice names that a loop's body rebinds though the front end does not carry them.

    The front end visits a body twice. It carries the names whose values differ after the first
    visit, in which two names may hold one and the same value. A name that differs only after the
    second visit, the one that counts, keeps its first value in every step.
    """
    dropped: list[str] = []
    loops: dict[int, tuple[Any, list[str]]] = {}
    generator, region = code_generator.CodeGenerator, code_generator.enter_sub_region
    find, leave = generator._find_carries, region.__exit__
    flat = lambda value: code_generator.flatten_values_to_ir([value])  # noqa: E731

    def _find_carries(self: Any, node: Any, liveins: dict, ignore: Any = frozenset()) -> Any:
        count = len(dropped)
        found = find(self, node, liveins, ignore)
        del dropped[count:]  # of loops inside, in the first visit
        loops[id(liveins)] = (node, [*found[0], *ignore])
        return found

    def __exit__(self: Any, *args: Any) -> Any:
        node, carried = loops.pop(id(self.liveins), (None, []))
        scope = self.generator.lscope
        for name, value in self.liveins.items() if node and args[0] is None else ():
            if name in carried or not code_generator._is_triton_value(value):
                continue
            if flat(value) != flat(scope.get(name, value)):
                file = Path(self.generator.file_name).name
                line = self.generator.begin_line + node.lineno
                dropped.append(
                    f"`{name}` is rebound in the loop at {file}:{line} but not carried, since "
                    "another name holds the same tensor before the loop; give it its own"
                )
        return leave(self, *args)

    generator._find_carries, region.__exit__ = _find_carries, __exit__
    try:
        yield dropped
    finally:
        generator._find_carries, region.__exit__ = find, leave


def _leaves(values: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Any]]:
    for k, value in enumerate(values):
        if isinstance(value, tuple):
            yield from _leaves(value, (*path, k))
        else:
            yield (*path, k), value


def _bind(fn: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[dict, tuple, Any]:
    backend = make_backend(TARGET)
    if fn not in _binders:
        _binders[fn] = jit.create_function_from_signature(fn.signature, fn.params, backend)
    bound, special, options = _binders[fn](*args, **kwargs)
    extra = {k: v for k, v in kwargs.items() if k not in fn.arg_names}
    return bound, fn._pack_args(backend, extra, bound, special, options), backend


def compile_ttir(fn: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Compiled:
    """The kernel as a launch with these arguments on a GPU of sm_90 would compile it.

    Args:
        fn: a function decorated with ``triton.jit``.
        args: positional arguments of the launch; tensors may be on any device.
        kwargs: keyword arguments, compiler options such as ``num_warps`` included.

    Raises:
        NotImplementedError: the kernel uses what the translation does not model.
    """
    _, (options, signature, constants, attributes), backend = _bind(fn, args, kwargs)
    parts = (_CHECKS, triton.__version__, fn.cache_key, signature, constants, attributes, options)
    key = hashlib.sha256(repr(parts).encode()).hexdigest()
    if key in _compiled:
        return _compiled[key]
    # Triton's own cache spares the next process the compilation, most of a test's time.
    cache, file = get_cache_manager(key), f"{fn.__name__}.checked.ttir"
    found = cache.get_file(file)
    if found:
        text = Path(found).read_text()
    else:
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        source = ASTSource(fn, signature, constants, attributes)
        with _watching_carries() as dropped:
            module = source.make_ir(
                TARGET, options, backend.get_codegen_implementation(options),
                backend.get_module_map(), context,
            )  # fmt: skip
        backend.make_ttir(module, {}, options, TARGET.arch)
        text = "".join(f"// dropped: {d}\n" for d in dict.fromkeys(dropped)) + module.str()
        cache.put(text, file, binary=False)
    code = Translator(text)
    filename = f"<ttir of {fn.__name__} {key[:8]}>"
    space: dict[str, Any] = {**vars(ttir_numpy), **code.constants}
    exec(compile(code.source, filename, "exec"), space)
    dropped = [d[12:] for d in text.splitlines() if d.startswith("// dropped: ")]
    compiled = Compiled(
        text, code.source, space["kernel"], code.types, code.origins, filename, dropped
    )
    return _compiled.setdefault(key, compiled)


# Launches --------------------------------------------------------------------------------------


def _value(run: Run, name: str, kind: str, value: Any) -> Any:
    if not kind.startswith("*"):
        return to_bf16(value) if kind == "bf16" else DTYPES[kind](value)
    memory = run.space.memory_of(value, name)
    run.enter(memory)
    return Pointer(memory, np.int64(value.storage_offset()))


def _launch(space: Space, fn: Any, grid: Any, args: Sequence[Any], kwargs: Any) -> None:
    bound, (_, _, constants, _), _ = _bind(fn, args, kwargs)
    kernel = compile_ttir(fn, args, kwargs)
    if kernel.dropped and space.carries:
        raise KernelFault(f"{fn.__name__}: {'; '.join(kernel.dropped)}")
    run = Run(space, kernel, fn.__name__, grid(bound) if callable(grid) else grid)
    programs = math.prod(run.grid)
    if programs > MOST_PROGRAMS:
        raise KernelFault(f"{fn.__name__}: {programs} programs are too many to run on a CPU")
    names = list(bound)
    leaves = [leaf for leaf in _leaves(bound.values()) if leaf[0] not in constants]
    try:
        with np.errstate(all="ignore"):
            values = [
                _value(run, names[path[0]], kind, value)
                for kind, (path, value) in zip(kernel.types, leaves, strict=True)
            ]
            for _ in run.programs():
                kernel.function(run, *values)
    finally:
        for memory in run.opened:
            memory.close()
    space.kernels[fn.__name__] += 1
    space.programs[fn.__name__] += programs


@contextlib.contextmanager
def launches_on_cpu(strict: bool = False, carries: bool = True) -> Iterator[Space]:
    """Launches of Triton kernels inside run on the CPU, on tensors of the CPU.

    Args:
        strict: loads of what the same program stored are faults, unless a barrier is in between.
        carries: names that a loop rebinds and does not carry are faults; otherwise the kernel runs
            and gives what a GPU would.

    Yields:
        A log with the counters ``kernels`` (launches) and ``programs``, by the kernel's name.

    Raises:
        KernelFault: by a launch inside, see the module's head.
    """
    space, real = Space(strict, carries), jit.JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if warmup:
            compile_ttir(self, args, kwargs)
        else:
            _launch(space, self, grid, args, kwargs)

    jit.JITFunction.run = run
    try:
        yield space
    finally:
        jit.JITFunction.run = real


# Views, allocations, and what this runner itself does to tensors of the CPU.
FREE = ("empty", "split", "view", "slice", "select", "as_strided", "detach", "alias", "expand",
        "unsqueeze", "unbind", "set_", "promote_types")  # fmt: skip


class DeviceOperations(TorchDispatchMode):
    """Lists what is neither a view nor an allocation. One operation may be several launches."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if not any(word in func.__name__ for word in FREE):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))
