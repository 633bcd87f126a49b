"""Kernels of MRLA-light's block end: the gate, and the passes that make o.

``y = relu(norm(z) + s)``, ``o = gate * conv(y) + lambda_t * s``, ``out = y + drop * norm'(o)``.
Neither y nor o is ever stored: both are made again from z and s wherever they are needed.
N is the size of a map.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import triton
import triton.language as tl

from mmrla.ops.kernels import (
    FACTOR,
    MEAN,
    OFFSET,
    PIVOT,
    finish_norm,
    load_vector,
    norm_backward,
    norm_parameter_grads,
)
from mmrla.ops.kernels_depthwise import (
    LOWEST,
    UNSPECIALISED,
    conv1d_weight_grad,
    filled,
    head_block,
    line_mask,
    load_group,
    load_line,
    load_taps,
    load_y,
    plus_identity,
    query_key,
    spread,
    store_group,
    sum_chunks,
    tile_of,
)

OUT_SUMS = tl.constexpr(0)
OUT = tl.constexpr(1)
GRAD_SUMS = tl.constexpr(2)
GRADS = tl.constexpr(3)


@triton.jit(do_not_specialize=UNSPECIALISED)
def gate_forward(
    sums, query, key, gate, means, queries, keys,
    z, s, coefficients, value, lambda_t, out_coefficients,
    C, H, W, heads, D, chunks, inverse_root,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
    QUERY: tl.constexpr, KEY: tl.constexpr,
    KEEP: tl.constexpr, OUT_BATCH: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """The gate ``[B, heads]`` from ``sums`` ``[B, chunks, C]``, and o's pivot if it needs one.

    With ``KEEP``, also stores means, queries and keys, ``[B, C]``.
    """
    sample = tl.program_id(0)
    first = tl.program_id(1) * HEADS
    c, ok = head_block(first, heads, D, HEADS, WIDTH)
    q, k, mean = query_key(
        sums + sample * chunks * C, chunks, H * W, query, key, C, c, ok, QUERY, KEY, CHUNKS
    )
    weight = tl.sigmoid(tl.sum(q * k, 1) * inverse_root)
    head = first + tl.arange(0, HEADS)
    tl.store(gate + sample * heads + head, weight, head < heads)
    if KEEP:
        at = sample * C + c
        tl.store(means + at, mean, ok)
        tl.store(queries + at, q, ok)
        tl.store(keys + at, k, ok)
    if OUT_BATCH and sample == 0:  # o in the middle of the first map
        factor = tl.load(coefficients + FACTOR * C + c, ok, 0.0)
        offset = tl.load(coefficients + OFFSET * C + c, ok, 0.0)
        total = tl.zeros((HEADS, WIDTH), tl.float32)
        for tap in tl.static_range(9):
            row = H // 2 + tap // 3 - 1
            column = W // 2 + tap % 3 - 1
            inside = ok & (row >= 0) & (row < H) & (column >= 0) & (column < W)
            pixel = row * W + column
            at = pixel * C + c if LAST else pixel + c * (H * W)
            y = load_line(z + at, inside, 0.0) * factor + offset
            y = tl.maximum(y + load_line(s + at, inside, LOWEST), 0.0)
            total += y * tl.load(value + c * 9 + tap, ok, 0.0).to(tl.float32)
        pixel = H // 2 * W + W // 2
        at = pixel * C + c if LAST else pixel + c * (H * W)
        previous = tl.load(lambda_t + c, ok, 0.0).to(tl.float32) * load_line(s + at, ok, 0.0)
        tl.store(out_coefficients + PIVOT * C + c, weight[:, None] * total + previous, ok)


@triton.jit(do_not_specialize=UNSPECIALISED)
def gate_backward(
    dots, means, queries, keys, grad_queries, grad_keys, tap_part,
    C, heads, D, rows, inverse_root,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
    QUERY: tl.constexpr, KEY: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and keys ``[B, C]``; ``tap_part``: a row ``[2, TAPS]`` per program.

    ``dots`` ``[B, rows, C]``: sums of o's gradient times ``gate * conv(y)``.
    """
    sample = tl.program_id(0)
    first = tl.program_id(1) * HEADS
    c, ok = head_block(first, heads, D, HEADS, WIDTH)
    dot = sum_chunks(dots + sample * rows * C, rows, C, c, ok, CHUNKS)
    at = sample * C + c
    q = tl.load(queries + at, ok, 0.0)
    k = tl.load(keys + at, ok, 0.0)
    complement = tl.sigmoid(-tl.sum(q * k, 1) * inverse_root)  # 1 - gate, exact for gates near 1
    grad_logit = (complement * tl.sum(dot, 1) * inverse_root)[:, None]
    grad_query = grad_logit * k
    grad_key = grad_logit * q
    tl.store(grad_queries + at, grad_query, ok)
    tl.store(grad_keys + at, grad_key, ok)
    row = tap_part + (sample * tl.num_programs(1) + tl.program_id(1)) * 2 * TAPS
    tap = tl.arange(0, TAPS)
    own = means + sample * C
    tl.store(row + tap, conv1d_weight_grad(grad_query, own, C, c, ok, QUERY, TAPS))
    tl.store(row + TAPS + tap, conv1d_weight_grad(grad_key, own, C, c, ok, KEY, TAPS))


@triton.jit
def add_shares(sums, s, slope, LINES: tl.constexpr):
    """Each of ``sums`` plus ``slope`` times lines 0 ... LINES - 1 of s."""
    total = ()
    for j in tl.static_range(LINES):
        total = total + (sums[j] + slope * s[j + 1],)
    return total


@triton.jit
def use_outputs(
    done, s, grad, result, at, line_stride, line, lines, ok, totals, scale, on_grad, on_x,
    previous, constant,
    MODE: tl.constexpr, OUT_BATCH: tl.constexpr, LINES: tl.constexpr, FULL: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """What :func:`attention` does with the outputs of one step; returns the new ``totals``."""
    first, second, third, dot = totals
    if MODE == OUT:
        store_group(result, done, at, line_stride, line, lines, ok, LINES, FULL, WIDE)
    else:
        g = ()
        shortcut = ()
        new = ()
        if MODE != OUT_SUMS:
            g = load_group(grad, at, line_stride, line, lines, ok, 0.0, LINES, FULL, WIDE)
        if MODE == GRADS:
            shortcut = load_group(s, at, line_stride, line, lines, ok, 0.0, LINES, FULL, WIDE)
        for j in tl.static_range(LINES):
            mask = line_mask(line, lines, ok, j, LINES, FULL)
            x = done[j]
            if mask is not None:  # outside, s is hugely negative and x may be infinite
                x = tl.where(mask, x, 0.0)
            if MODE == OUT_SUMS:
                first += x
                second += x * x
            elif MODE == GRAD_SUMS:
                first += scale * g[j]
                second += g[j] * x
            elif OUT_BATCH:
                own = on_grad * g[j] + (on_x * (x + previous * shortcut[j]) + constant)
                if mask is not None:
                    own = tl.where(mask, own, 0.0)
                dot += own * x
                third += own * shortcut[j]
                new = new + (own,)
            else:
                own = scale * g[j]
                first += own
                second += own * (x + (previous * shortcut[j] + constant))
                third += own * shortcut[j]
                dot += own * x
        if MODE == GRADS and OUT_BATCH:
            store_group(result, new, at, line_stride, line, lines, ok, LINES, FULL, WIDE)
    return first, second, third, dot


@triton.jit(do_not_specialize=UNSPECIALISED)
def attention(
    z, s, grad, result, part, lambda_part, dots, coefficients, gate, value, lambda_t, drop,
    in_part, weight, bias, running_mean, running_var, out_coefficients, grad_out_norm,
    C, lines, steps, tiles, programs, per_sample, all_groups, strips, length, heads, D,
    rows, count, momentum, eps,
    MODE: tl.constexpr, OUT_BATCH: tl.constexpr, KEEP: tl.constexpr,
    LINES: tl.constexpr, GROUPS: tl.constexpr, BC: tl.constexpr, LAST: tl.constexpr,
    EXACT: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr, STRIPS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One of four passes that make y and o again from z and s.

    - ``OUT_SUMS``, 2 N: ``part`` ``[programs, 2, C]``, sums of ``o - pivot`` and of its square.
    - ``OUT``, 3 N: ``result = y + drop * norm(o)``. Finishes the norm from ``in_part``
      (:func:`finish_norm`).
    - ``GRAD_SUMS``, 3 N: ``part``, sums of ``drop * grad`` and of that times ``o - mean``.
    - ``GRADS``, 4 N: ``result``, the gradient of o, and ``dots``, one row ``[C]`` per group and
      strip: sums of it times ``gate * conv(y)``; ``lambda_part`` ``[programs, C]``, sums of it
      times s. Finishes ``grad_out_norm`` from ``in_part``, the sums of ``GRAD_SUMS``. Of a frozen
      norm, 3 N: o's gradient is ``drop * factor * grad`` and not stored, and ``part`` are the sums
      of ``GRAD_SUMS``.
    """
    program = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    kept = c < C
    factor = tl.load(coefficients + FACTOR * C + c, kept, 0.0)[None, :]
    offset = tl.load(coefficients + OFFSET * C + c, kept, 0.0)[None, :]
    previous = load_vector(lambda_t, c, kept, 0.0)[None, :]
    on_x = tl.zeros((BC,), tl.float32)
    constant = tl.zeros((BC,), tl.float32)
    if MODE == OUT_SUMS:
        constant = -tl.load(out_coefficients + PIVOT * C + c, kept, 0.0)
    elif MODE == OUT:
        pivot = tl.zeros((BC,), tl.float32)
        if OUT_BATCH:
            pivot = tl.load(out_coefficients + PIVOT * C + c, kept, 0.0)
        on_x, constant = finish_norm(
            in_part, rows, pivot, count, weight, bias, running_mean, running_var, momentum, eps,
            out_coefficients, C, c, kept, program == 0, OUT_BATCH, KEEP, ROWS,
        )  # fmt: skip
    elif MODE == GRADS and OUT_BATCH:
        factors = norm_backward(in_part, rows, 2 * C, count, out_coefficients, C, c, kept, ROWS)
        on_x = factors[1]
        constant = factors[2]
        if program == 0:
            norm_parameter_grads(
                in_part, rows, 2 * C, out_coefficients, grad_out_norm, C, c, kept, ROWS
            )
    else:
        constant = -tl.load(out_coefficients + MEAN * C + c, kept, 0.0)
    on_x = on_x[None, :]
    constant = constant[None, :]
    c = c[None, :]
    kept = kept[None, :]
    if WIDE:
        lines = lines // LINES * LINES  # so that the compiler knows alignments
    line_stride = steps * C if LAST else 1
    step_stride = C if LAST else lines
    first = tl.zeros((GROUPS, BC), tl.float32)
    second = tl.zeros((GROUPS, BC), tl.float32)
    third = tl.zeros((GROUPS, BC), tl.float32)
    for n in range(program, tiles, programs):
        group, exists, sample, line, step, own_steps = tile_of(
            n, per_sample, all_groups, strips, length, steps, LINES, GROUPS
        )
        group = group[:, None]
        exists = exists[:, None]
        sample = sample[:, None]
        line = line[:, None]
        ok = None if EXACT else kept & exists
        # Offsets inside a sample fit into 32 bits, which saves registers.
        base = sample.to(tl.int64) * C * lines * steps
        at = line * line_stride + step * step_stride + (c if LAST else c * (lines * steps))
        scale = tl.full((1, 1), 1.0, tl.float32)
        if drop is not None:
            scale = tl.load(drop + sample)
        weights = tl.load(gate + sample * heads + c // D, kept, 0.0)
        # Outputs are start + conv(y; weights) + slope * s, so that norm and drop cost nothing;
        # of GRADS, s is added later, since dots are sums with the part of the convolution alone.
        slope = previous
        start = constant
        if MODE == OUT:
            weights = weights * (scale * on_x)
            slope = previous * (scale * on_x)
            start = scale * constant
        elif MODE == GRAD_SUMS:
            weights = weights * scale
            slope = previous * scale
            start = scale * constant
        elif MODE == GRADS:
            start = tl.zeros((1, 1), tl.float32)
        on_grad = scale
        if MODE == GRADS:  # loaded again for each tile: registers are scarce
            on_grad = scale * tl.load(out_coefficients + FACTOR * C + c, kept, 0.0)
        taps = load_taps(value, weights, c, kept, False, LAST)
        if MODE == OUT:
            taps = plus_identity(taps)
        # Before the first step, then the first: nothing is finished yet.
        here = filled(LINES, GROUPS, BC, start)
        if STRIPS:  # noqa: SIM102 - known when compiling
            if step > 0:
                y, shortcut = load_y(
                    z + base, s + base, at - step_stride, line_stride, line, lines, ok,
                    factor, offset, LINES, FULL, WIDE,
                )  # fmt: skip
                here = spread(y, taps, here, here, start, LINES)[2]
        y, shortcut = load_y(
            z + base, s + base, at, line_stride, line, lines, ok, factor, offset, LINES, FULL, WIDE
        )
        _, before, here = spread(y, taps, here, here, start, LINES)
        if MODE != GRADS:
            before = add_shares(before, shortcut, slope, LINES)
        dot = tl.zeros((GROUPS, BC), tl.float32)
        for _ in range(1, own_steps):
            x = at + step_stride
            y, shortcut = load_y(
                z + base, s + base, x, line_stride, line, lines, ok, factor, offset, LINES, FULL,
                WIDE,
            )  # fmt: skip
            done, before, here = spread(y, taps, before, here, start, LINES)
            first, second, third, dot = use_outputs(
                done, s + base, grad + base, result + base, at, line_stride, line, lines, ok,
                (first, second, third, dot), scale, on_grad, on_x, previous, constant,
                MODE, OUT_BATCH, LINES, FULL, WIDE,
            )  # fmt: skip
            if MODE != GRADS:
                before = add_shares(before, shortcut, slope, LINES)
            at = x
        done = before
        if STRIPS:  # noqa: SIM102 - known when compiling
            if step + own_steps < steps:
                y, shortcut = load_y(
                    z + base, s + base, at + step_stride, line_stride, line, lines, ok,
                    factor, offset, LINES, FULL, WIDE,
                )  # fmt: skip
                done = spread(y, taps, before, here, start, LINES)[0]
        first, second, third, dot = use_outputs(
            done, s + base, grad + base, result + base, at, line_stride, line, lines, ok,
            (first, second, third, dot), scale, on_grad, on_x, previous, constant,
            MODE, OUT_BATCH, LINES, FULL, WIDE,
        )  # fmt: skip
        if MODE == GRADS:
            if not OUT_BATCH:  # on_grad contains scale, and dot does already
                dot *= tl.load(out_coefficients + FACTOR * C + c, kept, 0.0)
            row = group * strips + n % strips
            tl.store(dots + row * C + c, dot, exists & kept)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    if MODE != OUT and not (MODE == GRADS and OUT_BATCH):
        row = part + program * 2 * C + c
        tl.store(row, tl.sum(first, 0), c < C)
        tl.store(row + C, tl.sum(second, 0), c < C)
    if MODE == GRADS:
        total = tl.sum(third, 0)
        if not OUT_BATCH:
            total *= tl.load(out_coefficients + FACTOR * C + c, c < C, 0.0)
        tl.store(lambda_part + program * C + c, total, c < C)
