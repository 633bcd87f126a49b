"""Kernels of MRLA-base's backward: sums for norm and softmax, and the gradients of the block."""

# mypy: disable-error-code="no-untyped-def, assignment"
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
    pixel_block,
)
from mmrla.ops.kernels_base_forward import VARYING, head_weights, map_at, vector_at
from mmrla.ops.kernels_depthwise import (
    LOWEST,
    conv1d_weight_grad,
    head_block,
    line_mask,
    load_group,
    load_lines,
    load_taps,
    means_grad,
    store_group,
    sum_chunks,
    tile_of,
    zeros,
)

FIELDS = tl.constexpr(9)
"""Sums of products per channel: the taps of W_v."""


@triton.jit
def add_pairs(a, b, c, d):
    """Combines two pairs of sums."""
    return a + c, b + d


@triton.jit
def add_to(x, sums, kept, again):
    """Adds sums to what this program stored at ``x``; stores them if it has not (``again``)."""
    tl.store(x, tl.load(x, kept & again, 0.0) + sums, kept)


# grad and o are not specialised, so that WIDTH decides about loads. In channels_last a thread gets
# 4 channels, not 8, and so more pixels: sums over pixels then exchange less between threads.
@triton.jit(do_not_specialize=[*VARYING, "grad", "o"])
def retrieval_sums(
    grad, o, table, attention, drop, out_coefficients, part, dots,
    t, heads, D, B, C, HW, programs, chunks, chunk,
    OUT_BATCH: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
    LAST: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """All sums over pixels that the backward of norm and softmax needs.

    Reads grad and V_1 ... V_t (t + 1 N) and, with ``OUT_BATCH``, writes o (1 N more, not for t = 1,
    where o is V). Writes ``part`` ``[programs, 2, C]``, sums of ``drop * grad`` and of
    ``drop * grad * (o - mean)``, and ``dots`` ``[B, t, 3 or 1, chunks, C]``: each value's sums with
    grad and, with ``OUT_BATCH``, alone and with ``o - mean``, per ``chunk`` blocks of pixels (not
    for t = 1). The norm's backward is linear in grad, 1 and o: they give the sums with its result.
    """
    HW = HW // UNIT * UNIT  # so that the compiler knows alignments
    program = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    kept = c < C
    mean = over_channels(tl.load(out_coefficients + MEAN * C + c, kept, 0.0), LAST)
    grads = tl.zeros((BC,), tl.float32)
    moments = tl.zeros((BC,), tl.float32)
    AXIS: tl.constexpr = 0 if LAST else 1
    KINDS: tl.constexpr = 3 if OUT_BATCH else 1
    WIDTH: tl.constexpr = o.dtype.element_ty.primitive_bitwidth // 2 if LAST else 16
    for n in range(program, B * chunks, programs):
        b = n // chunks
        base = b.to(tl.int64) * C * HW
        row = dots + (b.to(tl.int64) * (t * KINDS * chunks) + n % chunks) * C + c
        first = (n % chunks) * chunk
        for k in range(tl.minimum(chunk, tl.cdiv(HW, BP) - first)):
            p = (first + k) * BP + tl.arange(0, BP)
            at, ok = pixel_block(p, HW, C, c, kept, LAST)
            g = tl.load(tl.multiple_of(grad + base, WIDTH) + at, ok, 0.0).to(tl.float32)
            x = tl.zeros((BP, BC) if LAST else (BC, BP), tl.float32)
            for m in range(t):
                v = tl.load(map_at(table, m, o, WIDTH) + base + at, ok, 0.0).to(tl.float32)
                x += head_weights(attention, m, b, B, heads, c, D, kept, LAST) * v
                if t > 1:
                    if OUT_BATCH:
                        dot, total = tl.reduce((g * v, v), AXIS, add_pairs)
                        add_to(row + (m * KINDS + 1) * chunks * C, total, kept, k > 0)
                    else:
                        dot = tl.sum(g * v, AXIS)
                    add_to(row + m * KINDS * chunks * C, dot, kept, k > 0)
            if OUT_BATCH and t > 1:
                tl.store(tl.multiple_of(o + base, WIDTH) + at, x.to(o.dtype.element_ty), ok)
            x = tl.where(ok, x - mean, 0.0)
            if OUT_BATCH and t > 1:
                for m in range(t):
                    v = tl.load(map_at(table, m, o, WIDTH) + base + at, ok, 0.0).to(tl.float32)
                    add_to(row + (m * KINDS + 2) * chunks * C, tl.sum(x * v, AXIS), kept, k > 0)
            if drop is not None:
                g *= tl.load(drop + b)
            more_grads, more_moments = tl.reduce((g, g * x), AXIS, add_pairs)
            grads += more_grads
            moments += more_moments
            tl.debug_barrier()  # other threads may load what add_to stored
    row = part + program * 2 * C + c
    tl.store(row, grads, kept)
    tl.store(row + C, moments, kept)


@triton.jit(do_not_specialize=[*VARYING, "samples", "grad_key", "has_grad_key"])
def softmax_backward(
    dots, part, out_coefficients, attention, drop, means, queries, table, capacity,
    grad_key, has_grad_key, on, grad_queries, grad_keys, factors, tap_part,
    t, heads, D, B, C, chunks, rows, samples, count, inverse_root,
    OUT_BATCH: tl.constexpr, QUERY: tl.constexpr, KEY: tl.constexpr,
    TAPS: tl.constexpr, MOST: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """Gradients of query and keys, of ``samples`` samples and some heads, and values' factors.

    Writes ``grad_queries`` ``[B, C]``, ``grad_keys`` ``[t, B, C]``, the last plus ``grad_key`` from
    later layers if ``has_grad_key``, ``factors`` ``[t, B, C]``: V_n's gradient is
    ``factors[n] * grad_o``, and ``tap_part``, a row ``[2, TAPS]`` for W_q and W_k per sample and
    block of heads. With ``OUT_BATCH`` also ``on`` ``[3, C]``: grad_o is
    ``on[0] * drop * grad + on[1] * o + on[2]``; otherwise it is grad, and factors have what the
    frozen norm and ``drop`` do to it.
    """
    first = tl.program_id(1) * HEADS
    c, ok = head_block(first, heads, D, HEADS, WIDTH)
    on_grad = tl.load(out_coefficients + FACTOR * C + c, ok, 0.0)
    on_o = tl.zeros((HEADS, WIDTH), tl.float32)
    constant = tl.zeros((HEADS, WIDTH), tl.float32)
    if OUT_BATCH:
        inverse = tl.load(out_coefficients + INVERSE_STD * C + c, ok, 0.0)
        moments = sum_chunks(part + C, rows, 2 * C, c, ok, CHUNKS)
        on_o = -on_grad * inverse * inverse * moments / count
        constant = -on_grad * sum_chunks(part, rows, 2 * C, c, ok, CHUNKS) / count
        if tl.program_id(0) == 0:
            mean = tl.load(out_coefficients + MEAN * C + c, ok, 0.0)
            tl.store(on + c, on_grad, ok)
            tl.store(on + C + c, on_o, ok)
            tl.store(on + 2 * C + c, constant - on_o * mean, ok)
    KINDS: tl.constexpr = 3 if OUT_BATCH else 1
    layer = tl.arange(0, MOST)[:, None]
    head = first + tl.arange(0, HEADS)[None, :]
    tap = tl.arange(0, TAPS)
    begin = tl.program_id(0) * samples
    for b in range(begin, tl.minimum(begin + samples, B)):
        dropped = on_grad
        if drop is not None:
            dropped = on_grad * tl.load(drop + b)
        sums = dots + tl.cast(b, tl.int64) * (t * KINDS * chunks) * C
        grad_weights = tl.zeros((MOST, HEADS), tl.float32)
        for n in range(tl.where(t > 1, t, 0)):  # one layer's weight is 1
            at = sums + n * KINDS * chunks * C
            dot = dropped * sum_chunks(at, chunks, C, c, ok, CHUNKS)
            if OUT_BATCH:
                dot += constant * sum_chunks(at + chunks * C, chunks, C, c, ok, CHUNKS)
                dot += on_o * sum_chunks(at + 2 * chunks * C, chunks, C, c, ok, CHUNKS)
            grad_weights = tl.where(layer == n, tl.sum(dot, 1)[None, :], grad_weights)
        at = attention + (layer * B + b) * heads + head
        weights = tl.load(at, (layer < t) & (head < heads), 0.0)
        mean_grad = tl.sum(weights * grad_weights, 0)[None, :]
        grad_logits = weights * (grad_weights - mean_grad) * inverse_root
        q = tl.load(queries + b * C + c, ok, 0.0)
        on_query = tl.zeros((HEADS, WIDTH), tl.float32)
        on_key = tl.zeros((HEADS, WIDTH), tl.float32)
        for n in range(t):
            grad_logit = tl.sum(tl.where(layer == n, grad_logits, 0.0), 0)[:, None]
            k = tl.load(vector_at(table + capacity, n, queries) + b * C + c, ok, 0.0)
            on_query += grad_logit * k
            from_later = ok & (n == t - 1) & (has_grad_key != 0)
            on_key = grad_logit * q + tl.load(grad_key + b * C + c, from_later, 0.0)
            to = (n * B + b).to(tl.int64) * C + c
            tl.store(grad_keys + to, on_key, ok)
            factor = tl.sum(tl.where(layer == n, weights, 0.0), 0)[:, None]
            factor *= tl.full((HEADS, WIDTH), 1.0, tl.float32) if OUT_BATCH else dropped
            tl.store(factors + to, factor, ok)
        tl.store(grad_queries + b * C + c, on_query, ok)
        row = tap_part + (b * tl.num_programs(1) + tl.program_id(1)) * 2 * TAPS + tap
        own = means + b * C
        on_query = tl.where(ok, on_query, 0.0)
        on_key = tl.where(ok, on_key, 0.0)
        tl.store(row, conv1d_weight_grad(on_query, own, C, c, ok, QUERY, TAPS))
        tl.store(row + TAPS, conv1d_weight_grad(on_key, own, C, c, ok, KEY, TAPS))


@triton.jit
def add_map(
    total, x, at, factor, line_stride, line, lines, ok,
    LINES: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Lines -1 ... LINES of ``total`` plus ``factor`` times those of a map."""
    values = load_lines(x, at, line_stride, line, lines, ok, 0.0, LINES, FULL, WIDE)
    sums = ()
    for j in tl.static_range(LINES + 2):
        sums = sums + (total[j] + factor * values[j],)
    return sums


@triton.jit
def gather(
    grad, o, go, at, line_stride, line, lines, ok, on_grad, on_o, constant, own_factor,
    table, capacity, later, like, vector, base, row, kept, t,
    STORE: tl.constexpr, OUT_BATCH: tl.constexpr, LINES: tl.constexpr, FULL: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Lines -1 ... LINES of one step: of the value's gradient and of grad.

    The former is the sum over grad_o times its factor, of the layer itself and of later ones, whose
    ``table`` has rows of maps and of factors, ``row`` being the place in these and ``base`` the
    samples' in maps. With ``STORE``, the own grad_o is stored.
    """
    g = load_lines(grad, at, line_stride, line, lines, ok, 0.0, LINES, FULL, WIDE)
    total = ()
    if OUT_BATCH:
        outputs = load_lines(o, at, line_stride, line, lines, ok, 0.0, LINES, FULL, WIDE)
        own = ()
        for j in tl.static_range(LINES + 2):
            value = on_grad * g[j] + (on_o * outputs[j] + constant)
            mask = line_mask(line, lines, ok, j - 1, LINES, FULL)
            if mask is not None:
                value = tl.where(mask, value, 0.0)
            own = own + (value,)
            total = total + (own_factor * value,)
        if STORE and t > 1:  # a first layer leaves nothing
            store_group(go, own[1:], at, line_stride, line, lines, ok, LINES, FULL, WIDE)
    else:
        for j in tl.static_range(LINES + 2):
            total = total + (own_factor * g[j],)
    for n in range(later):
        x = map_at(table + 2 * capacity, n, like, 16) + base
        factor = tl.load(vector_at(table + 3 * capacity, n, vector) + row, kept, 0.0)
        total = add_map(total, x, at, factor, line_stride, line, lines, ok, LINES, FULL, WIDE)
    return total, g


@triton.jit
def use_value_grads(
    older, newer, latest, g, z, s, gm, gz, at, line_stride, line, lines, ok, sums, w,
    factor, offset, mean, on_y,
    BATCH: tl.constexpr, LINES: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What :func:`input_grads` does for one step; returns the new ``sums``.

    ``older``, ``newer`` and ``latest`` are lines -1 ... LINES of the value's gradient in the step
    before, in this one and in the next; ``g`` is grad in this one.
    """
    x = load_group(z, at, line_stride, line, lines, ok, 0.0, LINES, FULL, WIDE)
    shortcut = load_group(s, at, line_stride, line, lines, ok, LOWEST, LINES, FULL, WIDE)
    new_gm = ()
    new_gz = ()
    for j in tl.static_range(LINES):
        total = g[j + 1] + on_y
        total += w[0] * latest[j + 2] + w[1] * newer[j + 2] + w[2] * older[j + 2]
        total += w[3] * latest[j + 1] + w[4] * newer[j + 1] + w[5] * older[j + 1]
        total += w[6] * latest[j] + w[7] * newer[j] + w[8] * older[j]
        y = tl.maximum(x[j] * factor + offset + shortcut[j], 0.0, propagate_nan=NAN)
        masked = tl.where(y == 0.0, 0.0, total)  # nan stays nan
        sums = (
            sums[0] + y * latest[j + 2], sums[1] + y * newer[j + 2], sums[2] + y * older[j + 2],
            sums[3] + y * latest[j + 1], sums[4] + y * newer[j + 1], sums[5] + y * older[j + 1],
            sums[6] + y * latest[j], sums[7] + y * newer[j], sums[8] + y * older[j],
            sums[9] + masked, sums[10] + masked * (x[j] - mean),
        )  # fmt: skip
        new_gm = new_gm + (masked,)
        new_gz = new_gz + (factor * masked,)
    store_group(gm, new_gm, at, line_stride, line, lines, ok, LINES, FULL, WIDE)
    if not BATCH:
        store_group(gz, new_gz, at, line_stride, line, lines, ok, LINES, FULL, WIDE)
    return sums


@triton.jit(do_not_specialize=[*VARYING, "later"])
def input_grads(
    grad, z, s, o, go, gm, gz, part, coefficients, on, factors, value, drop,
    grad_queries, grad_keys, query, key, table, capacity, later, t, B,
    C, lines, steps, tiles, programs, per_sample, all_groups, strips, length,
    BATCH: tl.constexpr, OUT_BATCH: tl.constexpr, QUERY: tl.constexpr, KEY: tl.constexpr,
    LINES: tl.constexpr, GROUPS: tl.constexpr, BC: tl.constexpr, LAST: tl.constexpr,
    EXACT: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr, STRIPS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Gradient of ``norm(z) + s``, which is the shortcut's: reads grad, z, s, writes gm.

    Gathers the value's gradient from the grad_o of ``later`` layers and the own one, which is grad
    itself (later + 4 N) or, with ``OUT_BATCH``, comes from grad and o and is stored as ``go`` (2 N
    more, 1 for t = 1). Without ``BATCH``, also writes the gradient of z, ``gz`` (1 N). Writes
    ``part`` ``[programs, 11, C]``: sums of the value's gradient times each neighbour of y (the
    gradient of W_v), of gm and of ``gm * (z - mean)``.
    """
    program = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    kept = c < C
    factor = tl.load(coefficients + FACTOR * C + c, kept, 0.0)[None, :]
    offset = tl.load(coefficients + OFFSET * C + c, kept, 0.0)[None, :]
    mean = tl.load(coefficients + MEAN * C + c, kept, 0.0)[None, :]
    scale = tl.full((1, 1), 1.0, tl.float32)
    on_grad = scale
    on_o = scale
    constant = scale
    if OUT_BATCH:
        on_grad = tl.load(on + c, kept, 0.0)[None, :]
        on_o = tl.load(on + C + c, kept, 0.0)[None, :]
        constant = tl.load(on + 2 * C + c, kept, 0.0)[None, :]
    c = c[None, :]
    kept = kept[None, :]
    if WIDE:
        lines = lines // LINES * LINES  # so that the compiler knows alignments
    line_stride = steps * C if LAST else 1
    step_stride = C if LAST else lines
    w = load_taps(value, scale, c, kept, False, LAST)
    sums = zeros(11, GROUPS, BC)
    for n in range(program, tiles, programs):
        _, exists, sample, line, step, own_steps = tile_of(
            n, per_sample, all_groups, strips, length, steps, LINES, GROUPS
        )
        exists = exists[:, None]
        line = line[:, None]
        ok = None if EXACT else kept & exists
        base = sample[:, None].to(tl.int64) * C * lines * steps
        at = line * line_stride + step * step_stride + (c if LAST else c * (lines * steps))
        row = sample[:, None] * C + c
        own_factor = tl.load(factors + (t - 1).to(tl.int64) * B * C + row, kept, 0.0)
        here = sample[:, None] * C
        on_y = means_grad(grad_queries + here, grad_keys + here, query, key, C, c, kept, QUERY, KEY)
        on_y = on_y / (lines * steps)
        dropped = on_grad
        if OUT_BATCH and drop is not None:
            dropped = on_grad * tl.load(drop + sample)[:, None]
        older = zeros(LINES + 2, GROUPS, BC)
        if STRIPS:  # noqa: SIM102 - known when compiling
            if step > 0:
                older = gather(
                    grad + base, o + base, go + base, at - step_stride, line_stride, line, lines,
                    ok, dropped, on_o, constant, own_factor, table, capacity, later, grad, factors,
                    base, row, kept, t, False, OUT_BATCH, LINES, FULL, WIDE,
                )[0]  # fmt: skip
        newer, g = gather(
            grad + base, o + base, go + base, at, line_stride, line, lines,
            ok, dropped, on_o, constant, own_factor, table, capacity, later, grad, factors,
            base, row, kept, t, True, OUT_BATCH, LINES, FULL, WIDE,
        )  # fmt: skip
        for _ in range(1, own_steps):
            x = at + step_stride
            latest, next_g = gather(
                grad + base, o + base, go + base, x, line_stride, line, lines,
                ok, dropped, on_o, constant, own_factor, table, capacity, later, grad, factors,
                base, row, kept, t, True, OUT_BATCH, LINES, FULL, WIDE,
            )  # fmt: skip
            sums = use_value_grads(
                older, newer, latest, g, z + base, s + base, gm + base, gz + base, at, line_stride,
                line, lines, ok, sums, w, factor, offset, mean, on_y, BATCH, LINES, FULL, WIDE,
            )  # fmt: skip
            older = newer
            newer = latest
            g = next_g
            at = x
        latest = zeros(LINES + 2, GROUPS, BC)
        if STRIPS:  # noqa: SIM102 - known when compiling
            if step + own_steps < steps:
                latest = gather(
                    grad + base, o + base, go + base, at + step_stride, line_stride, line, lines,
                    ok, dropped, on_o, constant, own_factor, table, capacity, later, grad, factors,
                    base, row, kept, t, False, OUT_BATCH, LINES, FULL, WIDE,
                )[0]  # fmt: skip
        sums = use_value_grads(
            older, newer, latest, g, z + base, s + base, gm + base, gz + base, at, line_stride,
            line, lines, ok, sums, w, factor, offset, mean, on_y, BATCH, LINES, FULL, WIDE,
        )  # fmt: skip
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    for k in tl.static_range(11):
        # Fields are rows and columns of W_v: lines and steps change places in NCHW.
        field = k if LAST or k >= 9 else (k % 3) * 3 + k // 3
        tl.store(part + (program * 11 + field) * C + c, tl.sum(sums[k], 0), c < C)
