"""The passes of :mod:`mmrla.ops.passes` as Triton kernels, for dense feature maps on a GPU.

A feature map is pixels times channels with two strides, in NCHW and channels_last alike; a block's
longer side lies along the memory. Everything is computed in float32.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES = 8
"""Values that one launch of a kernel over layers reads; more layers take more launches."""


@triton.jit
def _affine_kernel(
    x_ptr, factor_ptr, shift_ptr, add_ptr, out_ptr,
    channels, pixels, factor_b, shift_b,
    x_b, x_c, x_p, add_b, add_c, add_p, out_b, out_c, out_p,
    has_shift: tl.constexpr, has_add: tl.constexpr, relu: tl.constexpr,
    block_p: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(2).to(tl.int64)
    pixel = (tl.program_id(0) * block_p + tl.arange(0, block_p))[:, None]
    channel = (tl.program_id(1) * block_c + tl.arange(0, block_c))[None, :]
    has_channel = channel < channels
    inside = (pixel < pixels) & has_channel
    x = tl.load(x_ptr + sample * x_b + channel * x_c + pixel * x_p, mask=inside, other=0.0)
    factor = tl.load(factor_ptr + sample * factor_b + channel, mask=has_channel, other=0.0)
    out = x.to(tl.float32) * factor
    if has_shift:
        out += tl.load(shift_ptr + sample * shift_b + channel, mask=has_channel, other=0.0)
    if has_add:
        at = add_ptr + sample * add_b + channel * add_c + pixel * add_p
        out += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if relu:
        out = tl.where(out < 0, 0.0, out)  # as torch's: nan stays
    at = out_ptr + sample * out_b + channel * out_c + pixel * out_p
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weighted(
    value_ptr, weight_ptr, s, stride_s, sample, channels, channel, has_channel, at, inside
):  # fmt: skip
    weight_at = weight_ptr + s * stride_s + sample * channels + channel
    weight = tl.load(weight_at, mask=has_channel, other=0.0)
    return weight * tl.load(value_ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _weighted_sum_kernel(
    v0, v1, v2, v3, v4, v5, v6, v7, weight_ptr, bias_ptr, start_ptr, out_ptr,
    channels, pixels, stride_s, v_b, v_c, v_p, start_b, start_c, start_p, out_b, out_c, out_p,
    count: tl.constexpr, has_bias: tl.constexpr, has_start: tl.constexpr,
    block_p: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(2).to(tl.int64)
    pixel = (tl.program_id(0) * block_p + tl.arange(0, block_p))[:, None]
    channel = (tl.program_id(1) * block_c + tl.arange(0, block_c))[None, :]
    has_channel = channel < channels
    inside = (pixel < pixels) & has_channel
    at = sample * v_b + channel * v_c + pixel * v_p
    out_at = out_ptr + sample * out_b + channel * out_c + pixel * out_p
    total = tl.zeros((block_p, block_c), tl.float32)
    if has_bias:
        total += tl.load(bias_ptr + sample * channels + channel, mask=has_channel, other=0.0)
    if has_start:
        start_at = start_ptr + sample * start_b + channel * start_c + pixel * start_p
        total += tl.load(start_at, mask=inside, other=0.0).to(tl.float32)
    total += _weighted(
        v0, weight_ptr, 0, stride_s, sample, channels, channel, has_channel, at, inside
    )
    if count > 1:
        total += _weighted(
            v1, weight_ptr, 1, stride_s, sample, channels, channel, has_channel, at, inside
        )
    if count > 2:
        total += _weighted(
            v2, weight_ptr, 2, stride_s, sample, channels, channel, has_channel, at, inside
        )
    if count > 3:
        total += _weighted(
            v3, weight_ptr, 3, stride_s, sample, channels, channel, has_channel, at, inside
        )
    if count > 4:
        total += _weighted(
            v4, weight_ptr, 4, stride_s, sample, channels, channel, has_channel, at, inside
        )
    if count > 5:
        total += _weighted(
            v5, weight_ptr, 5, stride_s, sample, channels, channel, has_channel, at, inside
        )
    if count > 6:
        total += _weighted(
            v6, weight_ptr, 6, stride_s, sample, channels, channel, has_channel, at, inside
        )
    if count > 7:
        total += _weighted(
            v7, weight_ptr, 7, stride_s, sample, channels, channel, has_channel, at, inside
        )
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dot_kernel(
    a_ptr, b_ptr, out_ptr, channels, pixels, chunks,
    a_b, a_c, a_p, b_b, b_c, b_p,
    steps: tl.constexpr, block_p: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """Sums over ``steps`` blocks of pixels; chunks are added up outside, in a fixed order."""
    chunk = tl.program_id(0)
    sample = tl.program_id(2).to(tl.int64)
    channel = (tl.program_id(1) * block_c + tl.arange(0, block_c))[None, :]
    total = tl.zeros((block_p, block_c), tl.float32)
    for step in range(steps):
        pixel = ((chunk * steps + step) * block_p + tl.arange(0, block_p))[:, None]
        inside = (pixel < pixels) & (channel < channels)
        at = a_ptr + sample * a_b + channel * a_c + pixel * a_p
        a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        at = b_ptr + sample * b_b + channel * b_c + pixel * b_p
        total += a * tl.load(at, mask=inside, other=0.0).to(tl.float32)
    one = tl.program_id(1) * block_c + tl.arange(0, block_c)
    out = out_ptr + (sample * chunks + chunk) * channels + one
    tl.store(out, tl.sum(total, axis=0), mask=one < channels)


def is_dense(x: Tensor) -> bool:
    """Whether one stride takes all pixels of ``[B, C, H, W]``, which the kernels ask for."""
    return x.stride(2) == x.shape[3] * x.stride(3)


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(3)


def _blocks(x: Tensor, tile: int) -> tuple[int, int, tuple[int, int, int]]:
    """Pixels and channels of a block of ``tile`` values, and the grid."""
    batch, channels, height, width = x.shape
    pixels = height * width
    if x.stride(1) == 1 and channels > 1:  # channels_last
        block_c = min(triton.next_power_of_2(channels), 128)
        block_p = max(1, min(triton.next_power_of_2(pixels), tile // block_c))
    else:
        block_p = min(triton.next_power_of_2(pixels), 256)
        block_c = max(1, min(triton.next_power_of_2(channels), tile // block_p))
    grid = (triton.cdiv(pixels, block_p), triton.cdiv(channels, block_c), batch)
    return block_p, block_c, grid


def affine_add(
    x: Tensor,
    factor: Tensor,
    shift: Tensor | None,
    add: Tensor | None,
    out: Tensor,
    relu: bool = False,
) -> Tensor:
    """``out = factor * x + shift + add``, then a ReLU if asked for.

    Args:
        x: ``[B, C, H, W]``.
        factor: ``[C]`` or ``[B, C]``, float32.
        shift: Likewise, or None.
        add: Shaped like ``x``, or None.
        out: Shaped like ``x``; may be ``x`` or ``add``.
        relu: Whether negative results become zero.
    """
    block_p, block_c, grid = _blocks(x, 2048)
    factor = factor.contiguous()
    moved = factor if shift is None else shift.contiguous()
    channels = x.shape[1]
    _affine_kernel[grid](
        x, factor, moved, x if add is None else add, out, channels, x.shape[2] * x.shape[3],
        channels if factor.dim() == 2 else 0, channels if moved.dim() == 2 else 0,
        *_strides(x), *_strides(x if add is None else add), *_strides(out),
        has_shift=shift is not None, has_add=add is not None, relu=relu,
        block_p=block_p, block_c=block_c, num_warps=4,
    )  # fmt: skip
    return out


def dot(a: Tensor, b: Tensor) -> Tensor:
    """See :func:`mmrla.ops.passes.dot`."""
    block_p, block_c, grid = _blocks(a, 1024)
    batch, channels, height, width = a.shape
    steps = min(8, triton.next_power_of_2(grid[0]))
    chunks = triton.cdiv(height * width, block_p * steps)
    partial = a.new_empty((batch, chunks, channels), dtype=torch.float32)
    _dot_kernel[(chunks, *grid[1:])](
        a, b, partial, channels, height * width, chunks, *_strides(a), *_strides(b),
        steps=steps, block_p=block_p, block_c=block_c, num_warps=4,
    )  # fmt: skip
    return partial.sum(1)


def weighted_sum(
    values: Sequence[Tensor],
    weights: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """See :func:`mmrla.ops.passes.weighted_sum`; values have one layout."""
    like = values[-1]
    weights = weights.contiguous()
    several = len(values) > VALUES
    total = torch.empty_like(like, dtype=torch.float32 if several else like.dtype)
    block_p, block_c, grid = _blocks(like, 1024)
    channels = like.shape[1]
    start = residual
    for first in range(0, len(values), VALUES):
        some = list(values[first : first + VALUES])
        count = len(some)
        has_bias = bias is not None and first == 0
        _weighted_sum_kernel[grid](
            *some, *[some[0]] * (VALUES - count), weights[first:],
            bias.contiguous() if bias is not None and has_bias else weights,
            total if start is None else start, total,
            channels, like.shape[2] * like.shape[3], weights.stride(0),
            *_strides(like), *_strides(total if start is None else start), *_strides(total),
            count=count, has_bias=has_bias, has_start=start is not None,
            block_p=block_p, block_c=block_c, num_warps=4,
        )  # fmt: skip
        start = total
    return total.to(like.dtype)
