"""The depthwise stencil as Triton kernels.

Each program takes a strip of columns and a block of channels and walks down a range of rows with
its neighbouring rows in registers, so that a pixel is read once from each of three columns and not
nine times. Strides are arguments: with NCHW the columns lie next to each other in memory, with
channels_last the channels, and the shape of a block follows. Sums are kept in float32.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
"""Rows that a program walks at most; more programs keep a GPU busy, fewer read fewer rows twice."""


@triton.jit
def _row_sums(
    x_ptr, offsets, row, column, in_block, stride_h, stride_w, height, width,
    t00, t01, t02, t10, t11, t12, t20, t21, t22,
):  # fmt: skip
    """What row ``row`` of x adds to the output's rows below it, at it and above it."""
    inside = in_block & (row >= 0) & (row < height)
    at = x_ptr + offsets + row * stride_h
    left = tl.load(at - stride_w, mask=inside & (column > 0), other=0.0).to(tl.float32)
    here = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(at + stride_w, mask=inside & (column + 1 < width), other=0.0).to(tl.float32)
    below = t00 * left + t01 * here + t02 * right
    level = t10 * left + t11 * here + t12 * right
    above = t20 * left + t21 * here + t22 * right
    return below, level, above


@triton.jit
def _stencil_kernel(
    x_ptr, taps_ptr, scale_ptr, add_ptr, bias_ptr, residual_ptr, out_ptr,
    channels, height, width, strips,
    taps_stride_b, scale_stride_b,
    x_b, x_c, x_h, x_w,
    add_b, add_c, add_h, add_w,
    res_b, res_c, res_h, res_w,
    out_b, out_c, out_h, out_w,
    has_add: tl.constexpr, has_bias: tl.constexpr, has_residual: tl.constexpr,
    rows: tl.constexpr, block_w: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    strip = tl.program_id(0)
    sample = tl.program_id(2).to(tl.int64)
    first_row = (strip // strips) * rows
    column = ((strip % strips) * block_w + tl.arange(0, block_w))[:, None]
    channel = (tl.program_id(1) * block_c + tl.arange(0, block_c))[None, :]
    has_channel = channel < channels
    in_block = (column < width) & has_channel
    tap = taps_ptr + sample * taps_stride_b + channel * 9
    t00 = tl.load(tap, mask=has_channel, other=0.0)
    t01 = tl.load(tap + 1, mask=has_channel, other=0.0)
    t02 = tl.load(tap + 2, mask=has_channel, other=0.0)
    t10 = tl.load(tap + 3, mask=has_channel, other=0.0)
    t11 = tl.load(tap + 4, mask=has_channel, other=0.0)
    t12 = tl.load(tap + 5, mask=has_channel, other=0.0)
    t20 = tl.load(tap + 6, mask=has_channel, other=0.0)
    t21 = tl.load(tap + 7, mask=has_channel, other=0.0)
    t22 = tl.load(tap + 8, mask=has_channel, other=0.0)
    x_at = sample * x_b + channel * x_c + column * x_w
    out_at = sample * out_b + channel * out_c + column * out_w
    below, level, above = _row_sums(
        x_ptr, x_at, first_row - 1, column, in_block, x_h, x_w, height, width,
        t00, t01, t02, t10, t11, t12, t20, t21, t22,
    )  # fmt: skip
    started = below
    below, level, above = _row_sums(
        x_ptr, x_at, first_row, column, in_block, x_h, x_w, height, width,
        t00, t01, t02, t10, t11, t12, t20, t21, t22,
    )  # fmt: skip
    current = started + level
    following = below
    if has_add:
        scale = tl.load(scale_ptr + sample * scale_stride_b + channel, mask=has_channel, other=0.0)
        add_at = add_ptr + sample * add_b + channel * add_c + column * add_w
    if has_bias:
        bias = tl.load(bias_ptr + sample * channels + channel, mask=has_channel, other=0.0)
    if has_residual:
        res_at = residual_ptr + sample * res_b + channel * res_c + column * res_w
    for step in range(rows):
        row = first_row + step
        below, level, above = _row_sums(
            x_ptr, x_at, row + 1, column, in_block, x_h, x_w, height, width,
            t00, t01, t02, t10, t11, t12, t20, t21, t22,
        )  # fmt: skip
        out = current + above
        inside = in_block & (row < height)
        if has_add:
            out += scale * tl.load(add_at + row * add_h, mask=inside, other=0.0).to(tl.float32)
        if has_bias:
            out += bias
        if has_residual:
            out += tl.load(res_at + row * res_h, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + out_at + row * out_h, out.to(out_ptr.dtype.element_ty), mask=inside)
        current = following + level
        following = below


@triton.jit
def _moments_kernel(
    grad_ptr, x_ptr, out_ptr,
    channels, height, width, strips,
    grad_b, grad_c, grad_h, grad_w,
    x_b, x_c, x_h, x_w,
    rows: tl.constexpr, block_w: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """Sums over one block, ``[9]`` a channel; blocks are added up outside, in a fixed order."""
    strip = tl.program_id(0)
    sample = tl.program_id(2).to(tl.int64)
    first_row = (strip // strips) * rows
    column = ((strip % strips) * block_w + tl.arange(0, block_w))[:, None]
    channel = (tl.program_id(1) * block_c + tl.arange(0, block_c))[None, :]
    in_block = (column < width) & (channel < channels)
    x_at = x_ptr + sample * x_b + channel * x_c + column * x_w
    grad_at = grad_ptr + sample * grad_b + channel * grad_c + column * grad_w
    zero = tl.zeros((block_w, block_c), tl.float32)
    m00, m01, m02 = zero, zero, zero
    m10, m11, m12 = zero, zero, zero
    m20, m21, m22 = zero, zero, zero
    # Row r of x meets the gradient's rows r + 1, r and r - 1, of this program's rows only.
    before = zero
    current = zero
    inside = in_block & (first_row < height)
    following = tl.load(grad_at + first_row * grad_h, mask=inside, other=0.0).to(tl.float32)
    for step in range(rows + 2):
        row = first_row - 1 + step
        inside = in_block & (row >= 0) & (row < height)
        at = x_at + row * x_h
        left = tl.load(at - x_w, mask=inside & (column > 0), other=0.0).to(tl.float32)
        here = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(at + x_w, mask=inside & (column + 1 < width), other=0.0).to(tl.float32)
        m00 += following * left
        m01 += following * here
        m02 += following * right
        m10 += current * left
        m11 += current * here
        m12 += current * right
        m20 += before * left
        m21 += before * here
        m22 += before * right
        before = current
        current = following
        ahead = in_block & (row + 2 < height) & (step + 1 < rows)
        following = tl.load(grad_at + (row + 2) * grad_h, mask=ahead, other=0.0).to(tl.float32)
    one = tl.program_id(1) * block_c + tl.arange(0, block_c)
    kept = one < channels
    blocks = tl.num_programs(0)
    out = out_ptr + ((sample * blocks + strip) * channels + one) * 9
    tl.store(out, tl.sum(m00, axis=0), mask=kept)
    tl.store(out + 1, tl.sum(m01, axis=0), mask=kept)
    tl.store(out + 2, tl.sum(m02, axis=0), mask=kept)
    tl.store(out + 3, tl.sum(m10, axis=0), mask=kept)
    tl.store(out + 4, tl.sum(m11, axis=0), mask=kept)
    tl.store(out + 5, tl.sum(m12, axis=0), mask=kept)
    tl.store(out + 6, tl.sum(m20, axis=0), mask=kept)
    tl.store(out + 7, tl.sum(m21, axis=0), mask=kept)
    tl.store(out + 8, tl.sum(m22, axis=0), mask=kept)


def _blocks(x: Tensor, tile: int) -> tuple[int, int, int, int, tuple[int, int, int]]:
    """Rows, columns and channels of a block of ``tile`` values, strips a row, and the grid."""
    batch, channels, height, width = x.shape
    if x.stride(1) == 1 and channels > 1:  # channels_last: 16 bytes a thread along channels
        block_c = min(triton.next_power_of_2(channels), 64)
        block_w = max(1, min(triton.next_power_of_2(width), tile // block_c))
    else:
        block_w = min(triton.next_power_of_2(width), 128)
        block_c = max(1, min(triton.next_power_of_2(channels), tile // block_w))
    rows = min(height, ROWS)
    strips = triton.cdiv(width, block_w)
    grid = (strips * triton.cdiv(height, rows), triton.cdiv(channels, block_c), batch)
    return rows, block_w, block_c, strips, grid


def stencil(
    x: Tensor,
    taps: Tensor,
    scale: Tensor | None = None,
    add: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """See :func:`mmrla.ops.depthwise.stencil`."""
    out = torch.empty_like(x)
    rows, block_w, block_c, strips, grid = _blocks(x, 1024)
    taps = taps.contiguous()
    if add is None or scale is None:
        scale = add = None
    else:
        scale = scale.contiguous()
    _stencil_kernel[grid](
        x, taps, scale if scale is not None else taps, add if add is not None else x,
        bias.contiguous() if bias is not None else taps, residual if residual is not None else x,
        out, *x.shape[1:], strips,
        0 if len(taps) == 1 else taps.stride(0),
        0 if scale is None or scale.dim() == 1 else scale.stride(0),
        *x.stride(), *(x if add is None else add).stride(),
        *(x if residual is None else residual).stride(), *out.stride(),
        has_add=add is not None, has_bias=bias is not None, has_residual=residual is not None,
        rows=rows, block_w=block_w, block_c=block_c, num_warps=4,
    )  # fmt: skip
    return out


def moments(grad: Tensor, x: Tensor) -> Tensor:
    """See :func:`mmrla.ops.depthwise.moments`."""
    rows, block_w, block_c, strips, grid = _blocks(x, 512)
    batch, channels, height, width = x.shape
    partial = x.new_empty((batch, grid[0], channels, 9), dtype=torch.float32)
    _moments_kernel[grid](
        grad, x, partial, channels, height, width, strips, *grad.stride(), *x.stride(),
        rows=rows, block_w=block_w, block_c=block_c, num_warps=4,
    )  # fmt: skip
    return partial.sum(1).view(batch, channels, 3, 3)
