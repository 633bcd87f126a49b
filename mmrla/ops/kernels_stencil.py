"""Pieces of Triton kernels: depthwise 3x3 stencils, queries and keys, for both block ends.

A stencil walks along one axis of the map and holds ``LINES`` neighbouring lines of it in registers,
so that each value is loaded and converted once per line and used by nine outputs. In channels_last,
lines are rows and steps are columns; in NCHW, lines are columns and steps are rows, so that
neighbouring threads read neighbouring addresses. The lines of all samples form groups of ``LINES``;
a tile is a strip of steps of ``GROUPS`` groups and ``BC`` channels, and a program loops over tiles.

A name that a loop carries must start as a tensor of its own (``zeros``): of two names for one
tensor the compiler carries one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmrla.ops.kernels import NAN

LOWEST = tl.constexpr(-3.0e38)
"""Finite in bfloat16 and float32, and below any sum that could make it positive again."""
OUTSIDE_LINE = tl.constexpr(1 << 30)
"""First line of a group that does not exist."""


@triton.jit
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``COUNT`` blocks of zeros, each a tensor of its own."""
    blocks = ()
    for _ in tl.static_range(COUNT):
        blocks = blocks + (tl.zeros((ROWS, COLUMNS), tl.float32),)
    return blocks


# ---- stencils ------------------------------------------------------------------------------------


@triton.jit
def tile_of(
    n, per_sample, all_groups, strips, length, steps, LINES: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """What tile ``n`` covers: each group's number, sample and first line, first step, steps.

    Groups are counted through the batch, ``per_sample`` in each sample; those past the last are
    the last again, and ``line`` puts them outside the map.
    """
    group = (n // strips) * GROUPS + tl.arange(0, GROUPS)
    exists = group < all_groups
    group = tl.where(exists, group, all_groups - 1)
    line = tl.where(exists, (group % per_sample) * LINES, OUTSIDE_LINE)
    step = (n % strips) * length
    return group, group // per_sample, line, step, tl.minimum(length, steps - step)


@triton.jit
def load_taps(weight, scale, c, kept, FLIP: tl.constexpr, LAST: tl.constexpr):
    """A depthwise 3x3 weight times ``scale``, all per channel: tap ``3 * line + step``.

    ``FLIP``: the transposed convolution's.
    """
    taps = ()
    for k in tl.static_range(9):
        tap = k if LAST else (k % 3) * 3 + k // 3
        taps = taps + (tl.load(weight + c * 9 + (8 - tap if FLIP else tap), kept, 0.0) * scale,)
    return taps


@triton.jit
def line_mask(line, lines, ok, INDEX: tl.constexpr, LINES: tl.constexpr, EXACT: tl.constexpr):
    """Whether each group's line ``INDEX`` is inside the map; None if all are and ``ok`` is None.

    ``EXACT``: the lines 0 ... LINES - 1 are inside for all groups.
    """
    mask = ok
    if INDEX < 0:
        inside = line + INDEX >= 0
        mask = inside if ok is None else ok & inside
    elif INDEX >= LINES or not EXACT:
        inside = line + INDEX < lines
        mask = inside if ok is None else ok & inside
    return mask


@triton.jit
def load_line(x, mask, OUTSIDE: tl.constexpr):
    """One value per channel and group in float32; ``OUTSIDE`` where the mask is false."""
    if mask is None:
        values = tl.load(x).to(tl.float32)
    elif x.dtype.element_ty == tl.float16 and OUTSIDE != 0.0:  # which float16 cannot hold
        values = tl.where(mask, tl.load(x, mask, 0.0).to(tl.float32), OUTSIDE)
    else:
        values = tl.load(x, mask, OUTSIDE).to(tl.float32)
    return values


@triton.jit
def load_lines(
    x, line_stride, line, lines, ok, OUTSIDE: tl.constexpr, LINES: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Lines -1 ... LINES of one step, ``x`` pointing at line 0; ``OUTSIDE`` outside the map."""
    values = ()
    for j in tl.static_range(LINES + 2):
        mask = line_mask(line, lines, ok, j - 1, LINES, EXACT)
        values = values + (load_line(x + (j - 1) * line_stride, mask, OUTSIDE),)
    return values


@triton.jit
def load_y(
    z, s, line_stride, line, lines, ok, factor, offset, LINES: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """``y = relu(norm(z) + s)`` and s on lines -1 ... LINES of one step; y is 0 outside the map.

    It is so without a select, since s is hugely negative there.
    """
    shortcut = load_lines(s, line_stride, line, lines, ok, LOWEST, LINES, EXACT)
    values = load_lines(z, line_stride, line, lines, ok, 0.0, LINES, EXACT)
    y = ()
    for j in tl.static_range(LINES + 2):
        normed = values[j] * factor + offset
        y = y + (tl.maximum(normed + shortcut[j], 0.0, propagate_nan=NAN),)
    return y, shortcut


@triton.jit
def spread(x, taps, before, here, start, LINES: tl.constexpr):
    """Adds lines -1 ... LINES of one step of a map to the outputs of three steps.

    ``before`` and ``here`` are the outputs of the step before x's and of x's own so far. Returns
    the outputs of the step before, finished, and ``before`` and ``here`` for the next step; the
    outputs that begin do so with ``start``.
    """
    done = ()
    own = ()
    following = ()
    for j in tl.static_range(LINES):
        done = done + (before[j] + taps[2] * x[j] + taps[5] * x[j + 1] + taps[8] * x[j + 2],)
        own = own + (here[j] + taps[1] * x[j] + taps[4] * x[j + 1] + taps[7] * x[j + 2],)
        following = following + (start + taps[0] * x[j] + taps[3] * x[j + 1] + taps[6] * x[j + 2],)
    return done, own, following


# ---- queries and keys ----------------------------------------------------------------------------


@triton.jit
def head_block(first, heads, D: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Channels ``[HEADS, WIDTH]`` of ``HEADS`` heads from ``first`` on, and which exist."""
    head = first + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, WIDTH)[None, :]
    return head * D + d, (head < heads) & (d < D)


@triton.jit
def sum_chunks(x, chunks, C, c, ok, CHUNKS: tl.constexpr):
    """The sum over ``chunks`` rows of ``x[row * C + c]``, ``c`` a block; ``CHUNKS`` at a time."""
    total = tl.zeros((CHUNKS, c.shape[0], c.shape[1]), tl.float32)
    for first in range(0, chunks, CHUNKS):
        row = first + tl.arange(0, CHUNKS)[:, None, None]
        total += tl.load(x + row * C + c[None, :, :], (row < chunks) & ok[None, :, :], 0.0)
    return tl.sum(total, 0)


@triton.jit
def query_key(
    sums, chunks, HW, query, key, C, c, ok,
    QUERY: tl.constexpr, KEY: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Query, key and channel means of one sample for a block of channels.

    ``sums`` ``[chunks, C]``: the sample's sums over pixels. ``QUERY``, ``KEY``: kernel sizes.
    """
    HALF: tl.constexpr = max(QUERY, KEY) // 2
    q = tl.zeros(c.shape, tl.float32)
    k = tl.zeros(c.shape, tl.float32)
    own = tl.zeros(c.shape, tl.float32)
    for shift in tl.static_range(-HALF, HALF + 1):
        near = c + shift
        mean = sum_chunks(sums, chunks, C, near, ok & (near >= 0) & (near < C), CHUNKS) / HW
        if shift + QUERY // 2 >= 0 and shift + QUERY // 2 < QUERY:
            q += mean * tl.load(query + shift + QUERY // 2).to(tl.float32)
        if shift + KEY // 2 >= 0 and shift + KEY // 2 < KEY:
            k += mean * tl.load(key + shift + KEY // 2).to(tl.float32)
        if shift == 0:
            own += mean
    return q, k, own


@triton.jit
def conv1d_transposed(grad, weight, C, c, kept, TAPS: tl.constexpr):
    """Gradient of a Conv1D's input at channels ``c``, from that of its output ``[C]``."""
    total = tl.zeros(c.shape, tl.float32)
    for j in tl.static_range(TAPS):
        seen_by = c - j + TAPS // 2
        ok = kept & (seen_by >= 0) & (seen_by < C)
        total += tl.load(grad + seen_by, ok, 0.0) * tl.load(weight + j).to(tl.float32)
    return total


@triton.jit
def means_grad(
    grad_query, grad_key, query, key, C, c, kept, QUERY: tl.constexpr, KEY: tl.constexpr
):  # fmt: skip
    """Gradient of one sample's channel means, from those of its query and key ``[C]``."""
    from_query = conv1d_transposed(grad_query, query, C, c, kept, QUERY)
    return from_query + conv1d_transposed(grad_key, key, C, c, kept, KEY)


@triton.jit
def conv1d_weight_grad(grad, means, C, c, ok, TAPS: tl.constexpr, WIDTH: tl.constexpr):
    """Gradient of a Conv1D's weight ``[WIDTH]`` from one block of output channels.

    ``WIDTH``: a power of two, at least ``TAPS``.
    """
    index = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for j in tl.static_range(TAPS):
        near = c + j - TAPS // 2
        mean = tl.load(means + near, ok & (near >= 0) & (near < C), 0.0)
        total += tl.where(index == j, tl.sum(grad * mean), 0.0)
    return total
