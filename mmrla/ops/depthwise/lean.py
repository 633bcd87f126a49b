"""The depthwise stencil in plain torch, as convolutions whose groups are channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrla.ops.query_key import accumulation_dtype
from mmrla.ops.tiles import Tile, tiles


def stencil(
    x: Tensor,
    taps: Tensor,
    scale: Tensor | None = None,
    add: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """See :func:`mmrla.ops.depthwise.stencil`."""
    dtype = accumulation_dtype(x.dtype)
    out = torch.empty_like(x)
    taps = taps.expand(len(x), -1, -1, -1)
    parts = tiles(x)
    whole = len(parts) == 1
    for tile in _samples(x, parts):
        shape = out[tile].shape
        # Taps differ between samples: every channel of every sample is a group.
        view = (1, -1, *x.shape[2:])
        weight = taps[tile].reshape(-1, 1, 3, 3)
        shift = None if bias is None else bias[tile].reshape(-1)
        maps = x[tile].to(dtype).view(view) if shape[0] > 1 else x[tile].to(dtype)
        value = F.conv2d(maps, weight, shift, padding=1, groups=len(weight)).view(shape)
        if scale is not None and add is not None:
            factor = scale[tile[1]] if scale.dim() == 1 else scale[tile]
            value.addcmul_(add[tile].to(dtype), factor[..., None, None])
        if residual is not None:
            value.add_(residual[tile])
        if whole and value.shape == x.shape and value.stride() == out.stride():
            return value.to(x.dtype)
        out[tile] = value
    return out


def _samples(x: Tensor, parts: list[Tile]) -> list[Tile]:
    """The tiles, single samples where a view cannot join samples and channels."""
    if x.is_contiguous():
        return parts
    return [(slice(b, b + 1), parts[0][1]) for b in range(len(x))]


def moments(grad: Tensor, x: Tensor) -> Tensor:
    """See :func:`mmrla.ops.depthwise.moments`."""
    dtype = accumulation_dtype(x.dtype)
    out = x.new_empty((*x.shape[:2], 3, 3), dtype=dtype)
    both = x.is_contiguous() and grad.is_contiguous()
    parts = tiles(x) if both else [(slice(b, b + 1), slice(0, x.shape[1])) for b in range(len(x))]
    one = [1, 1]
    for tile in parts:
        maps = [t[tile].to(dtype) for t in (grad, x)]
        if len(maps[0]) > 1:
            maps = [t.view(1, -1, *x.shape[2:]) for t in maps]
        groups = maps[0].shape[1]
        weight = maps[0].new_empty((groups, 1, 3, 3))
        _, found, _ = torch.ops.aten.convolution_backward(
            *maps, weight, None, one, one, one, False, [0, 0], groups, [False, True, False]
        )
        out[tile] = found.view(out[tile].shape)
    return out
