"""MRLA-base's block end as Triton kernels: forward, and the two host functions.

N is the number of elements of one map, t the number of layers so far, this one included. Neither y
nor (in the end) o is stored: beside z and the shortcut, a layer leaves its value alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmrla.ops.kernels import (
    NAN,
    finish_norm,
    over_channels,
    over_places,
    pivot_of,
    pixel_block,
    sum_places,
)
from mmrla.ops.kernels_stencil import (
    head_block,
    load_taps,
    load_y,
    query_key,
    spread,
    tile_of,
    zeros,
)

BATCH_OF_ADDRESSES = tl.constexpr(8)
"""How many entries one launch writes into each table of addresses."""


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
    for k in tl.static_range(BATCH_OF_ADDRESSES):
        tl.store(table + first + k, tensors[k].to(tl.int64, bitcast=True))


@triton.jit(do_not_specialize=["capacity", "first", "maps", "vectors", "more", "factors"])
def fill_tables(table, capacity, first, maps, vectors, more, factors):
    """Writes addresses into the rows of ``table`` ``[4, capacity]``, from column ``first`` on.

    Loops over layers find their tensors there at run time, so that no kernel is compiled per number
    of layers.
    """
    fill(table, first, maps)
    fill(table + capacity, first, vectors)
    if more is not None:
        fill(table + 2 * capacity, first, more)
        fill(table + 3 * capacity, first, factors)


@triton.jit
def head_weights(attention, layer, sample, B, heads, c, D: tl.constexpr, kept, LAST: tl.constexpr):
    """One layer's softmax weights of a sample, per channel, to broadcast over a block."""
    at = (layer * B + sample) * heads + over_channels(c // D, LAST)
    return tl.load(attention + at, over_channels(kept, LAST), 0.0)


@triton.jit
def corner_of(sample, line, first, c, C, HW, line_stride, step_stride, LAST: tl.constexpr):
    """Where each group's line 0 is in step ``first``, in a map: offsets in 64 bits."""
    place = sample.to(tl.int64) * (C * HW) + line.to(tl.int64) * line_stride + first * step_stride
    return over_places(place, LAST) + over_channels(c if LAST else c * HW, LAST)


@triton.jit
def y_block(z, s, at, ok, factor, offset):
    """``y = relu(norm(z) + s)`` of a flat block; not zero outside."""
    y = tl.load(z + at, ok, 0.0).to(tl.float32) * factor + offset
    return tl.maximum(y + tl.load(s + at, ok, 0.0).to(tl.float32), 0.0, propagate_nan=NAN)


WALK = ["lines", "steps", "tiles", "per_sample", "all_groups", "strips", "length", "programs"]
NORM = ["count", "momentum", "eps"]


@triton.jit(do_not_specialize=[*WALK, *NORM, "middle", "rows", "capacity", "maps", "vectors"])
def make_value(
    z, s, value, sums, part, coefficients, weight, bias, running_mean, running_var, taps,
    table, capacity, maps, vectors, C, HW, middle, rows, count, momentum, eps,
    lines, steps, line_stride, step_stride, tiles, per_sample, all_groups, strips, length, programs,
    BATCH: tl.constexpr, ROWS: tl.constexpr, LINES: tl.constexpr, GROUPS: tl.constexpr,
    BC: tl.constexpr, EXACT: tl.constexpr, STRIPS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """The layer's value, and the sums of y for query and key: reads z and s, writes V (3 N).

    Finishes the first norm's statistics from ``part``, stores its coefficients and moves its
    running statistics. Writes ``sums`` ``[B, per_sample * strips, C]``, and the last entries of the
    tables of values and keys.
    """
    program = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    kept = c < C
    if (program == 0) & (tl.program_id(1) == 0):
        fill(table, capacity - BATCH_OF_ADDRESSES, maps)
        fill(table, 2 * capacity - BATCH_OF_ADDRESSES, vectors)
    pivot = tl.zeros((BC,), tl.float32)
    if BATCH:
        pivot = pivot_of(z, middle, HW, C, c, kept, LAST)
    factor, offset = finish_norm(
        part, rows, pivot, count, weight, bias, running_mean, running_var, momentum, eps,
        coefficients, C, c, kept, program == 0, BATCH, True, ROWS,
    )  # fmt: skip
    factor = over_channels(factor, LAST)
    offset = over_channels(offset, LAST)
    exists = over_channels(kept, LAST)
    w = load_taps(taps, 1.0, over_channels(c, LAST), exists, False, LAST)
    ROW: tl.constexpr = GROUPS if LAST else BC
    COLUMN: tl.constexpr = BC if LAST else GROUPS
    for n in range(program, tiles, programs):
        group, sample, line, first, width = tile_of(
            n, per_sample, all_groups, strips, length, steps, LINES, GROUPS
        )
        corner = corner_of(sample, line, first, c, C, HW, line_stride, step_stride, LAST)
        line = over_places(line, LAST)
        before = zeros(LINES, ROW, COLUMN)
        here = zeros(LINES, ROW, COLUMN)
        total = tl.zeros((ROW, COLUMN), tl.float32)
        for k in range(-1, width + 1):
            at = corner + k * step_stride
            ok = (first + k >= 0) & (first + k < steps)
            if not EXACT:
                ok = ok & exists & (line < lines)
            y, _ = load_y(
                z + at, s + at, line_stride, line, lines, ok, factor, offset, LINES, EXACT
            )
            done, before, here = spread(y, w, before, here, 0.0, LINES)
            for j in tl.static_range(LINES):
                inside = exists & (line + j < lines) & (k >= 1)
                to = value + at + (j * line_stride - step_stride)
                tl.store(to, done[j].to(value.dtype.element_ty), inside)
                if STRIPS:
                    total += tl.where((k >= 0) & (k < width), y[j + 1], 0.0)
                else:
                    total += y[j + 1]
        row = over_places((group * strips + n % strips) * C, LAST) + over_channels(c, LAST)
        tl.store(sums + row, total, exists & (line < lines))


@triton.jit(do_not_specialize=["t", "B", "heads", "chunks", "scale"])
def attend(
    sums, query, key, keys, own_key, saved, attention, t, B, C, HW, heads, chunks, scale,
    D: tl.constexpr, QUERY: tl.constexpr, KEY: tl.constexpr, LAYERS: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The layer's key, and how much of each layer's value each head retrieves.

    ``sums`` ``[B, chunks, C]``: sums of y. Writes the key, ``attention`` ``[t, B, heads]``, the
    softmax over the layers, and, if it is not None, ``saved`` ``[2, B, C]``: means and query.
    """
    b = tl.program_id(0)
    first = tl.program_id(1) * HEADS
    c, ok = head_block(first, heads, D, HEADS, WIDTH)
    q, k, mean = query_key(
        sums + b * chunks * C, chunks, HW, query, key, C, c, ok, QUERY, KEY, CHUNKS
    )
    tl.store(own_key + b * C + c, k, ok)
    if saved is not None:
        tl.store(saved + b * C + c, mean, ok)
        tl.store(saved + (B + b) * C + c, q, ok)
    q = tl.where(ok, q * scale, 0.0)
    layer = tl.arange(0, LAYERS)[:, None]
    logits = tl.where(layer == t - 1, tl.sum(q * k, 1)[None, :], float("-inf"))
    for n in range(t - 1):
        earlier = tl.load(vector_at(keys, n, own_key) + b * C + c, ok, 0.0)
        logits = tl.where(layer == n, tl.sum(q * earlier, 1)[None, :], logits)
    weights = tl.exp(logits - tl.max(logits, 0)[None, :])
    weights = weights / tl.sum(weights, 0)[None, :]
    head = first + tl.arange(0, HEADS)[None, :]
    tl.store(attention + (layer * B + b) * heads + head, weights, (layer < t) & (head < heads))


@triton.jit
def pivot_of_o(
    table, attention, like, t, middle, B, C, HW, heads, c, kept, D: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    """The pivot of o's norm, see :func:`pivot_of`; o there, from the values."""
    total = tl.zeros(c.shape, tl.float32)
    for n in range(t):
        weight = tl.load(attention + n * B * heads + c // D, kept, 0.0)
        total += weight * pivot_of(map_at(table, n, like, 16), middle, HW, C, c, kept, LAST)
    return total


RETRIEVE = ["t", "B", "heads", "middle", "programs", "rows"]


@triton.jit(do_not_specialize=RETRIEVE)
def retrieve(
    o, table, attention, part, t, B, C, HW, heads, middle, programs,
    D: tl.constexpr, ROWS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """``o = sum of attention * V``: reads V_1 ... V_t, writes o (t + 1 N; for t = 1, o is V: 1 N).

    Writes ``part`` ``[programs, 2, C]``: sums of ``o - pivot`` and of its square.
    """
    program = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    kept = c < C
    pivot = pivot_of_o(table, attention, o, t, middle, B, C, HW, heads, c, kept, D, LAST)
    pivot = over_channels(pivot, LAST)
    total = tl.zeros((BC,), tl.float32)
    squares = tl.zeros((BC,), tl.float32)
    blocks = tl.cdiv(HW, BP)
    for block in range(program, B * blocks, programs):
        b = block // blocks
        start = b.to(tl.int64) * C * HW
        p = (block % blocks) * BP + tl.arange(0, BP)
        at, ok = pixel_block(p, HW, C, c, kept, LAST)
        x = tl.zeros((BP, BC) if LAST else (BC, BP), tl.float32)
        for n in range(t):
            weight = head_weights(attention, n, b, B, heads, c, D, kept, LAST)
            x += weight * tl.load(map_at(table, n, o, 16) + start + at, ok, 0.0).to(tl.float32)
        tl.store(o + start + at, x.to(o.dtype.element_ty), ok & (t > 1))
        x = tl.where(ok, x - pivot, 0.0)
        total += sum_places(x, LAST)
        squares += sum_places(x * x, LAST)
    row = part + program * 2 * C + c
    tl.store(row, total, kept)
    tl.store(row + C, squares, kept)


@triton.jit(do_not_specialize=[*RETRIEVE, *NORM])
def add_retrieved(
    z, s, o, out, table, attention, coefficients, drop,
    part, out_coefficients, weight, bias, running_mean, running_var,
    t, B, C, HW, heads, middle, programs, rows, count, momentum, eps,
    BATCH: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """``out = y + drop * norm(o)``.

    With ``BATCH``: finishes the norm from ``part``; reads z, s and o, writes out, which may be o
    (4 N). Otherwise o comes from the values: reads z, s and V_1 ... V_t, writes out (t + 3 N).
    """
    program = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    kept = c < C
    pivot = tl.zeros((BC,), tl.float32)
    if BATCH:
        pivot = pivot_of_o(table, attention, out, t, middle, B, C, HW, heads, c, kept, D, LAST)
    out_factor, out_offset = finish_norm(
        part, rows, pivot, count, weight, bias, running_mean, running_var, momentum, eps,
        out_coefficients, C, c, kept, program == 0, BATCH, KEEP, ROWS,
    )  # fmt: skip
    out_factor = over_channels(out_factor, LAST)
    out_offset = over_channels(out_offset, LAST)
    factor = over_channels(tl.load(coefficients + c, kept, 0.0), LAST)
    offset = over_channels(tl.load(coefficients + C + c, kept, 0.0), LAST)
    blocks = tl.cdiv(HW, BP)
    for block in range(program, B * blocks, programs):
        b = block // blocks
        start = b.to(tl.int64) * C * HW
        p = (block % blocks) * BP + tl.arange(0, BP)
        at, ok = pixel_block(p, HW, C, c, kept, LAST)
        if BATCH:
            x = tl.load(o + start + at, ok, 0.0).to(tl.float32)
        else:
            x = tl.zeros((BP, BC) if LAST else (BC, BP), tl.float32)
            for n in range(t):
                weight_of_value = head_weights(attention, n, b, B, heads, c, D, kept, LAST)
                v = tl.load(map_at(table, n, out, 16) + start + at, ok, 0.0).to(tl.float32)
                x += weight_of_value * v
        x = out_factor * x + out_offset
        if drop is not None:
            x *= tl.load(drop + b)
        x += y_block(z + start, s + start, at, ok, factor, offset)
        tl.store(out + start + at, x.to(out.dtype.element_ty), ok)
