"""MRLA-base's block end by Triton kernels: forward and backward on the host.

N is the size of a map, t the number of layers so far, n that of later layers. Of each layer z, s
and its value are kept; y is made again from z and s. Bytes moved and launches for at most 8 layers,
by the norms' statistics (the block's norm, the attention's):

=============== ==================== =========================
norms           forward              backward
=============== ==================== =========================
batch, batch    t + 9 N, 5           t + n + 11 N, 5
batch, frozen   t + 7 N, 4           t + n + 8 N, 5
frozen, batch   t + 8 N, 4           t + n + 9 N, 5
frozen, frozen  t + 6 N, 3           t + n + 6 N, 5
=============== ==================== =========================

With statistics of o, one N less forward and two less backward for t = 1, where o is the value. Each
further 8 layers take one more launch, which writes addresses into a table.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mmrla.ops.blocks import (
    FLAT_WARPS,
    Plan,
    aligned,
    buffer,
    channels_are_last,
    even_programs,
    multiprocessors,
    plan_for,
    power_of_two,
)
from mmrla.ops.kernels import (
    COEFFICIENTS,
    INVERSE_STD,
    MEAN,
    channel_sums,
    input_norm_grads,
    parameter_grads,
)
from mmrla.ops.kernels_base_backward import FIELDS, input_grads, retrieval_sums, softmax_backward
from mmrla.ops.kernels_base_forward import (
    ADDRESSES,
    add_retrieved,
    attend,
    fill_tables,
    make_value,
    retrieve,
)
from mmrla.ops.reference import BaseWeights, Norm

FIELD_COUNT: int = FIELDS.value
TABLE_STEP: int = ADDRESSES.value
HEAD_CHANNELS = 128
"""Channels per program of the kernels without maps, if a head has no more."""
CHUNK_ELEMENTS = 2048
"""Partial sums that such a program reads at once."""
HEAD_PROGRAMS = 2048
"""The most of such programs in backward; each has some samples."""
MOST_LAYERS = 16
"""How many layers the softmax has room for; twice as many if that is too few, and so on."""
SUMS_PIXELS = 64
"""Pixels and channels per block of retrieval_sums."""
SUMS_CHANNELS = 64


class BasePlan(NamedTuple):
    """What follows from shape, layout, weights and the number of layers; worked out once."""

    plan: Plan
    heads: int
    head_grid: tuple[int, int]
    head_options: dict[str, int]
    """Compile-time constants of the kernels without maps."""
    samples: int
    """Per program of softmax_backward."""
    taps: int
    """Room for the taps of W_q, and of W_k."""
    capacity: int
    """Of a table of addresses."""
    sums_grid: tuple[int, int]
    sums: tuple[int, int, int]
    """Of retrieval_sums: programs per block of channels, sums per sample, blocks per sum."""
    sums_options: dict[str, Any]
    kept: list[int]
    """Numbers of floats: both norms' coefficients, means, queries, attention."""
    forward_scratch: list[int]
    """Partial sums of the norms, sums over pixels."""
    backward_scratch: list[int]
    """Partial sums of parameters, of the other norm, dots, what makes grad_o, queries' gradient,
    taps."""
    grads: list[int]
    """Both norms' parameters, value, taps."""
    grad_views: list[int]
    """The same floats parameter by parameter, each after the floats that it leaves out."""


@functools.lru_cache(maxsize=4096)
def base_plan(
    shape: torch.Size, last: bool, sms: int, head_channels: int, query: int, key: int, t: int,
    batch: bool,
) -> BasePlan:  # fmt: skip
    """See :class:`BasePlan`.

    ``query`` and ``key`` are kernel sizes; ``batch``: whether o's norm takes the batch's
    statistics.
    """
    plan = plan_for(*shape, last, sms)
    B, C, _, _ = shape
    heads = C // head_channels
    width = power_of_two(head_channels)
    per_program = max(1, HEAD_CHANNELS // width)
    head_blocks = triton.cdiv(heads, per_program)
    options = dict(
        QUERY=query, KEY=key, MOST=max(MOST_LAYERS, power_of_two(t)), HEADS=per_program,
        WIDTH=width, CHUNKS=max(1, CHUNK_ELEMENTS // (per_program * width)),
    )  # fmt: skip
    taps = power_of_two(max(query, key))
    grid, sums, sums_options = retrieval_blocks(plan, sms)
    walk, ring = plan.walk, plan.ring_walk
    kinds = 3 if batch else 1
    two, nine = aligned([2 * C, 9 * C])
    return BasePlan(
        plan, heads, (B, head_blocks), options, max(1, B * head_blocks // HEAD_PROGRAMS), taps,
        triton.cdiv(t, TABLE_STEP) * TABLE_STEP, grid, sums, sums_options,
        kept=aligned([COEFFICIENTS * C, COEFFICIENTS * C, B * C, B * C, t * B * heads]),
        forward_scratch=aligned([2 * C * plan.flat.programs, B * C * walk.groups * walk.strips]),
        backward_scratch=aligned([
            (FIELD_COUNT + 2) * C * ring.programs, 2 * C * grid[0], B * t * kinds * sums[1] * C,
            3 * C, B * C, 2 * taps * B * head_blocks,
        ]),
        grads=[two, two, nine, 2 * taps],
        grad_views=[
            0, C, 0, C, two - 2 * C, C, 0, C, two - 2 * C, 9 * C,
            nine - 9 * C, query, taps - query, key, taps - key,
        ],
    )  # fmt: skip


def retrieval_blocks(
    plan: Plan, sms: int
) -> tuple[tuple[int, int], tuple[int, int, int], dict[str, Any]]:
    """Blocks of retrieval_sums: small, since grad and o stay in registers.

    Few sums per sample, but enough of them for all programs.
    """
    B, C, _, _ = plan.sizes
    pixels = min(SUMS_PIXELS, power_of_two(plan.pixels))
    channels = min(SUMS_CHANNELS, power_of_two(C))
    blocks, channel_blocks = triton.cdiv(plan.pixels, pixels), triton.cdiv(C, channels)
    chunk = max(1, blocks // triton.cdiv(FLAT_WARPS * sms, B * channel_blocks))
    chunks = triton.cdiv(blocks, chunk)
    unit = plan.flat.options["UNIT"]
    # Narrow loads take registers for addresses: fewer of them per thread.
    warps = max(1, pixels * channels // (1024 if plan.last or unit > 1 else 512))
    programs = even_programs(B * chunks, max(1, sms * FLAT_WARPS // warps // channel_blocks))
    options = dict(
        BP=pixels, BC=channels, LAST=plan.last, UNIT=unit, num_warps=warps,
        num_stages=1,
    )  # fmt: skip
    return (programs, channel_blocks), (programs, chunks, chunk), options


def base_plan_of(z: Tensor, w: BaseWeights, t: int, out_norm: Norm) -> BasePlan:
    """The plan for maps like ``z``."""
    return base_plan(
        z.shape, channels_are_last(z), multiprocessors(z.device), w.head_channels,
        w.query.shape[-1], w.key.shape[-1], t, out_norm.batch,
    )  # fmt: skip


def addressable(x: Tensor) -> Tensor:
    """``x``, or a copy at an address that a table may hold."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def batches(tensors: Sequence[Tensor], capacity: int, filler: Tensor) -> list[tuple[Tensor, ...]]:
    """``tensors``, then fillers of their dtype, in tuples of what one launch writes to a table."""
    row = [*tensors, *[filler] * (capacity - len(tensors))]
    return [tuple(row[k : k + TABLE_STEP]) for k in range(0, capacity, TABLE_STEP)]


def statistics_of(saved: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation that the norm used, from what forward kept."""
    C = saved[0].numel() // COEFFICIENTS
    return tuple(saved[0][k.value * C :][:C] for k in (MEAN, INVERSE_STD))  # type: ignore


def without_maps(saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What forward kept less its maps: it keeps none."""
    return saved


def base_forward(
    z: Tensor,
    s: Tensor,
    norm: Norm,
    w: BaseWeights,
    out_norm: Norm,
    drop: Tensor | None,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """``out`` of :func:`mmrla.ops.reference.base_tail_reference`, and what later calls need.

    Args:
        z: ``[B, C, H, W]``, dense in channels_last or NCHW.
        s: The shortcut, like ``z``.
        norm: Moves its running statistics if it takes the batch's.
        w: The layer's weights.
        out_norm: As ``norm``.
        drop: ``[B]`` in float32, or None.
        keys: ``[B, C]`` in float32, of the group's earlier layers.
        values: Like ``z``, of the earlier layers.
        keep: Whether backward will run.

    Returns:
        ``out``, the layer's key and value, and a tuple for :func:`base_backward`: empty without
        ``keep``.
    """
    t = len(values) + 1
    base = base_plan_of(z, w, t, out_norm)
    plan, heads, D, capacity = base.plan, base.heads, w.head_channels, base.capacity
    B, C, _, _ = plan.sizes
    flat, walk = plan.flat, plan.walk
    out, value = torch.empty_like(z), torch.empty_like(z)
    key = torch.empty((B, C), dtype=torch.float32, device=z.device)
    table = torch.empty((2, capacity), dtype=torch.int64, device=z.device)
    maps = batches([*map(addressable, values), value], capacity, value)
    vectors = batches([*keys, key], capacity, key)
    for k in range(len(maps) - 1):
        fill_tables[(1,)](
            table, capacity, k * TABLE_STEP, maps[k], vectors[k], None, None, num_warps=1
        )
    kept = buffer(z.device, base.kept).split_with_sizes(base.kept)
    coefficients, out_coefficients, means, queries, attention = kept
    scratch = buffer(z.device, base.forward_scratch)
    part, sums = scratch.split_with_sizes(base.forward_scratch)
    if norm.batch:
        channel_sums[flat.grid](
            z, part, B, C, plan.pixels, plan.middle, flat.programs, **flat.options
        )
    make_value[walk.grid](
        z, s, value, sums, part, coefficients, *norm.tensors, w.value,
        table, capacity, maps[-1], vectors[-1], plan.middle, flat.programs, plan.count,
        norm.momentum, norm.eps, *walk.sizes, BATCH=norm.batch, **walk.options,
    )  # fmt: skip
    attend[base.head_grid](
        sums, w.query, w.key, table, capacity, value, key, means, queries, attention,
        out_coefficients, t, C, plan.pixels, plan.middle, heads, D, walk.groups * walk.strips,
        D**-0.5, OUT_BATCH=out_norm.batch, KEEP=keep, LAST=plan.last, **base.head_options,
    )  # fmt: skip
    o = value if t == 1 else out
    sizes = t, heads, D, B, C, plan.pixels, flat.programs
    if out_norm.batch:
        retrieve[flat.grid](o, table, attention, out_coefficients, part, *sizes, **flat.options)
    add_retrieved[flat.grid](
        z, s, o, out, table, attention, coefficients, drop, part, *out_norm.tensors,
        out_coefficients, *sizes, flat.programs, plan.count, out_norm.momentum, out_norm.eps,
        OUT_BATCH=out_norm.batch, KEEP=keep, **flat.options,
    )  # fmt: skip
    return out, key, value, tuple(kept) if keep else ()


def base_backward(
    grad: Tensor,
    grad_key: Tensor | None,
    z: Tensor,
    s: Tensor,
    norm: Norm,
    w: BaseWeights,
    out_norm: Norm,
    drop: Tensor | None,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    later: Sequence[tuple[Tensor, Tensor]],
    saved: Sequence[Tensor],
) -> tuple[Any, ...]:
    """Gradients of z, s and the parameters, and what earlier layers need.

    Args:
        grad: Gradient of ``out``, like ``z``.
        grad_key: Gradient of the layer's key from later layers, or None.
        z: As in :func:`base_forward`, like all that follow.
        s: The shortcut.
        norm: The block's.
        w: The layer's weights.
        out_norm: The attention's.
        drop: ``[B]`` in float32, or None.
        keys: Of all t layers so far, the own one last.
        values: Likewise.
        later: What later layers left: pairs of ``grad_o``, like ``z``, and a factor ``[B, C]``.
            The sum of their products, over channels, is the value's gradient from those layers.
        saved: What forward returned.

    Returns:
        Gradients of z and s like those, and in float32 those of the norm's weight and bias, of
        query, key and value and of the other norm's weight and bias; gradients of the t - 1 earlier
        keys, ``[t - 1, B, C]``; ``grad_o`` and factors ``[t, B, C]`` for earlier layers (for t = 1
        there are none, and ``grad_o`` is of no use).
    """
    t = len(values)
    base = base_plan_of(z, w, t, out_norm)
    plan, heads, D, taps = base.plan, base.heads, w.head_channels, base.taps
    B, C, _, _ = plan.sizes
    flat, ring = plan.flat, plan.ring_walk
    grad = addressable(grad)  # earlier layers' tables may hold it
    capacity = max(base.capacity, triton.cdiv(len(later), TABLE_STEP) * TABLE_STEP)
    table = torch.empty((4, capacity), dtype=torch.int64, device=z.device)
    rows = (
        batches([*map(addressable, values)], capacity, z), batches(keys, capacity, saved[0]),
        batches([addressable(m) for m, _ in later], capacity, z),
        batches([f for _, f in later], capacity, saved[0]),
    )  # fmt: skip
    for k, lists in enumerate(zip(*rows, strict=True)):
        fill_tables[(1,)](table, capacity, k * TABLE_STEP, *lists, num_warps=1)
    o = go = grad
    if out_norm.batch:
        o = values[0] if t == 1 else torch.empty_like(z)
        go = grad if t == 1 else torch.empty_like(z)
    coefficients, out_coefficients, means, queries, attention = saved
    scratch = buffer(z.device, base.backward_scratch)
    views = scratch.split_with_sizes(base.backward_scratch)
    part, out_part, dots, on, grad_queries, tap_part = views
    grad_keys, factors = torch.empty((2, t, B, C), dtype=torch.float32, device=z.device)
    retrieval_sums[base.sums_grid](
        grad, o, table, attention, drop, out_coefficients, out_part, dots,
        t, heads, D, B, C, plan.pixels, *base.sums, OUT_BATCH=out_norm.batch, **base.sums_options,
    )  # fmt: skip
    out_rows, chunks, _ = base.sums
    head_blocks = base.head_grid[1]
    softmax_backward[(triton.cdiv(B, base.samples), head_blocks)](
        dots, out_part, out_coefficients, attention, drop, means, queries, table, capacity,
        means if grad_key is None else grad_key.contiguous(), int(grad_key is not None),
        on, grad_queries, grad_keys, factors, tap_part,
        t, heads, D, B, C, chunks, out_rows, base.samples, plan.count, D**-0.5,
        OUT_BATCH=out_norm.batch, TAPS=taps, **base.head_options,
    )  # fmt: skip
    gm = torch.empty_like(z)
    gz = o if norm.batch and out_norm.batch and t > 1 else torch.empty_like(z)
    input_grads[ring.grid](
        grad, z, s, o, go, gm, gz, part, coefficients, on, factors, w.value, drop,
        grad_queries, grad_keys[t - 1], w.query, w.key, table, capacity, len(later), t, B,
        *ring.sizes, BATCH=norm.batch, OUT_BATCH=out_norm.batch,
        QUERY=w.query.shape[-1], KEY=w.key.shape[-1], **ring.options,
    )  # fmt: skip
    grads = buffer(z.device, base.grads)
    grad_norm, grad_out_norm, grad_value, grad_taps = grads.split_with_sizes(base.grads)
    parameters = (
        part, ring.programs, coefficients, grad_value, None, grad_norm,
        out_part, out_rows, out_coefficients, grad_out_norm, tap_part, B * head_blocks, grad_taps,
    )  # fmt: skip
    constants = dict(FIELDS=FIELD_COUNT, TAPS=2 * taps)
    if norm.batch:
        input_norm_grads[flat.grid](
            gm, z, None, gz, None, None, None, *parameters,
            B, C, plan.pixels, flat.programs, plan.count, OUT_BATCH=True, **constants,
            **flat.options,
        )  # fmt: skip
    else:
        parameter_grads[(FIELD_COUNT + 3, flat.grid[1])](
            *parameters, C, ROWS=flat.options["ROWS"], BC=flat.options["BC"], **constants
        )
    w1, b1, w2, b2, value, query, key = grads.split_with_sizes(base.grad_views)[1::2]
    return (
        gz, gm, w1, b1, query.view(w.query.shape), key.view(w.key.shape),
        value.view(w.value.shape), w2, b2, grad_keys[: t - 1], go, factors,
    )  # fmt: skip
