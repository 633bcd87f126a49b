"""Kernels of MRLA-base's forward: value, softmax over the layers, retrieval, output."""

# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import triton
import triton.language as tl

from mmrla.ops.kernels import (
    FACTOR,
    NAN,
    OFFSET,
    PIVOT,
    UNSPECIALISED,
    finish_norm,
    over_channels,
    pivot_of,
    pixel_block,
    sum_places,
)
from mmrla.ops.kernels_depthwise import (
    head_block,
    load_taps,
    load_y,
    query_key,
    spread,
    store_group,
    tile_of,
    zeros,
)

ADDRESSES = tl.constexpr(8)
"""How many entries one launch writes into each table of addresses."""

WALK = ("lines", "steps", "tiles", "per_sample", "all_groups", "strips", "length")
LAYERS = ("t", "heads", "D", "maps", "vectors", "more_maps", "more_vectors", "capacity", "first")
VARYING = (*UNSPECIALISED, *WALK, *LAYERS)
"""Integers and addresses whose divisibility buys nothing: one variant of a kernel for all."""


@triton.jit
def map_at(table, n, like, ALIGNED: tl.constexpr):
    """Entry n of a table of addresses as a pointer like ``like``.

    ``ALIGNED``: how many bytes loads may take at once, 8 or 16; addresses are multiples of 16.
    """
    return tl.multiple_of(tl.load(table + n).to(like.dtype), ALIGNED)


@triton.jit
def vector_at(table, n, like):
    """As :func:`map_at`, for vectors of float32."""
    return tl.load(table + n).to(like.dtype)


@triton.jit
def fill(table, first, tensors):
    """Writes the addresses of some tensors into a table, from entry ``first`` on."""
    for k in tl.static_range(ADDRESSES):
        tl.store(table + first + k, tensors[k].to(tl.int64, bitcast=True))


@triton.jit(do_not_specialize=VARYING)
def fill_tables(table, capacity, first, maps, vectors, more_maps, more_vectors):
    """Writes addresses into the rows of ``table``, each of ``capacity``, from entry ``first`` on.

    Loops over layers find their tensors there at run time, so that no kernel is compiled per number
    of layers, and nothing is copied from the host.
    """
    fill(table, first, maps)
    fill(table + capacity, first, vectors)
    if more_maps is not None:
        fill(table + 2 * capacity, first, more_maps)
        fill(table + 3 * capacity, first, more_vectors)


@triton.jit
def head_weights(attention, layer, sample, B, heads, c, D, kept, LAST: tl.constexpr):
    """One layer's softmax weights of a sample, per channel, to broadcast over a block."""
    at = (layer * B + sample) * heads + over_channels(c // D, LAST)
    return tl.load(attention + at, over_channels(kept, LAST), 0.0)


@triton.jit
def use_values(
    done, y, value, at, step_stride, line_stride, line, lines, ok, total,
    LINES: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Stores the values of one step, and adds the next step's lines of y to ``total``."""
    store_group(value, done, at - step_stride, line_stride, line, lines, ok, LINES, FULL, WIDE)
    return add_lines(total, y, LINES)


@triton.jit
def add_lines(total, y, LINES: tl.constexpr):
    """``total`` plus lines 0 ... LINES - 1 of y, which is 0 outside the map."""
    for j in tl.static_range(LINES):
        total += y[j + 1]
    return total


@triton.jit(do_not_specialize=VARYING)
def make_value(
    z, s, value, sums, part, coefficients, weight, bias, running_mean, running_var, taps,
    table, capacity, maps, vectors, middle, rows, count, momentum, eps,
    C, lines, steps, tiles, programs, per_sample, all_groups, strips, length,
    BATCH: tl.constexpr, LINES: tl.constexpr, GROUPS: tl.constexpr, BC: tl.constexpr,
    LAST: tl.constexpr, EXACT: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr,
    STRIPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The layer's value, and the sums of y for query and key: reads z and s, writes V (3 N).

    Finishes the first norm's statistics from ``part``, stores its coefficients and moves its
    running statistics. Writes ``sums``, one row ``[C]`` per group and strip, and the last entries
    of the tables of values and keys.
    """
    program = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    kept = c < C
    if program == 0 and tl.program_id(1) == 0:
        fill(table, capacity - ADDRESSES, maps)
        fill(table, 2 * capacity - ADDRESSES, vectors)
    pivot = tl.zeros((BC,), tl.float32)
    if BATCH:
        pivot = pivot_of(z, middle, lines * steps, C, c, kept, LAST)
    factor, offset = finish_norm(
        part, rows, pivot, count, weight, bias, running_mean, running_var, momentum, eps,
        coefficients, C, c, kept, program == 0, BATCH, True, ROWS,
    )  # fmt: skip
    factor = factor[None, :]
    offset = offset[None, :]
    c = c[None, :]
    kept = kept[None, :]
    if WIDE:
        lines = lines // LINES * LINES  # so that the compiler knows alignments
    line_stride = steps * C if LAST else 1
    step_stride = C if LAST else lines
    w = load_taps(taps, tl.full((1, 1), 1.0, tl.float32), c, kept, False, LAST)
    for n in range(program, tiles, programs):
        group, exists, sample, line, step, own_steps = tile_of(
            n, per_sample, all_groups, strips, length, steps, LINES, GROUPS
        )
        exists = exists[:, None]
        line = line[:, None]
        ok = None if EXACT else kept & exists
        base = sample[:, None].to(tl.int64) * C * lines * steps
        at = line * line_stride + step * step_stride + (c if LAST else c * (lines * steps))
        before = zeros(LINES, GROUPS, BC)
        here = zeros(LINES, GROUPS, BC)
        if STRIPS:  # noqa: SIM102 - known when compiling
            if step > 0:
                outer = load_y(
                    z + base, s + base, at - step_stride, line_stride, line, lines, ok,
                    factor, offset, LINES, FULL, WIDE,
                )[0]  # fmt: skip
                here = spread(outer, w, before, here, 0.0, LINES)[2]
        y, _ = load_y(
            z + base, s + base, at, line_stride, line, lines, ok, factor, offset, LINES, FULL, WIDE
        )
        _, before, here = spread(y, w, before, here, 0.0, LINES)
        total = add_lines(tl.zeros((GROUPS, BC), tl.float32), y, LINES)
        for _ in range(1, own_steps):
            at += step_stride
            y, _ = load_y(
                z + base, s + base, at, line_stride, line, lines, ok, factor, offset,
                LINES, FULL, WIDE,
            )  # fmt: skip
            done, before, here = spread(y, w, before, here, 0.0, LINES)
            total = use_values(
                done, y, value + base, at, step_stride, line_stride, line, lines, ok, total,
                LINES, FULL, WIDE,
            )  # fmt: skip
        done = before
        if STRIPS:  # noqa: SIM102 - known when compiling
            if step + own_steps < steps:
                outer = load_y(
                    z + base, s + base, at + step_stride, line_stride, line, lines, ok,
                    factor, offset, LINES, FULL, WIDE,
                )[0]  # fmt: skip
                done = spread(outer, w, before, here, 0.0, LINES)[0]
        store_group(value + base, done, at, line_stride, line, lines, ok, LINES, FULL, WIDE)
        row = (group * strips + n % strips)[:, None]
        tl.store(sums + row * C + c, total, exists & kept)


@triton.jit(do_not_specialize=VARYING)
def attend(
    sums, query, key, table, capacity, value, own_key, means, queries, attention,
    out_coefficients, t, C, HW, middle, heads, D, chunks, inverse_root,
    OUT_BATCH: tl.constexpr, KEEP: tl.constexpr, LAST: tl.constexpr,
    QUERY: tl.constexpr, KEY: tl.constexpr, MOST: tl.constexpr, HEADS: tl.constexpr,
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The layer's key, and how much of each layer's value each head retrieves.

    ``sums`` ``[B, chunks, C]``: sums of y. Writes ``own_key`` and ``attention`` ``[t, B, heads]``,
    the softmax over the layers, of which there are at most ``MOST``; with ``KEEP`` ``means`` and
    ``queries`` ``[B, C]``; with ``OUT_BATCH`` the pivot of o's norm, from the values.
    """
    b = tl.program_id(0)
    batch = tl.num_programs(0)
    first = tl.program_id(1) * HEADS
    c, ok = head_block(first, heads, D, HEADS, WIDTH)
    q, k, mean = query_key(
        sums + b * chunks * C, chunks, HW, query, key, C, c, ok, QUERY, KEY, CHUNKS
    )
    tl.store(own_key + b * C + c, k, ok)
    if KEEP:
        tl.store(means + b * C + c, mean, ok)
        tl.store(queries + b * C + c, q, ok)
    q *= inverse_root
    layer = tl.arange(0, MOST)[:, None]
    logits = tl.where(layer == t - 1, tl.sum(q * k, 1)[None, :], float("-inf"))
    for n in range(t - 1):
        earlier = tl.load(vector_at(table + capacity, n, own_key) + b * C + c, ok, 0.0)
        logits = tl.where(layer == n, tl.sum(q * earlier, 1)[None, :], logits)
    weights = tl.exp(logits - tl.max(logits, 0)[None, :])
    weights = weights / tl.sum(weights, 0)[None, :]
    head = first + tl.arange(0, HEADS)[None, :]
    tl.store(attention + (layer * batch + b) * heads + head, weights, (layer < t) & (head < heads))
    if OUT_BATCH and b == 0:  # o in the middle of the first map
        total = tl.zeros((HEADS, WIDTH), tl.float32)
        for n in range(t):
            weight = tl.sum(tl.where(layer == n, weights, 0.0), 0)[:, None]
            total += weight * pivot_of(map_at(table, n, value, 16), middle, HW, C, c, ok, LAST)
        tl.store(out_coefficients + PIVOT * C + c, total, ok)


@triton.jit(do_not_specialize=VARYING)
def retrieve(
    o, table, attention, out_coefficients, part, t, heads, D, B, C, HW, programs,
    ROWS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, LAST: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """``o = sum of attention * V``: reads V_1 ... V_t, writes o (t + 1 N; for t = 1, o is V: 1 N).

    Writes ``part`` ``[programs, 2, C]``: sums of ``o - pivot`` and of its square.
    """
    HW = HW // UNIT * UNIT  # so that the compiler knows alignments
    program = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    kept = c < C
    pivot = over_channels(tl.load(out_coefficients + PIVOT * C + c, kept, 0.0), LAST)
    total = tl.zeros((BC,), tl.float32)
    squares = tl.zeros((BC,), tl.float32)
    blocks = tl.cdiv(HW, BP)
    for n in range(program, B * blocks, programs):
        b = n // blocks
        base = b.to(tl.int64) * C * HW
        at, ok = pixel_block((n % blocks) * BP + tl.arange(0, BP), HW, C, c, kept, LAST)
        x = tl.zeros((BP, BC) if LAST else (BC, BP), tl.float32)
        for m in range(t):
            weight = head_weights(attention, m, b, B, heads, c, D, kept, LAST)
            x += weight * tl.load(map_at(table, m, o, 16) + base + at, ok, 0.0).to(tl.float32)
        if t > 1:
            tl.store(o + base + at, x.to(o.dtype.element_ty), ok)
        x = tl.where(ok, x - pivot, 0.0)
        total += sum_places(x, LAST)
        squares += sum_places(x * x, LAST)
    row = part + program * 2 * C + c
    tl.store(row, total, kept)
    tl.store(row + C, squares, kept)


@triton.jit(do_not_specialize=VARYING)
def add_retrieved(
    z, s, o, out, table, attention, coefficients, drop,
    part, weight, bias, running_mean, running_var, out_coefficients,
    t, heads, D, B, C, HW, programs, rows, count, momentum, eps,
    OUT_BATCH: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """``out = y + drop * norm(o)``.

    With ``OUT_BATCH``: finishes the norm from ``part``; reads z, s and o, writes out, which may be
    o (4 N). Otherwise o comes from the values: reads z, s and V_1 ... V_t, writes out (t + 3 N).
    """
    HW = HW // UNIT * UNIT
    program = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    kept = c < C
    pivot = tl.zeros((BC,), tl.float32)
    if OUT_BATCH:
        pivot = tl.load(out_coefficients + PIVOT * C + c, kept, 0.0)
    out_factor, out_offset = finish_norm(
        part, rows, pivot, count, weight, bias, running_mean, running_var, momentum, eps,
        out_coefficients, C, c, kept, program == 0, OUT_BATCH, KEEP, ROWS,
    )  # fmt: skip
    out_factor = over_channels(out_factor, LAST)
    out_offset = over_channels(out_offset, LAST)
    factor = over_channels(tl.load(coefficients + FACTOR * C + c, kept, 0.0), LAST)
    offset = over_channels(tl.load(coefficients + OFFSET * C + c, kept, 0.0), LAST)
    blocks = tl.cdiv(HW, BP)
    for n in range(program, B * blocks, programs):
        b = n // blocks
        base = b.to(tl.int64) * C * HW
        at, ok = pixel_block((n % blocks) * BP + tl.arange(0, BP), HW, C, c, kept, LAST)
        y = tl.load(z + base + at, ok, 0.0).to(tl.float32) * factor + offset
        y += tl.load(s + base + at, ok, 0.0).to(tl.float32)
        y = tl.maximum(y, 0.0, propagate_nan=NAN)
        if OUT_BATCH:
            x = tl.load(o + base + at, ok, 0.0).to(tl.float32)
        else:
            x = tl.zeros((BP, BC) if LAST else (BC, BP), tl.float32)
            for m in range(t):
                v = tl.load(map_at(table, m, out, 16) + base + at, ok, 0.0).to(tl.float32)
                x += head_weights(attention, m, b, B, heads, c, D, kept, LAST) * v
        x = out_factor * x + out_offset
        if drop is not None:
            x *= tl.load(drop + b)
        tl.store(out + base + at, (x + y).to(out.dtype.element_ty), ok)
