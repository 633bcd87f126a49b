"""What a GPU would be given, read off without one: what kernels cost at ResNet-50's shapes.

    python tools/benchmark/kernel_report.py light base --nchw

Runs the launches of a block end on tensors of the device `meta`, compiles each kernel for sm_90 and
reads its machine code. A pass is bound by its bytes only while its instructions fit into the time
that the bytes take. An H200's 132 multiprocessors issue 4 warp instructions per clock each, so 14
instructions per thread take as long as moving one element of bfloat16: that is the `budget` of
`per_element`. Latency is not modelled; `spilled` and `warps_per_sm` hint at it.

Instructions are those of the last outermost loop with the loops inside it. Elements moved are
counted by argument: each map that blocks load or store is one.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime import jit

from mmrla.analysis.pages import markdown
from mmrla.ops.reference import BaseWeights, LightWeights, Norm

Row = dict[str, Any]
TARGET = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
STAGES = {56: (256, 3), 28: (512, 4), 14: (1024, 6), 7: (2048, 3)}
"""ResNet-50's channels and blocks by height."""
INSTRUCTIONS = 132 * 4 * 32 * 1.75e9
"""Thread instructions per second of an H200 under load."""
BANDWIDTH = 4.3e12
"""Bytes per second that an H200 copies, reads and writes together."""


class Launch(NamedTuple):
    """A launch that :func:`recorded` has kept from happening."""

    fn: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """List the launches inside, none of which happens."""
    found: list[Launch] = []
    real = jit.JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.append(Launch(self, grid, args, kwargs))

    jit.JITFunction.run = run
    try:
        yield found
    finally:
        jit.JITFunction.run = real


def compiled(launch: Launch) -> tuple[Any, str, str, dict[str, Any]]:
    """The kernel, its machine code, its resources (texts of cuobjdump), arguments by name."""
    fn, backend = launch.fn, make_backend(TARGET)
    binder = jit.create_function_from_signature(fn.signature, fn.params, backend)
    bound, special, _ = binder(*launch.args, **launch.kwargs)
    extra = {k: v for k, v in launch.kwargs.items() if k not in fn.arg_names}
    options, *parts = fn._pack_args(backend, extra, bound, special, None)
    kernel = triton.compile(ASTSource(fn, *parts), target=TARGET, options=vars(options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        run = [CUOBJDUMP, "-sass", "-res-usage", file.name]
        text = subprocess.run(run, text=True, check=True, capture_output=True)
    return kernel, text.stdout, text.stdout + text.stderr, bound


class Loop:
    """Instructions from ``low`` up to ``high``, and the loops among them."""

    def __init__(self, low: int, high: int):
        self.low, self.high = low, high
        self.inner: list[Loop] = []

    def cost(self, trips: Sequence[int]) -> int:
        """Instructions of one round; each loop k levels inside runs ``trips[k]`` times."""
        times = trips[0] if trips else 1
        return self.high - self.low + sum(
            times * loop.cost(trips[1:]) - (loop.high - loop.low) for loop in self.inner
        )  # fmt: skip


def main_loop(code: list[tuple[int, str]]) -> Loop:
    """The last outermost loop, or all of the code if there is none."""
    at = {address: k for k, (address, _) in enumerate(code)}
    ends: dict[int, int] = {}
    for k, (address, text) in enumerate(code):
        target = re.search(r"\bBRA.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            ends[at[int(target[1], 16)]] = k + 1
    root = Loop(0, len(code))
    for low, high in sorted(ends.items()):
        parent = root
        while parent.inner and parent.inner[-1].high >= high:
            parent = parent.inner[-1]
        parent.inner.append(Loop(low, high))
    return root.inner[-1] if root.inner else root


def maps_moved(ttir: str, layers: int) -> int:
    """How many maps blocks load and store; a table of addresses has ``layers`` of them."""
    root: dict[str, str] = {}
    moved: set[tuple[str, str]] = set()
    for line in ttir.splitlines():
        for name, first in re.findall(r"(%[\w-]+) = (%[\w-]+)[,)]", line):  # what loops carry
            root[name] = root.get(first, first)
        found = re.match(r"\s*(?:(%[\w-]+) = )?(tt\.\w+) (%[\w-]+).* : (\S+)", line)
        if found:
            name, op, first, kind = found.groups()
            if op in ("tt.load", "tt.store") and re.match(r"tensor<(\d+x){2,3}!tt.ptr<b?f16", kind):
                moved.add((op, root.get(first, first)))
            elif name:
                root[name] = "table" if op == "tt.int_to_ptr" else root.get(first, first)
    return sum(layers if name == "table" else 1 for _, name in moved)


def report(launch: Launch, size: int) -> Row:
    """A row for a launch over maps of ``size`` elements of 16 bits."""
    kernel, text, resources, bound = compiled(launch)
    code = [(int(a, 16), s) for a, s in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text)]
    loop = main_loop(code)

    def widths(op: str) -> str:
        found = [s for _, s in code[loop.low : loop.high] if re.search(rf"\b{op}\b", s)]
        bits = [re.search(r"\.[US]?(128|64|16|8)\b", s) for s in found]
        names = [b[1] if b else "32" for b in bits]
        return " ".join(f"{names.count(w)}x{w}" for w in sorted(set(names), key=int))

    threads = 32 * kernel.metadata.num_warps
    registers, stack = (
        int(re.search(rf"{name}:(\d+)", resources)[1])  # type: ignore[index]
        for name in ("REG", "STACK")
    )
    row: Row = dict(
        kernel=launch.fn.__name__, programs="x".join(map(str, launch.grid)), registers=registers,
        spilled=stack, warps_per_sm=min(65536 // (registers * threads), 32) * threads // 32,
        loads=widths("LDG"), stores=widths("STG"),
    )  # fmt: skip
    layers = bound.get("later", bound.get("t", 1))
    if "tiles" in bound:  # rounds over tiles, then loops over steps, then layers
        rounds, trips = bound["tiles"], [bound["length"] + 2, layers]
    elif "chunk" in bound:  # rounds over chunks, then blocks, then layers
        rounds, trips = bound["B"] * bound["chunks"], [bound["chunk"], layers]
    elif "BP" in bound:
        rounds, trips = bound["B"] * triton.cdiv(bound["HW"], bound["BP"]), [layers]
    else:  # not a pass over maps
        names = ("per_element", "budget", "instructions_ms", "bytes_ms")
        return row | dict.fromkeys(names)
    moved = maps_moved(kernel.asm["ttir"], layers)
    executed = loop.cost(trips) * threads * rounds * launch.grid[1]
    return row | dict(
        per_element=round(executed / size, 1), budget=14 * moved,
        instructions_ms=round(1e3 * executed / INSTRUCTIONS, 3),
        bytes_ms=round(1e3 * moved * size * 2 / BANDWIDTH, 3),
    )  # fmt: skip


def block_launches(
    kind: str, height: int, batch: int, nchw: bool = False, training: bool = True,
    frozen: bool = False,
) -> list[list[Launch]]:  # fmt: skip
    """The launches of each block of a stage, in bfloat16."""
    channels, blocks = STAGES[height]
    layout = torch.contiguous_format if nchw else torch.channels_last
    shape = (batch, channels, height, height)
    maps = torch.empty(shape, device="meta", dtype=torch.bfloat16, memory_format=layout)

    def draw(*size: int) -> torch.Tensor:
        return torch.empty(size, device="meta")

    norm = Norm(*(draw(channels) for _ in range(4)), 0.1, 1e-5, training and not frozen)
    taps = (draw(1, 1, 5), draw(1, 1, 5), draw(channels, 1, 3, 3))
    launches, keys, values = [], [], []
    for later in reversed(range(blocks)):
        with recorded() as found:
            if kind == "light":
                from mmrla.ops.kernels_light import light_backward, light_forward

                given = (norm, LightWeights(*taps, draw(channels), 32), norm, None)
                saved = light_forward(maps, maps, *given, training)[-1]
                if training:
                    light_backward(maps, maps, maps, *given, saved)
            else:
                from mmrla.ops.kernels_base import base_backward, base_forward

                given = (norm, BaseWeights(*taps, 32), norm, None)
                *_, key, value, saved = base_forward(maps, maps, *given, keys, values, training)
                keys, values = [*keys, key], [*values, value]
                left = [(maps, draw(batch, channels))] * later
                if training:
                    base_backward(maps, None, maps, maps, *given, keys, values, left, saved)
        launches.append(found)
    return launches


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Cost of the kernels at ResNet-50's shapes.")
    parser.add_argument("kinds", nargs="*", default=["light", "base"], help="light, base, or both")
    parser.add_argument("--nchw", action="store_true", help="instead of channels_last")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--inference", action="store_true", help="instead of a training step")
    parser.add_argument("--frozen", action="store_true", help="norms that training leaves alone")
    parser.add_argument("--heights", type=int, nargs="+", default=list(STAGES), choices=STAGES)
    args = parser.parse_args(argv)
    for kind in args.kinds:
        totals: dict[str, list[float]] = {}
        for height in args.heights:
            size = args.batch * STAGES[height][0] * height**2
            blocks = block_launches(
                kind, height, args.batch, args.nchw, not args.inference, args.frozen
            )
            # MRLA-light's blocks are all alike.
            different = blocks[:1] if kind == "light" else blocks
            reports = [[report(launch, size) for launch in block] for block in different]
            reports *= len(blocks) // len(different)
            print(f"\n{kind}, the last of {len(blocks)} blocks at {height} x {height}:\n")
            print(markdown(reports[-1]), flush=True)
            for row in itertools.chain(*reports):
                total = totals.setdefault(str(row["kernel"]), [0.0, 0.0])
                total[0] += row["instructions_ms"] or 0.0
                total[1] += row["bytes_ms"] or 0.0
        print(f"\n{kind}, all blocks, ms by instructions / by bytes:\n")
        for name, (instructions, moved) in totals.items():
            print(f"- {name}: {instructions:.2f} / {moved:.2f}")
        by_instructions, by_bytes = map(sum, zip(*totals.values(), strict=True))
        longer = sum(map(max, totals.values()))
        print(f"- in all: {by_instructions:.1f} / {by_bytes:.1f}, the longer of both {longer:.1f}")


if __name__ == "__main__":
    main()
