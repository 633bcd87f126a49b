"""MRLA-base's block end on a device with Triton: forward and backward of one layer.

    F1  channel_sums       statistics of z (only if the first norm takes the batch's)
    F2  make_value         V from z and s, sums of y
    F3  attend             query, key, softmax over the layers
    F4  retrieve           o from the values, its statistics (only if out_norm takes the batch's)
    F5  add_retrieved      out = y + drop * norm(o)
    B1  fill_tables        addresses of values, keys and what later layers left
    B2  retrieval_sums     all sums over pixels that norm and softmax need
    B3  softmax_backward   gradients of query and keys
    B4  project_backward   gradients of channel means and of the taps of W_q and W_k
    B5  input_grads        gradients of o and of the sum before the ReLU, taps of W_v
    B6  input_norm_grads   gradient of z; the parameters' sums (parameter_grads if the norm is frozen)

Maps that forward moves, N elements each: t + 9 (t + 6 with a frozen out_norm, one less if the first
norm is frozen too); backward, with n later layers: t + n + 11 (t + n + 10, and t + n + 7).
"""

from __future__ import annotations


from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mmrla.ops.blocks import (
    WARPS,
    Plan,
    Walk,
    even_programs,
    multiprocessors,
    plan_of,
    power_of_two,
)
from mmrla.ops.kernels import channel_sums, input_norm_grads, parameter_grads
from mmrla.ops.kernels_base_backward import (
    input_grads,
    project_backward,
    retrieval_sums,
    softmax_backward,
)
from mmrla.ops.kernels_base_forward import (
    add_retrieved,
    attend,
    fill_tables,
    make_value,
    retrieve,
)
from mmrla.ops.reference import BaseWeights, Norm

BATCH = 8


def walk_arguments(plan: Plan, walk: Walk) -> dict[str, Any]:
    """What stencils take of the plan."""
    B, C, H, W = plan.sizes
    return dict(
        C=C, HW=plan.pixels, lines=plan.lines, steps=plan.steps,
        line_stride=W * C if plan.last else 1, step_stride=C if plan.last else W,
        tiles=walk.tiles, per_sample=walk.groups, all_groups=B * walk.groups, strips=walk.strips,
        length=walk.length, programs=walk.programs, **walk.options,
    )  # fmt: skip


def head_blocks(B: int, heads: int, D: int, t: int) -> tuple[dict[str, int], tuple[int, int]]:
    """Blocks of heads for kernels without maps, about 256 channels per program, and their grid."""
    width = power_of_two(D)
    per_program = min(power_of_two(heads), max(1, 256 // width))
    options = dict(
        LAYERS=max(16, power_of_two(t)), HEADS=per_program, WIDTH=width,
        CHUNKS=max(1, 2048 // (per_program * width)), num_warps=2,
    )  # fmt: skip
    return options, (B, triton.cdiv(heads, per_program))


class Sums(NamedTuple):
    """How :func:`retrieval_sums` cuts the maps."""

    grid: tuple[int, int]
    chunks: int
    """Sums per sample."""
    chunk: int
    """Blocks per sum."""
    options: dict[str, Any]


def sums_of(plan: Plan, sms: int) -> Sums:
    """Small blocks, since grad and o stay in registers; few sums, but enough programs."""
    B, C = plan.sizes[:2]
    pixels = min(64, power_of_two(plan.pixels))
    channels = min(4096 // pixels, 64, power_of_two(C))
    blocks, channel_blocks = triton.cdiv(plan.pixels, pixels), triton.cdiv(C, channels)
    chunk = max(1, blocks // triton.cdiv(16 * sms, B * channel_blocks))
    chunks = triton.cdiv(blocks, chunk)
    warps = max(1, pixels * channels // 1024)
    programs = even_programs(B * chunks, max(1, sms * WARPS // warps // channel_blocks))
    options = dict(BP=pixels, BC=channels, LAST=plan.last, num_warps=warps, num_stages=1)
    return Sums((programs, channel_blocks), chunks, chunk, options)


def aligned(x: Tensor) -> Tensor:
    """``x``, or a copy where the tables of addresses can hold it."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def carve(like: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    """Float32 vectors of these sizes in one piece of memory, each aligned to 16 bytes."""
    padded = [-(-size // 4) * 4 for size in sizes]
    parts = torch.empty(sum(padded), dtype=torch.float32, device=like.device).split(padded)
    return tuple(part[:size] for part, size in zip(parts, sizes, strict=True))


def batches(tensors: Sequence[Tensor], capacity: int, filler: Tensor) -> list[tuple[Tensor, ...]]:
    """``tensors`` and fillers as tuples that :func:`fill_tables` takes."""
    row = [*tensors] + [filler] * (capacity - len(tensors))
    return [tuple(row[k : k + BATCH]) for k in range(0, capacity, BATCH)]


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
    """Output, key, value and, with ``keep``, what :func:`base_backward` needs of one layer."""
    plan = plan_of(z)
    B, C = plan.sizes[:2]
    t, D = len(values) + 1, w.head_channels
    heads = C // D
    flat, walk = plan.flat, plan.walk
    out, value = torch.empty_like(z), torch.empty_like(z)
    key = torch.empty((B, C), dtype=torch.float32, device=z.device)
    capacity = -(-t // BATCH) * BATCH
    table = torch.empty((2, capacity), dtype=torch.int64, device=z.device)
    maps = batches([*(aligned(v) for v in values), value], capacity, value)
    vectors = batches([*keys, key], capacity, key)
    for k in range(len(maps) - 1):
        fill_tables[(1,)](table, capacity, k * BATCH, maps[k], vectors[k], None, None, num_warps=1)
    coefficients, out_coefficients, means, attention = carve(
        z, 5 * C, 5 * C, 2 * B * C, t * B * heads
    )
    chunks = walk.groups * walk.strips
    part, sums = carve(z, flat.programs * 2 * C, B * chunks * C)
    sizes = dict(B=B, C=C, HW=plan.pixels, middle=plan.middle, programs=flat.programs)
    if norm.batch:
        channel_sums[flat.grid](z, part, **sizes, **flat.options)
    make_value[walk.grid](
        z, s, value, sums, part, coefficients, norm.weight, norm.bias, norm.running_mean,
        norm.running_var, w.value, table, capacity, maps[-1], vectors[-1], middle=plan.middle,
        rows=flat.programs, count=plan.count, momentum=norm.momentum, eps=norm.eps,
        BATCH=norm.batch, **walk_arguments(plan, walk),
    )  # fmt: skip
    block, grid = head_blocks(B, heads, D, t)
    attend[grid](
        sums, w.query, w.key, table[1], key, means if keep else None, attention, t, B, C,
        plan.pixels, heads, chunks, D**-0.5, D, w.query.numel(), w.key.numel(), **block,
    )  # fmt: skip
    o = value if t == 1 else out
    sizes |= dict(t=t, heads=heads, D=D)
    if out_norm.batch:
        retrieve[flat.grid](o, table, attention, part, **sizes, **flat.options)
    add_retrieved[flat.grid](
        z, s, o, out, table, attention, coefficients, drop, part, out_coefficients, out_norm.weight,
        out_norm.bias, out_norm.running_mean, out_norm.running_var, rows=flat.programs,
        count=plan.count, momentum=out_norm.momentum, eps=out_norm.eps, BATCH=out_norm.batch,
        KEEP=keep, **sizes, **flat.options,
    )  # fmt: skip
    saved = (coefficients, out_coefficients, means, attention) if keep else ()
    return out, key, value, saved


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
    saved: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    """All gradients of one layer, see the contract."""
    plan = plan_of(z)
    B, C = plan.sizes[:2]
    t, D = len(values), w.head_channels
    heads = C // D
    flat, walk = plan.flat, plan.short_walk
    coefficients, out_coefficients, means, attention = saved
    grad = grad if out_norm.batch else aligned(grad)
    capacity = -(-max(t, len(later)) // BATCH) * BATCH
    table = torch.empty((4, capacity), dtype=torch.int64, device=z.device)
    lists = zip(
        batches([aligned(v) for v in values], capacity, z),
        batches(keys, capacity, z),
        batches([aligned(m) for m, _ in later], capacity, z),
        batches([f for _, f in later], capacity, z),
        strict=True,
    )
    for k, entries in enumerate(lists):
        fill_tables[(1,)](table, capacity, k * BATCH, *entries, num_warps=1)
    o, go = grad, None
    if out_norm.batch:
        o = values[0] if t == 1 else torch.empty_like(z)
        go = grad if t == 1 else torch.empty_like(z)
    sums = sums_of(plan, multiprocessors(z.device))
    queries, keysizes = w.query.numel(), w.key.numel()
    TAPS = power_of_two(queries + keysizes)
    rows = sums.grid[0]
    part, dots, on, grad_query, grad_means, tap_part, own_part = carve(
        z, rows * 2 * C, B * t * (3 if out_norm.batch else 1) * sums.chunks * C, 3 * C, B * C, B * C,
        B * TAPS, walk.programs * 11 * C,
    )  # fmt: skip
    grad_keys, factors = torch.empty((2, t, B, C), dtype=torch.float32, device=z.device)
    gvalue, gnorm, gout, gtaps = carve(z, 9 * C, 2 * C, 2 * C, TAPS)
    retrieval_sums[sums.grid](
        grad, o, table, attention, drop, out_coefficients, part, dots, t, B, C, plan.pixels, heads,
        sums.chunks, sums.chunk, rows, out_norm.batch, D, **sums.options,
    )  # fmt: skip
    block, grid = head_blocks(B, heads, D, t)
    samples = max(1, B * grid[1] // 2048)
    softmax_backward[(triton.cdiv(B, samples), grid[1])](
        dots, part, out_coefficients, attention, drop, means[B * C :], table[1], grad_key, on,
        grad_query, grad_keys, factors, t, B, C, heads, sums.chunks, rows, samples, plan.count, D**-0.5,
        out_norm.batch, D, **block,
    )  # fmt: skip
    project_backward[(B,)](
        grad_query, grad_keys[t - 1], w.query, w.key, means, grad_means, tap_part, C,
        queries, keysizes, TAPS, min(256, power_of_two(C)), num_warps=4,
    )  # fmt: skip
    gm = torch.empty_like(z)
    gz = o if norm.batch and out_norm.batch and t > 1 else torch.empty_like(z)
    input_grads[walk.grid](
        grad, z, s, o, go, gm, gz, own_part, table, capacity, len(later), coefficients, on, factors,
        w.value, grad_means, drop, t, B=B, BATCH=norm.batch, OUT_BATCH=out_norm.batch,
        **walk_arguments(plan, walk),
    )  # fmt: skip
    ends = (
        own_part, walk.programs, coefficients, gvalue, None, gnorm, part, rows, out_coefficients,
        gout, tap_part, B, gtaps,
    )  # fmt: skip
    if norm.batch:
        input_norm_grads[flat.grid](
            gm, z, None, gz, None, None, None, *ends, B, C, plan.pixels, flat.programs, plan.count,
            FIELDS=9, TAPS=TAPS, OUT_BATCH=True, **flat.options,
        )  # fmt: skip
    else:
        rest = {k: flat.options[k] for k in ("ROWS", "BC", "num_warps")}
        parameter_grads[(12, flat.grid[1])](*ends, C, FIELDS=9, TAPS=TAPS, **rest)
    return (
        gz, gm, gnorm[:C], gnorm[C:], gtaps[:queries].view_as(w.query),
        gtaps[queries : queries + keysizes].view_as(w.key), gvalue.view_as(w.value), gout[:C],
        gout[C:], grad_keys[: t - 1], grad if go is None else go, factors,
    )  # fmt: skip
