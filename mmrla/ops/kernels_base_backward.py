"""MRLA-base's block end as Triton kernels: backward."""

from __future__ import annotations

import triton
import triton.language as tl

from mmrla.ops.kernels import (
    FACTOR,
    INVERSE_STD,
    MEAN,
    NAN,
    OFFSET,
    over_channels,
    over_places,
    pixel_block,
    sum_places,
)
from mmrla.ops.kernels_base_forward import WALK, corner_of, head_weights, map_at, vector_at
from mmrla.ops.kernels_stencil import (
    head_block,
    line_mask,
    load_lines,
    load_taps,
    means_grad,
    sum_chunks,
    tile_of,
    zeros,
)


@triton.jit
def add_conv1d_taps(
    total, grad, means, C, c, ok, FIRST: tl.constexpr, TAPS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """``total`` ``[WIDTH]`` plus a Conv1D's gradient in the entries from ``FIRST`` on."""
    index = tl.arange(0, WIDTH)
    for j in tl.static_range(TAPS):
        near = c + j - TAPS // 2
        mean = tl.load(means + near, ok & (near >= 0) & (near < C), 0.0)
        total += tl.where(index == FIRST + j, tl.sum(grad * mean), 0.0)
    return total


@triton.jit
def add_pairs(a, b, c, d):
    """Combines two pairs of sums."""
    return a + c, b + d


@triton.jit
def add_to(x, sums, kept, again):
    """Adds sums to what this program stored at ``x``; stores them if it has not (``again``)."""
    tl.store(x, tl.load(x, kept & again, 0.0) + sums, kept)


# grad and o are not specialised so that loads of 8 bytes, not 16, come out: then a thread has more
# pixels of fewer channels, and sums over pixels exchange less between threads.
SUMS = ["t", "B", "heads", "chunks", "chunk", "programs", "grad", "o"]


@triton.jit(do_not_specialize=SUMS)
def retrieval_sums(
    grad, o, table, attention, drop, coefficients, part, dots,
    t, B, C, HW, heads, chunks, chunk, programs,
    BATCH: tl.constexpr, D: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """All sums over pixels that the backward of norm and softmax needs.

    Reads grad and V_1 ... V_t (t + 1 N) and, with ``BATCH``, writes o (1 N more, not for t = 1,
    where o is V). Writes ``part`` ``[programs, 2, C]``, sums of ``drop * grad`` and of
    ``drop * grad * (o - mean)``, and ``dots`` ``[B, t, 3 or 1, chunks, C]``: each value's sums with
    grad and, with ``BATCH``, alone and with ``o - mean``, per ``chunk`` blocks of pixels (not for
    t = 1). The norm's backward is linear in grad, 1 and o, so they give the sums with its result.
    """
    program = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    kept = c < C
    mean = over_channels(tl.load(coefficients + MEAN * C + c, kept, 0.0), LAST)
    grads = tl.zeros((BC,), tl.float32)
    moments = tl.zeros((BC,), tl.float32)
    AXIS: tl.constexpr = 0 if LAST else 1
    ROWS: tl.constexpr = 3 if BATCH else 1
    for n in range(program, B * chunks, programs):
        b = (n // chunks).to(tl.int64)
        start = b * C * HW
        row = dots + (b * (t * ROWS * chunks) + n % chunks) * C + c
        for k in range(chunk):
            p = ((n % chunks) * chunk + k) * BP + tl.arange(0, BP)
            at, ok = pixel_block(p, HW, C, c, kept, LAST)
            g = tl.load(tl.multiple_of(grad + start, 8) + at, ok, 0.0).to(tl.float32)
            x = tl.zeros((BP, BC) if LAST else (BC, BP), tl.float32)
            for m in range(t):
                v = tl.load(map_at(table, m, o, 8) + start + at, ok, 0.0).to(tl.float32)
                x += head_weights(attention, m, b, B, heads, c, D, kept, LAST) * v
                if t > 1:
                    if BATCH:
                        dot, total = tl.reduce((g * v, v), AXIS, add_pairs)
                        add_to(row + (m * ROWS + 1) * chunks * C, total, kept, k > 0)
                    else:
                        dot = tl.sum(g * v, AXIS)
                    add_to(row + m * ROWS * chunks * C, dot, kept, k > 0)
            if BATCH:
                to = tl.multiple_of(o + start, 8) + at
                tl.store(to, x.to(o.dtype.element_ty), ok & (t > 1))
            x = tl.where(ok, x - mean, 0.0)
            if BATCH and t > 1:
                for m in range(t):
                    v = tl.load(map_at(table, m, o, 8) + start + at, ok, 0.0).to(tl.float32)
                    add_to(row + (m * ROWS + 2) * chunks * C, tl.sum(x * v, AXIS), kept, k > 0)
            if drop is not None:
                g *= tl.load(drop + b)
            more_grads, more_moments = tl.reduce((g, g * x), AXIS, add_pairs)
            grads += more_grads
            moments += more_moments
            tl.debug_barrier()  # what add_to stored, other threads may load in the next step
    row = part + program * 2 * C + c
    tl.store(row, grads, kept)
    tl.store(row + C, moments, kept)


@triton.jit(do_not_specialize=["t", "B", "heads", "chunks", "rows", "samples", "count", "scale"])
def softmax_backward(
    dots, part, coefficients, attention, drop, query, keys, grad_key,
    on, grad_query, grad_keys, factors,
    t, B, C, heads, chunks, rows, samples, count, scale,
    BATCH: tl.constexpr, D: tl.constexpr, LAYERS: tl.constexpr, HEADS: tl.constexpr,
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Gradients of query and keys, of some samples and heads, and the values' factors.

    Writes ``grad_query`` ``[B, C]``, ``grad_keys`` ``[t, B, C]``, the last with what later layers
    left (``grad_key``), and ``factors`` ``[t, B, C]``: V_n's gradient is ``factors[n] * grad_o``.
    With ``BATCH`` also ``on`` ``[3, C]``: ``grad_o = on[0] * drop * grad + on[1] * o + on[2]``;
    otherwise grad_o is grad, and factors have what the frozen norm and ``drop`` do to it.
    """
    first = tl.program_id(1) * HEADS
    c, ok = head_block(first, heads, D, HEADS, WIDTH)
    on_grad = tl.load(coefficients + FACTOR * C + c, ok, 0.0)
    on_o = tl.zeros((HEADS, WIDTH), tl.float32)
    constant = tl.zeros((HEADS, WIDTH), tl.float32)
    if BATCH:
        grads, moments = head_sums(part, rows, C, c, ok, CHUNKS)
        inverse = tl.load(coefficients + INVERSE_STD * C + c, ok, 0.0)
        on_o = -on_grad * inverse * inverse * moments / count
        constant = -on_grad * grads / count
        if tl.program_id(0) == 0:
            mean = tl.load(coefficients + MEAN * C + c, ok, 0.0)
            tl.store(on + c, on_grad, ok)
            tl.store(on + C + c, on_o, ok)
            tl.store(on + 2 * C + c, constant - on_o * mean, ok)
    ROWS: tl.constexpr = 3 if BATCH else 1
    layer = tl.arange(0, LAYERS)[:, None]
    head = first + tl.arange(0, HEADS)[None, :]
    begin = tl.program_id(0) * samples
    for b in range(begin, tl.minimum(begin + samples, B)):
        dropped = on_grad
        if drop is not None:
            dropped = on_grad * tl.load(drop + b)
        sums = dots + b.to(tl.int64) * (t * ROWS * chunks) * C
        grad_weights = tl.zeros((LAYERS, HEADS), tl.float32)
        for n in range(tl.where(t > 1, t, 0)):
            at = sums + n * ROWS * chunks * C
            dot = dropped * sum_chunks(at, chunks, C, c, ok, CHUNKS)
            if BATCH:
                dot += constant * sum_chunks(at + chunks * C, chunks, C, c, ok, CHUNKS)
                dot += on_o * sum_chunks(at + 2 * chunks * C, chunks, C, c, ok, CHUNKS)
            grad_weights = tl.where(layer == n, tl.sum(dot, 1)[None, :], grad_weights)
        at = attention + (layer * B + b) * heads + head
        weights = tl.load(at, (layer < t) & (head < heads), 0.0)
        grad_logits = weights * (grad_weights - tl.sum(weights * grad_weights, 0)[None, :]) * scale
        q = tl.load(query + b * C + c, ok, 0.0)
        on_query = tl.zeros((HEADS, WIDTH), tl.float32)
        for n in range(t):
            grad_logit = tl.sum(tl.where(layer == n, grad_logits, 0.0), 0)[:, None]
            k = tl.load(vector_at(keys, n, query) + b * C + c, ok, 0.0)
            on_query += grad_logit * k
            on_key = grad_logit * q
            if grad_key is not None and n == t - 1:
                on_key += tl.load(grad_key + b * C + c, ok, 0.0)
            to = (n * B + b).to(tl.int64) * C + c
            tl.store(grad_keys + to, on_key, ok)
            weight = tl.sum(tl.where(layer == n, weights, 0.0), 0)[:, None]
            tl.store(factors + to, weight + tl.zeros_like(k) if BATCH else weight * dropped, ok)
        tl.store(grad_query + b * C + c, on_query, ok)


@triton.jit
def head_sums(part, rows, C, c, ok, CHUNKS: tl.constexpr):
    """Both sums over the rows of ``part`` ``[rows, 2, C]`` for a block of heads."""
    grads = sum_chunks(part, rows, 2 * C, c, ok, CHUNKS)
    return grads, sum_chunks(part + C, rows, 2 * C, c, ok, CHUNKS)


@triton.jit(do_not_specialize=["B"])
def project_backward(
    grad_query, grad_key, query, key, means, grad_means, taps, C,
    QUERY: tl.constexpr, KEY: tl.constexpr, TAPS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Per sample: gradients of the channel means, and of the taps of W_q and W_k, ``[TAPS]``."""
    b = tl.program_id(0)
    total = tl.zeros((TAPS,), tl.float32)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        kept = c < C
        row = b * C
        mean = means_grad(grad_query + row, grad_key + row, query, key, C, c, kept, QUERY, KEY)
        tl.store(grad_means + row + c, mean, kept)
        g = tl.load(grad_query + row + c, kept, 0.0)
        total = add_conv1d_taps(total, g, means + row, C, c, kept, 0, QUERY, TAPS)
        g = tl.load(grad_key + row + c, kept, 0.0)
        total = add_conv1d_taps(total, g, means + row, C, c, kept, QUERY, KEY, TAPS)
    tl.store(taps + b * TAPS + tl.arange(0, TAPS), total)


@triton.jit
def add_lines(
    total, x, factor, line_stride, line, lines, ok, LINES: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """Lines -1 ... LINES of one step of ``total`` plus ``factor`` times those of a map."""
    values = load_lines(x, line_stride, line, lines, ok, 0.0, LINES, EXACT)
    sums = ()
    for j in tl.static_range(LINES + 2):
        sums = sums + (total[j] + factor * values[j],)
    return sums


@triton.jit
def add_taps(taps, y, before, here, after, J: tl.constexpr):
    """Sums of each tap's gradient plus those of output line ``J``, whose y is given.

    ``before``, ``here`` and ``after``: the value's gradient on three steps; y is that of the middle
    one. An output sees the tap that it gave y through.
    """
    return (
        taps[0] + y * after[J + 2],
        taps[1] + y * here[J + 2],
        taps[2] + y * before[J + 2],
        taps[3] + y * after[J + 1],
        taps[4] + y * here[J + 1],
        taps[5] + y * before[J + 1],
        taps[6] + y * after[J],
        taps[7] + y * here[J],
        taps[8] + y * before[J],
    )


@triton.jit
def transposed(w, before, here, after, J: tl.constexpr):
    """Output line ``J`` of the transposed stencil."""
    x = w[0] * after[J + 2] + w[1] * here[J + 2] + w[2] * before[J + 2]
    x += w[3] * after[J + 1] + w[4] * here[J + 1] + w[5] * before[J + 1]
    return x + w[6] * after[J] + w[7] * here[J] + w[8] * before[J]


@triton.jit(do_not_specialize=[*WALK, "t", "B", "later", "capacity"])
def input_grads(
    grad, z, s, o, go, gm, gz, part, table, capacity, later, coefficients, on, factors, taps,
    grad_means, drop, t, B, C, HW,
    lines, steps, line_stride, step_stride, tiles, per_sample, all_groups, strips, length, programs,
    BATCH: tl.constexpr, OUT_BATCH: tl.constexpr, LINES: tl.constexpr, GROUPS: tl.constexpr,
    BC: tl.constexpr, EXACT: tl.constexpr, STRIPS: tl.constexpr, ROWS: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """Gradient of ``norm(z) + s``, from the own value's, which is gathered from all layers' grad_o.

    Reads grad, z, s and ``later`` maps that later layers left; with ``OUT_BATCH`` also o, and
    writes grad_o (``go``; not for t = 1, after which nobody needs it). Writes ``gm``, the
    shortcut's gradient, and without ``BATCH`` ``gz`` too: later + 6 N with ``OUT_BATCH``, else
    later + 4 N, and N for ``gz``. Writes ``part`` ``[programs, 11, C]``: sums for W_v's taps, of gm
    and of ``gm * (z - mean)``.
    """
    program = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    kept = c < C
    factor = over_channels(tl.load(coefficients + FACTOR * C + c, kept, 0.0), LAST)
    offset = over_channels(tl.load(coefficients + OFFSET * C + c, kept, 0.0), LAST)
    mean = over_channels(tl.load(coefficients + MEAN * C + c, kept, 0.0), LAST)
    on_grad = 1.0
    on_o = 0.0
    constant = 0.0
    if OUT_BATCH:
        on_grad = over_channels(tl.load(on + c, kept, 0.0), LAST)
        on_o = over_channels(tl.load(on + C + c, kept, 0.0), LAST)
        constant = over_channels(tl.load(on + 2 * C + c, kept, 0.0), LAST)
    exists = over_channels(kept, LAST)
    channels = over_channels(c, LAST)
    w = load_taps(taps, 1.0, channels, exists, False, LAST)
    ROW: tl.constexpr = GROUPS if LAST else BC
    COLUMN: tl.constexpr = BC if LAST else GROUPS
    sums = zeros(11, ROW, COLUMN)
    for n in range(program, tiles, programs):
        _, sample, line, first, width = tile_of(
            n, per_sample, all_groups, strips, length, steps, LINES, GROUPS
        )
        corner = corner_of(sample, line, first, c, C, HW, line_stride, step_stride, LAST)
        line = over_places(line, LAST)
        row = over_places(sample * C, LAST) + channels
        own_factor = tl.load(factors + (t - 1) * B * C + row, exists, 0.0)
        on_y = tl.load(grad_means + row, exists, 0.0) / HW
        dropped = on_grad
        if OUT_BATCH and drop is not None:
            dropped = on_grad * over_places(tl.load(drop + sample), LAST)
        before = zeros(LINES + 2, ROW, COLUMN)
        here = zeros(LINES + 2, ROW, COLUMN)
        grad_here = zeros(LINES, ROW, COLUMN)
        for k in range(-1, width + 1):
            at = corner + k * step_stride
            ok = (first + k >= 0) & (first + k < steps)
            if not EXACT:
                ok = ok & exists & (line < lines)
            g = load_lines(grad + at, line_stride, line, lines, ok, 0.0, LINES, EXACT)
            after = ()
            if OUT_BATCH:
                x = load_lines(o + at, line_stride, line, lines, ok, 0.0, LINES, EXACT)
                for j in tl.static_range(LINES + 2):
                    mask = line_mask(line, lines, ok, j - 1, LINES, EXACT)
                    own = tl.where(mask, dropped * g[j] + on_o * x[j] + constant, 0.0)
                    after = after + (own_factor * own,)
                    if j >= 1 and j <= LINES:
                        inside = mask & (k >= 0) & (k < width) & (t > 1)
                        to = go + at + (j - 1) * line_stride
                        tl.store(to, own.to(go.dtype.element_ty), inside)
            else:
                for j in tl.static_range(LINES + 2):
                    after = after + (own_factor * g[j],)
            for m in range(later):
                its_factor = vector_at(table + 3 * capacity, m, factors) + row
                its_factor = tl.load(its_factor, exists, 0.0)
                its_map = map_at(table + 2 * capacity, m, grad, 16) + at
                after = add_lines(
                    after, its_map, its_factor, line_stride, line, lines, ok, LINES, EXACT
                )
            next_grad = ()
            for j in tl.static_range(LINES):
                inside = exists & (line + j < lines) & (k >= 1)
                there = at + (j * line_stride - step_stride)
                x = tl.load(z + there, inside, 0.0).to(tl.float32)
                y = x * factor + offset + tl.load(s + there, inside, 0.0).to(tl.float32)
                y = tl.where(inside, tl.maximum(y, 0.0, propagate_nan=NAN), 0.0)
                gm_here = transposed(w, before, here, after, j) + on_y + grad_here[j]
                gm_here = tl.where(y != 0.0, gm_here, 0.0)
                tl.store(gm + there, gm_here.to(gm.dtype.element_ty), inside)
                if not BATCH:
                    tl.store(gz + there, (gm_here * factor).to(gz.dtype.element_ty), inside)
                tap_sums = add_taps(sums, y, before, here, after, j)
                sums = tap_sums + (sums[9] + gm_here, sums[10] + gm_here * (x - mean))
                next_grad = next_grad + (g[j + 1],)
            before = here
            here = after
            grad_here = next_grad
    to = part + program * 11 * C + c
    for k in tl.static_range(9):
        tap = k if LAST else (k % 3) * 3 + k // 3
        tl.store(to + tap * C, sum_places(sums[k], LAST), kept)
    tl.store(to + 9 * C, sum_places(sums[9], LAST), kept)
    tl.store(to + 10 * C, sum_places(sums[10], LAST), kept)
