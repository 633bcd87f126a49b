"""Kernel of MRLA-light's backward: from o's gradient to the block's, and the gradient of W_v."""

# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import triton
import triton.language as tl

from mmrla.ops.kernels import FACTOR, MEAN, NAN, OFFSET, load_vector
from mmrla.ops.kernels_depthwise import (
    LOWEST,
    UNSPECIALISED,
    filled,
    load_group,
    load_lines,
    load_taps,
    means_grad,
    spread,
    store_group,
    tile_of,
    zeros,
)

FIELDS = tl.constexpr(9)
"""Sums of products per channel: the taps of W_v."""


@triton.jit
def use_input_grads(
    done, older, newer, latest, z, s, grad, gm, gs, at, line_stride, line, lines, ok, sums,
    factor, offset, mean, weights, previous,
    BATCH: tl.constexpr, OUT_BATCH: tl.constexpr, LINES: tl.constexpr, FULL: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """What :func:`input_grads` does for one step; returns the new ``sums``.

    ``older``, ``newer`` and ``latest`` are lines -1 ... LINES of o's gradient in the step before,
    in this one and in the next.
    """
    x = load_group(z, at, line_stride, line, lines, ok, 0.0, LINES, FULL, WIDE)
    shortcut = load_group(s, at, line_stride, line, lines, ok, LOWEST, LINES, FULL, WIDE)
    g = newer[1:]
    if OUT_BATCH:
        g = load_group(grad, at, line_stride, line, lines, ok, 0.0, LINES, FULL, WIDE)
    new_gm = ()
    new_gs = ()
    for j in tl.static_range(LINES):
        own = newer[j + 1]
        y = tl.maximum(x[j] * factor + offset + shortcut[j], 0.0, propagate_nan=NAN)
        masked = tl.where(y == 0.0, 0.0, done[j] + g[j])  # nan stays nan
        y = y * weights
        sums = (
            sums[0] + y * latest[j + 2], sums[1] + y * newer[j + 2], sums[2] + y * older[j + 2],
            sums[3] + y * latest[j + 1], sums[4] + y * own, sums[5] + y * older[j + 1],
            sums[6] + y * latest[j], sums[7] + y * newer[j], sums[8] + y * older[j],
            sums[9] + masked, sums[10] + masked * (x[j] - mean),
        )  # fmt: skip
        if BATCH:
            new_gm = new_gm + (masked,)
        else:
            new_gm = new_gm + (factor * masked,)
            new_gs = new_gs + (masked + previous * own,)
    store_group(gm, new_gm, at, line_stride, line, lines, ok, LINES, FULL, WIDE)
    if not BATCH:
        store_group(gs, new_gs, at, line_stride, line, lines, ok, LINES, FULL, WIDE)
    return sums


@triton.jit(do_not_specialize=UNSPECIALISED)
def input_grads(
    go, z, s, grad, gm, gs, part, coefficients, gate, value, lambda_t, drop, out_coefficients,
    grad_queries, grad_keys, query, key,
    C, lines, steps, tiles, programs, per_sample, all_groups, strips, length, heads, D,
    BATCH: tl.constexpr, OUT_BATCH: tl.constexpr,
    QUERY: tl.constexpr, KEY: tl.constexpr,
    LINES: tl.constexpr, GROUPS: tl.constexpr, BC: tl.constexpr, LAST: tl.constexpr,
    EXACT: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr, STRIPS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """``gm = (y > 0) * (grad + conv^T(go) + means' gradient / HW)``: reads go, grad, z, s (5 N).

    Writes ``part`` ``[programs, 11, C]``: sums of go times each neighbour of y (the gradient of
    W_v), of gm and of ``gm * (z - mean)``. Without ``BATCH``, ``factor * gm`` is the
    gradient of z and stored instead, and so is the shortcut's, ``gm + lambda_t * go`` (6 N).
    Without ``OUT_BATCH``, ``go`` is ``grad`` itself, which is then read once, and the frozen norm's
    factor and ``drop`` are applied here.
    """
    program = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    kept = c < C
    factor = tl.load(coefficients + FACTOR * C + c, kept, 0.0)[None, :]
    offset = tl.load(coefficients + OFFSET * C + c, kept, 0.0)[None, :]
    mean = tl.load(coefficients + MEAN * C + c, kept, 0.0)[None, :]
    previous = load_vector(lambda_t, c, kept, 0.0)[None, :]
    on_grad = tl.full((1, 1), 1.0, tl.float32)
    if not OUT_BATCH:
        on_grad = tl.load(out_coefficients + FACTOR * C + c, kept, 0.0)[None, :]
    c = c[None, :]
    kept = kept[None, :]
    if WIDE:
        lines = lines // LINES * LINES  # so that the compiler knows alignments
    line_stride = steps * C if LAST else 1
    step_stride = C if LAST else lines
    sums = zeros(11, GROUPS, BC)
    for n in range(program, tiles, programs):
        _, exists, sample, line, step, own_steps = tile_of(
            n, per_sample, all_groups, strips, length, steps, LINES, GROUPS
        )
        exists = exists[:, None]
        sample = sample[:, None]
        line = line[:, None]
        ok = None if EXACT else kept & exists
        base = sample.to(tl.int64) * C * lines * steps
        at = line * line_stride + step * step_stride + (c if LAST else c * (lines * steps))
        share = on_grad
        if not OUT_BATCH and drop is not None:
            share = on_grad * tl.load(drop + sample)
        weights = tl.load(gate + sample * heads + c // D, kept, 0.0) * share
        taps = load_taps(value, weights, c, kept, True, LAST)
        start = means_grad(
            grad_queries + sample * C, grad_keys + sample * C, query, key, C, c, kept, QUERY, KEY
        )
        start = start / (lines * steps)
        on_shortcut = previous * share
        here = filled(LINES, GROUPS, BC, start)
        older = zeros(LINES + 2, GROUPS, BC)
        if STRIPS:  # noqa: SIM102 - known when compiling
            if step > 0:
                older = load_lines(
                    go + base, at - step_stride, line_stride, line, lines, ok, 0.0, LINES, FULL,
                    WIDE,
                )  # fmt: skip
                here = spread(older, taps, here, here, start, LINES)[2]
        newer = load_lines(go + base, at, line_stride, line, lines, ok, 0.0, LINES, FULL, WIDE)
        _, before, here = spread(newer, taps, here, here, start, LINES)
        for _ in range(1, own_steps):
            x = at + step_stride
            latest = load_lines(go + base, x, line_stride, line, lines, ok, 0.0, LINES, FULL, WIDE)
            done, before, here = spread(latest, taps, before, here, start, LINES)
            sums = use_input_grads(
                done, older, newer, latest, z + base, s + base, grad + base, gm + base, gs + base,
                at, line_stride, line, lines, ok, sums, factor, offset, mean, weights,
                on_shortcut, BATCH, OUT_BATCH, LINES, FULL, WIDE,
            )  # fmt: skip
            older = newer
            newer = latest
            at = x
        latest = zeros(LINES + 2, GROUPS, BC)
        done = before
        if STRIPS:  # noqa: SIM102 - known when compiling
            if step + own_steps < steps:
                latest = load_lines(
                    go + base, at + step_stride, line_stride, line, lines, ok, 0.0, LINES, FULL,
                    WIDE,
                )  # fmt: skip
                done = spread(latest, taps, before, here, start, LINES)[0]
        sums = use_input_grads(
            done, older, newer, latest, z + base, s + base, grad + base, gm + base, gs + base, at,
            line_stride, line, lines, ok, sums, factor, offset, mean, weights,
            on_shortcut, BATCH, OUT_BATCH, LINES, FULL, WIDE,
        )  # fmt: skip
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    for k in tl.static_range(11):
        # Fields are rows and columns of W_v: lines and steps change places in NCHW.
        field = k if LAST or k >= 9 else (k % 3) * 3 + k // 3
        tl.store(part + (program * 11 + field) * C + c, tl.sum(sums[k], 0), c < C)
