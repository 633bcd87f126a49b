"""Pieces of Triton kernels: depthwise 3x3 convolutions, queries and keys, for both block ends.

A depthwise conv walks along one axis of the map and holds ``LINES`` neighbouring lines in
registers, so that each value is loaded and converted once per line and used by nine outputs. In
channels_last, lines are rows and steps are columns; in NCHW, lines are columns and steps are rows,
so that neighbouring threads read neighbouring addresses. The lines of all samples form groups of
``LINES``; a tile is a strip of steps of ``GROUPS`` groups and ``BC`` channels, and a program loops
over tiles. All blocks are ``[GROUPS, BC]``.

A name that a loop carries must start as a tensor of its own (``zeros``): of two names for one
tensor the compiler carries one.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import triton
import triton.language as tl

from mmrla.ops.kernels import NAN

LOWEST = tl.constexpr(-3.0e38)
"""Finite in bfloat16 and float32, and below any sum that could make it positive again."""


UNSPECIALISED = (
    "H", "W", "lines", "steps", "tiles", "programs", "per_sample", "all_groups", "strips", "length",
    "heads", "D", "chunks", "rows",
)  # fmt: skip
"""Integers whose divisibility buys nothing: one variant of a kernel for all."""


@triton.jit
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``COUNT`` blocks of zeros, each a tensor of its own."""
    blocks = ()
    for _ in tl.static_range(COUNT):
        blocks = blocks + (tl.zeros((ROWS, COLUMNS), tl.float32),)
    return blocks


# ---- depthwise convolutions ----------------------------------------------------------------------


@triton.jit
def filled(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, start):
    """As :func:`zeros`, plus ``start``."""
    blocks = ()
    for _ in tl.static_range(COUNT):
        blocks = blocks + (tl.zeros((ROWS, COLUMNS), tl.float32) + start,)
    return blocks


@triton.jit
def tile_of(
    n, per_sample, all_groups, strips, length, steps, LINES: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """What tile ``n`` covers: groups, counted through the batch, and steps.

    Returns each group's number, whether it exists, its sample and its first line, ``per_sample``
    groups being in each sample; the first step and the number of steps.
    """
    group = (n // strips) * GROUPS + tl.arange(0, GROUPS)
    exists = group < all_groups
    group = tl.minimum(group, all_groups - 1)
    line = (group % per_sample) * LINES
    step = (n % strips) * length
    return group, exists, group // per_sample, line, step, tl.minimum(length, steps - step)


@triton.jit
def load_taps(weight, scale, c, kept, FLIP: tl.constexpr, LAST: tl.constexpr):
    """A depthwise 3x3 weight times ``scale``, all per channel: tap ``3 * line + step``.

    ``FLIP``: the transposed convolution's.
    """
    taps = ()
    for k in tl.static_range(9):
        tap = k if LAST else (k % 3) * 3 + k // 3
        place = weight + c * 9 + (8 - tap if FLIP else tap)
        taps = taps + (tl.load(place, kept, 0.0).to(tl.float32) * scale,)
    return taps


@triton.jit
def plus_identity(taps):
    """Taps of the convolution plus its input."""
    total = ()
    for k in tl.static_range(9):
        total = total + (taps[k] + 1.0 if k == 4 else taps[k],)
    return total


@triton.jit
def line_mask(line, lines, ok, INDEX: tl.constexpr, LINES: tl.constexpr, FULL: tl.constexpr):
    """Whether each group's line ``INDEX`` is inside the map; None if all are and ``ok`` is None.

    ``FULL``: the lines 0 ... LINES - 1 are inside in all groups.
    """
    mask = ok
    if INDEX < 0:
        inside = line + INDEX >= 0
        mask = inside if ok is None else ok & inside
    elif INDEX >= LINES or not FULL:
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
def wide(at, LINES: tl.constexpr):
    """Offsets of all lines of each group, neighbours in memory, as a third dimension."""
    return at[:, :, None] + tl.arange(0, LINES)[None, None, :]


@triton.jit
def load_group(
    x, at, line_stride, line, lines, ok, OUTSIDE: tl.constexpr, LINES: tl.constexpr,
    FULL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Lines 0 ... LINES - 1 of one step, line 0 being at ``x + at``; ``OUTSIDE`` outside the map.

    ``x`` points at a sample, ``at`` is an offset of 32 bits. ``WIDE``: each group's 2 or 4 lines
    are one access, aligned and inside the map.
    """
    values = ()
    if WIDE:
        mask = None if ok is None else ok[:, :, None]
        group = load_line(x[:, :, None] + wide(at, LINES), mask, OUTSIDE)
        if LINES == 2:
            values = tl.split(group)
        else:
            group = tl.reshape(group, (group.shape[0], group.shape[1], 2, 2))
            even, odd = tl.split(group)
            first, third = tl.split(even)
            second, fourth = tl.split(odd)
            values = (first, second, third, fourth)
    else:
        for j in tl.static_range(LINES):
            mask = line_mask(line, lines, ok, j, LINES, FULL)
            values = values + (load_line(x + (at + j * line_stride), mask, OUTSIDE),)
    return values


@triton.jit
def store_group(
    x, values, at, line_stride, line, lines, ok, LINES: tl.constexpr, FULL: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Stores what :func:`load_group` would load."""
    if WIDE:
        if LINES == 2:
            group = tl.join(values[0], values[1])
        else:
            group = tl.join(tl.join(values[0], values[2]), tl.join(values[1], values[3]))
            group = tl.reshape(group, (group.shape[0], group.shape[1], 4))
        mask = None if ok is None else ok[:, :, None]
        tl.store(x[:, :, None] + wide(at, LINES), group.to(x.dtype.element_ty), mask)
    else:
        for j in tl.static_range(LINES):
            mask = line_mask(line, lines, ok, j, LINES, FULL)
            tl.store(x + (at + j * line_stride), values[j].to(x.dtype.element_ty), mask)


@triton.jit
def load_lines(
    x, at, line_stride, line, lines, ok, OUTSIDE: tl.constexpr, LINES: tl.constexpr,
    FULL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """As :func:`load_group`, with the lines before and after each group: -1 ... LINES."""
    before = line_mask(line, lines, ok, -1, LINES, FULL)
    after = line_mask(line, lines, ok, LINES, LINES, FULL)
    first = load_line(x + (at - line_stride), before, OUTSIDE)
    group = load_group(x, at, line_stride, line, lines, ok, OUTSIDE, LINES, FULL, WIDE)
    return (first,) + group + (load_line(x + (at + LINES * line_stride), after, OUTSIDE),)


@triton.jit
def load_y(
    z, s, at, line_stride, line, lines, ok, factor, offset, LINES: tl.constexpr,
    FULL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``y = relu(norm(z) + s)`` and s on lines -1 ... LINES of one step; y is 0 outside the map.

    It is so without a select, since s is hugely negative there.
    """
    shortcut = load_lines(s, at, line_stride, line, lines, ok, LOWEST, LINES, FULL, WIDE)
    values = load_lines(z, at, line_stride, line, lines, ok, 0.0, LINES, FULL, WIDE)
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
def head_block(first, heads, D, HEADS: tl.constexpr, WIDTH: tl.constexpr):
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
