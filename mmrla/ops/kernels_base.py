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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mmrla.ops.blocks import (
    FLAT_WARPS,
    Plan,
    even_programs,
    multiprocessors,
    plan_of,
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
from mmrla.ops.kernels_light import floats
from mmrla.ops.reference import BaseWeights, Norm

HEAD_CHANNELS = 128
"""Channels per program of the kernels without maps, if a head has no more."""
CHUNK_ELEMENTS = 2048
"""Partial sums that such a program reads at once."""
HEAD_PROGRAMS = 2048
"""The most of such programs in backward; each has some samples."""
MOST_LAYERS = 16
"""How many layers the softmax has room for; twice as many if that is too few, and so on."""
SUMS_PIXELS = 64
"""Pixels and channels per block of retrieval_sums, at 32 elements per thread."""
SUMS_CHANNELS = 64


class Sums(NamedTuple):
    """How :func:`retrieval_sums` cuts the maps."""

    grid: tuple[int, int]
    chunks: int
    """Sums per sample."""
    chunk: int
    """Blocks of pixels per sum."""
    options: dict[str, Any]


def sums_of(plan: Plan, sms: int) -> Sums:
    """Small blocks, since grad and o stay in registers; few sums, but enough programs."""
    B, C, _, _ = plan.sizes
    pixels = min(SUMS_PIXELS, power_of_two(plan.pixels))
    channels = min(SUMS_CHANNELS, power_of_two(C))
    blocks, channel_blocks = triton.cdiv(plan.pixels, pixels), triton.cdiv(C, channels)
    chunk = max(1, blocks // triton.cdiv(FLAT_WARPS * sms, B * channel_blocks))
    chunks = triton.cdiv(blocks, chunk)
    warps = max(1, pixels * channels // 1024)
    programs = even_programs(B * chunks, max(1, sms * FLAT_WARPS // warps // channel_blocks))
    options = dict(
        BP=pixels, BC=channels, LAST=plan.last, UNIT=plan.flat.options["UNIT"], num_warps=warps,
        num_stages=1,
    )  # fmt: skip
    return Sums((programs, channel_blocks), chunks, chunk, options)


def head_options(w: BaseWeights, layers: int) -> dict[str, int]:
    """Compile-time constants of the kernels without maps."""
    width = power_of_two(w.head_channels)
    heads = max(1, HEAD_CHANNELS // width)
    return dict(
        D=w.head_channels, QUERY=w.query.shape[-1], KEY=w.key.shape[-1],
        MOST=max(MOST_LAYERS, power_of_two(layers)), HEADS=heads, WIDTH=width,
        CHUNKS=max(1, CHUNK_ELEMENTS // (heads * width)),
    )  # fmt: skip


def aligned(x: Tensor) -> Tensor:
    """``x``, or a copy at an address that a table may hold."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def batches(tensors: Sequence[Tensor], capacity: int, filler: Tensor) -> list[tuple[Tensor, ...]]:
    """``tensors``, then fillers, in tuples of what one launch writes into a table."""
    row = [*tensors, *[filler] * (capacity - len(tensors))]
    step = ADDRESSES.value
    return [tuple(row[k : k + step]) for k in range(0, capacity, step)]


def table_for(device: torch.device, rows: int, layers: int) -> tuple[Tensor, int]:
    """Room for addresses, ``[rows, capacity]``, and its capacity."""
    capacity = -(-layers // ADDRESSES.value) * ADDRESSES.value
    return torch.empty((rows, capacity), dtype=torch.int64, device=device), capacity


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
    plan = plan_of(z)
    B, C, _, _ = plan.sizes
    flat, walk, t = plan.flat, plan.walk, len(values) + 1
    heads, chunks = C // w.head_channels, walk.groups * walk.strips
    out, value = torch.empty_like(z), torch.empty_like(z)
    key = torch.empty((B, C), dtype=torch.float32, device=z.device)
    table, capacity = table_for(z.device, 2, t)
    maps = batches([*map(aligned, values), value], capacity, value)
    vectors = batches([*keys, key], capacity, key)
    for k in range(len(maps) - 1):
        fill_tables[(1,)](
            table, capacity, k * ADDRESSES.value, maps[k], vectors[k], None, None, num_warps=1
        )
    kept = floats(z.device, COEFFICIENTS * C, COEFFICIENTS * C, B * C, B * C, t * B * heads)
    coefficients, out_coefficients, means, queries, attention = kept
    part, sums = floats(z.device, flat.programs * 2 * C, B * chunks * C)
    if norm.batch:
        channel_sums[flat.grid](
            z, part, B, C, plan.pixels, plan.middle, flat.programs, **flat.options
        )
    make_value[walk.grid](
        z, s, value, sums, part, coefficients, *norm.tensors, w.value,
        table, capacity, maps[-1], vectors[-1], plan.middle, flat.programs, plan.count,
        norm.momentum, norm.eps, *walk.sizes, BATCH=norm.batch, **walk.options,
    )  # fmt: skip
    options = head_options(w, t)
    attend[(B, -(-heads // options["HEADS"]))](
        sums, w.query, w.key, table, capacity, value, key, means, queries, attention,
        out_coefficients, t, C, plan.pixels, plan.middle, heads, chunks, w.head_channels**-0.5,
        OUT_BATCH=out_norm.batch, KEEP=keep, LAST=plan.last, **options,
    )  # fmt: skip
    sizes = t, heads, B, C, plan.pixels, flat.programs
    if out_norm.batch:
        retrieve[flat.grid](
            value if t == 1 else out, table, attention, out_coefficients, part, *sizes,
            D=w.head_channels, **flat.options,
        )  # fmt: skip
    add_retrieved[flat.grid](
        z, s, value if t == 1 else out, out, table, attention, coefficients, drop,
        part, *out_norm.tensors, out_coefficients, *sizes, flat.programs, plan.count,
        out_norm.momentum, out_norm.eps,
        OUT_BATCH=out_norm.batch, KEEP=keep, D=w.head_channels, **flat.options,
    )  # fmt: skip
    return out, key, value, kept if keep else ()


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
    plan = plan_of(z)
    B, C, _, _ = plan.sizes
    flat, ring, t = plan.flat, plan.ring_walk, len(values)
    heads = C // w.head_channels
    grad = aligned(grad)  # later layers' tables may hold it
    table, capacity = table_for(z.device, 4, max(t, len(later)))
    rows = (
        batches([*map(aligned, values)], capacity, z), batches(keys, capacity, z),
        batches([aligned(m) for m, _ in later], capacity, z),
        batches([f for _, f in later], capacity, z),
    )  # fmt: skip
    for k, lists in enumerate(zip(*rows, strict=True)):
        fill_tables[(1,)](table, capacity, k * ADDRESSES.value, *lists, num_warps=1)
    o = go = grad
    if out_norm.batch:
        o = values[0] if t == 1 else torch.empty_like(z)
        go = grad if t == 1 else torch.empty_like(z)
    options = head_options(w, t)
    cut = sums_of(plan, multiprocessors(z.device))
    head_blocks = -(-heads // options["HEADS"])
    taps = power_of_two(max(options["QUERY"], options["KEY"]))
    fields = FIELDS.value + 2
    kinds = 3 if out_norm.batch else 1
    coefficients, out_coefficients, means, queries, attention = saved
    part, out_part, dots, on, grad_queries, tap_part = floats(
        z.device, ring.programs * fields * C, cut.grid[0] * 2 * C, B * t * kinds * cut.chunks * C,
        3 * C, B * C, B * head_blocks * 2 * taps,
    )  # fmt: skip
    grad_norm, grad_value, grad_out_norm, grad_taps = floats(
        z.device, 2 * C, 9 * C, 2 * C, 2 * taps
    )
    grad_keys, factors = torch.empty((2, t, B, C), dtype=torch.float32, device=z.device)
    retrieval_sums[cut.grid](
        grad, o, table, attention, drop, out_coefficients, out_part, dots,
        t, heads, B, C, plan.pixels, cut.grid[0], cut.chunks, cut.chunk,
        OUT_BATCH=out_norm.batch, D=w.head_channels, **cut.options,
    )  # fmt: skip
    samples = max(1, B * head_blocks // HEAD_PROGRAMS)
    softmax_backward[(-(-B // samples), head_blocks)](
        dots, out_part, out_coefficients, attention, drop, means, queries, table, capacity,
        grad_key, on, grad_queries, grad_keys, factors, tap_part,
        t, heads, B, C, cut.chunks, cut.grid[0], samples, plan.count, w.head_channels**-0.5,
        OUT_BATCH=out_norm.batch, TAPS=taps, **options,
    )  # fmt: skip
    gm = torch.empty_like(z)
    gz = o if norm.batch and out_norm.batch and t > 1 else torch.empty_like(z)
    input_grads[ring.grid](
        grad, z, s, o, go, gm, gz, part, coefficients, on, factors, w.value, drop,
        grad_queries, grad_keys[t - 1], w.query, w.key, table, capacity, len(later), t, B,
        *ring.sizes, BATCH=norm.batch, OUT_BATCH=out_norm.batch,
        QUERY=options["QUERY"], KEY=options["KEY"], **ring.options,
    )  # fmt: skip
    parameters = (
        part, ring.programs, coefficients, grad_value, None, grad_norm,
        out_part, cut.grid[0], out_coefficients, grad_out_norm,
        tap_part, B * head_blocks, grad_taps,
    )  # fmt: skip
    constants = dict(FIELDS=FIELDS.value, TAPS=2 * taps)
    if norm.batch:
        input_norm_grads[flat.grid](
            gm, z, None, gz, None, None, None, *parameters,
            B, C, plan.pixels, flat.programs, plan.count, OUT_BATCH=True, **constants,
            **flat.options,
        )  # fmt: skip
    else:
        parameter_grads[(FIELDS.value + 3, flat.grid[1])](
            *parameters, C, ROWS=flat.options["ROWS"], BC=flat.options["BC"], **constants
        )
    return (
        gz, gm, grad_norm[:C], grad_norm[C : 2 * C],
        grad_taps[: w.query.shape[-1]].view(w.query.shape),
        grad_taps[taps : taps + w.key.shape[-1]].view(w.key.shape),
        grad_value[: 9 * C].view(w.value.shape), grad_out_norm[:C], grad_out_norm[C : 2 * C],
        grad_keys[: t - 1], go, factors,
    )  # fmt: skip
