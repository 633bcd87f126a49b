"""How the kernels of the block ends cut maps into blocks and programs: chosen by shape and layout.

The compile-time constants of a depthwise conv follow the shape of a map and the layout; one of
them, ``EXACT``, depends on the batch too. Program counts and strip lengths are not compile-time
constants.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

MULTIPROCESSORS = 132
"""Of an H100 or H200; for tensors on no GPU."""
REGISTERS = 65536
"""Per multiprocessor."""
FLAT_WARPS = 16
"""Of flat passes per multiprocessor."""
THREAD_ELEMENTS = 2
"""Channels per thread of a depthwise conv. In channels_last, a warp then loads 128 bytes in
bfloat16; 4 channels would save a seventh of the instructions per element but fit half as many
warps."""
FLAT_ELEMENTS = 4096
"""Elements per block of a flat pass, at 32 per thread."""
FLAT_BLOCKS = 16
"""The most blocks that a program of ``pixel_sums`` adds up for one sum."""
LONGEST_STRIP = 64
"""Steps; longer strips save nothing."""
SHORTEST_STRIP = 8
PROLOGUE_ELEMENTS = 64
"""Partial sums per thread that a prologue reads at once."""
MOST_ROWS = 64
"""Rows of partial sums that it reads at once."""


class Walk(NamedTuple):
    """How a depthwise conv walks over the maps."""

    grid: tuple[int, int]
    programs: int
    """Per channel block."""
    groups: int
    """Per sample: of neighbouring lines."""
    strips: int
    """Into which the steps are cut."""
    sizes: tuple[int, ...]
    """Arguments of a depthwise conv: C, lines, steps, tiles, programs, groups per sample and in
    total, strips and their length."""
    options: dict[str, Any]
    """Compile-time constants.

    ``FULL``: groups end where maps do; ``EXACT``: and blocks have no other remainder either;
    ``WIDE``: a group's lines are neighbours in memory and one access; ``STRIPS``: there may
    be more than one; ``ROWS`` of partial sums are read at once.
    """


class Flat(NamedTuple):
    """How a flat pass cuts the maps."""

    grid: tuple[int, int]
    programs: int
    blocks: int
    """Per sample."""
    options: dict[str, Any]
    """Compile-time constants; ``UNIT`` divides the pixels of a map in NCHW."""


class Plan(NamedTuple):
    """Sizes and blocks of one shape and layout."""

    sizes: tuple[int, int, int, int]
    pixels: int
    middle: int
    """A pixel in the middle."""
    count: float  # type: ignore[assignment]
    """Pixels of the whole batch."""
    lines: int
    """Lines of the depthwise convs: rows in channels_last, else columns."""
    steps: int
    """Columns in channels_last, else rows."""
    last: bool
    """Whether channels are the last dimension in memory."""
    flat: Flat
    chunk: int
    """Blocks per sum of ``pixel_sums``."""
    chunks: int
    """Sums per sample."""
    chunk_grid: tuple[int, int]
    walk: Walk
    """For depthwise convs that hold few values per line."""
    short_walk: Walk
    """For those that hold more."""
    ring_walk: Walk
    """For those that hold three steps of a map."""


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return triton.next_power_of_2(n)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many the device has."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def channels_are_last(x: Tensor) -> bool:
    """Whether a dense map is in channels_last; otherwise it is in NCHW."""
    return x.shape[1] > 1 and x.is_contiguous(memory_format=torch.channels_last)


def plan_of(x: Tensor) -> Plan:
    """The plan for maps like ``x``, dense in channels_last or NCHW."""
    return plan_for(*x.shape, channels_are_last(x), multiprocessors(x.device))


def aligned(sizes: Sequence[int]) -> list[int]:
    """Numbers of floats rounded up to 16 bytes."""
    return [triton.cdiv(size, 4) * 4 for size in sizes]


def buffer(device: torch.device, sizes: Sequence[int]) -> Tensor:
    """One allocation in float32 for :func:`aligned` sizes."""
    return torch.empty(sum(sizes), dtype=torch.float32, device=device)


def floats(device: torch.device, *sizes: int) -> tuple[Tensor, ...]:
    """Float32 vectors cut from one allocation, each at a multiple of 16 bytes."""
    rounded = aligned(sizes)
    return buffer(device, rounded).split_with_sizes(rounded)


@functools.lru_cache(maxsize=4096)
def variants(shape: tuple[int, ...], last: bool, sms: int) -> tuple[Any, ...]:
    """Compile-time constants that follow from a shape ``[B, C, H, W]`` and layout."""
    plan = plan_for(*shape, last, sms)
    parts = (plan.flat, plan.walk, plan.short_walk, plan.ring_walk)
    return tuple(tuple(part.options.items()) for part in parts)


def small_batch(shape: Sequence[int], last: bool, sms: int) -> int:
    """The smallest batch, 2 or more, that runs the same compiled variants as ``shape``."""
    batch, *rest = shape
    wanted = variants((batch, *rest), last, sms)
    return next((n for n in range(2, batch) if variants((n, *rest), last, sms) == wanted), batch)


def even_programs(items: int, most: int) -> int:
    """At most ``most`` programs over ``items``, with equally many each as far as possible."""
    return triton.cdiv(items, triton.cdiv(items, max(1, most)))


def least_padding(size: int, blocks: tuple[int, ...]) -> int:
    """The block that covers ``size`` with least waste, the first of equals."""
    return min(blocks, key=lambda block: triton.cdiv(size, block) * block)


@functools.lru_cache(maxsize=4096)
def plan_for(B: int, C: int, H: int, W: int, last: bool, sms: int) -> Plan:
    """See :class:`Plan`."""
    pixels = H * W
    flat = flat_blocks(B, C, pixels, last, sms)
    per_sample = triton.cdiv(4 * sms, flat.grid[1] * B)
    chunk = max(1, min(FLAT_BLOCKS, flat.blocks // per_sample))
    chunks = triton.cdiv(flat.blocks, chunk)
    chunk_programs = even_programs(B * chunks, flat_programs(flat.options, flat.grid[1], sms))
    lines, steps = (H, W) if last else (W, H)
    columns = (4,) if W % 4 == 0 else (2,)
    return Plan(
        (B, C, H, W), pixels, (H // 2) * W + W // 2, float(B * pixels), lines, steps, last,
        flat, chunk, chunks, (chunk_programs, flat.grid[1]),
        walk_blocks(B, C, lines, steps, last, sms, (7, 4) if last else columns, 128),
        walk_blocks(B, C, lines, steps, last, sms, (4,) if last else columns, 128),
        walk_blocks(B, C, lines, steps, last, sms, (4,) if last else columns, 168),
    )  # fmt: skip


def flat_programs(options: dict[str, Any], channel_blocks: int, sms: int) -> int:
    """Programs of a flat pass per channel block that the device runs at once."""
    return max(1, sms * FLAT_WARPS // options["num_warps"] // channel_blocks)


def flat_blocks(B: int, C: int, pixels: int, last: bool, sms: int) -> Flat:
    """Blocks of pixels and channels."""
    unit = 1 if last else math.gcd(pixels, 8)
    elements = FLAT_ELEMENTS
    if last:
        channels = least_padding(C, tuple(min(b, power_of_two(C)) for b in (128, 64, 32)))
        wide = min(elements // channels, power_of_two(pixels))
    else:
        if unit == 1:  # single values are loaded, and need more registers
            elements //= 2
        wide = min(least_padding(pixels, (256, 128, 64, 32)), power_of_two(pixels))
        channels = min(elements // wide, power_of_two(C))
    warps = max(1, 4 * wide * channels // elements)
    rows = prologue_rows(warps, channels)
    options = dict(
        BP=wide, BC=channels, LAST=last, UNIT=unit, ROWS=rows, num_warps=warps, num_stages=1
    )
    if torch.version.hip is None:
        options["maxnreg"] = REGISTERS // (32 * FLAT_WARPS)
    blocks, channel_blocks = triton.cdiv(pixels, wide), triton.cdiv(C, channels)
    programs = even_programs(B * blocks, flat_programs(options, channel_blocks, sms))
    return Flat((programs, channel_blocks), programs, blocks, options)


def prologue_rows(warps: int, channels: int) -> int:
    """Rows of pairs of partial sums that a program of ``warps`` warps reads at once."""
    return min(MOST_ROWS, max(1, PROLOGUE_ELEMENTS * 32 * warps // (2 * channels)))


def walk_blocks(
    B: int, C: int, lines: int, steps: int, last: bool, sms: int, choices: tuple[int, ...],
    registers: int,
) -> Walk:  # fmt: skip
    """Groups of lines and strips of steps, with little waste and enough programs.

    ``choices``: numbers of lines per group; more need fewer instructions and more ``registers``,
    the most per thread.
    """

    def work(count: int) -> int:  # a group's: its lines, and about one for their two neighbours
        return triton.cdiv(lines, count) * (count + 1)

    count = min(choices, key=work)
    threads = 256 if last and registers <= 128 else 128
    if last:
        channels = least_padding(C, tuple(min(b, power_of_two(C)) for b in (128, 64, 32)))
        groups = threads * THREAD_ELEMENTS // channels
    else:
        groups = 32
        channels = threads * THREAD_ELEMENTS // groups
    channel_blocks = triton.cdiv(C, channels)
    all_groups = B * triton.cdiv(lines, count)
    blocks = triton.cdiv(all_groups, groups)
    most = max(1, sms * (REGISTERS // (registers * threads)) // channel_blocks)
    # Few blocks: strips, but not too short, since each reads two steps of its neighbours.
    strips = min(most // blocks, steps // SHORTEST_STRIP)
    strips = max(1, strips, triton.cdiv(steps, LONGEST_STRIP))
    length = triton.cdiv(steps, strips)
    strips = triton.cdiv(steps, length)
    programs = even_programs(blocks * strips, most)
    full = lines % count == 0
    options = dict(
        LINES=count, GROUPS=groups, BC=channels, LAST=last, FULL=full, WIDE=full and not last,
        EXACT=full and all_groups % groups == 0 and C % channels == 0,
        STRIPS=steps >= 2 * SHORTEST_STRIP, ROWS=prologue_rows(threads // 32, channels),
        num_warps=threads // 32, num_stages=1,
    )  # fmt: skip
    if torch.version.hip is None:
        options["maxnreg"] = registers
    per_sample = triton.cdiv(lines, count)
    tiles = blocks * strips
    sizes = (C, lines, steps, tiles, programs, per_sample, all_groups, strips, length)
    return Walk((programs, channel_blocks), programs, per_sample, strips, sizes, options)
