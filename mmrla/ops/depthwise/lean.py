"""The depthwise stencil in plain torch, a sample at a time so that what it touches stays cached."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrla.ops.query_key import accumulation_dtype


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
    batch, channels = x.shape[:2]
    out = torch.empty_like(x)
    for b in range(batch):
        weight = taps[b if len(taps) > 1 else 0].unsqueeze(1)
        value = F.conv2d(x[b : b + 1].to(dtype), weight, padding=1, groups=channels)
        value = value[0]
        if scale is not None and add is not None:
            value.addcmul_(add[b].to(dtype), scale[:, None, None])
        if bias is not None:
            value.add_(bias[b][:, None, None])
        if residual is None:
            out[b].copy_(value)
        else:
            torch.add(value, residual[b], out=out[b])
    return out


def moments(grad: Tensor, x: Tensor) -> Tensor:
    """See :func:`mmrla.ops.depthwise.moments`."""
    dtype = accumulation_dtype(x.dtype)
    batch, channels = x.shape[:2]
    out = x.new_empty((batch, channels, 3, 3), dtype=dtype)
    weight = x.new_empty((channels, 1, 3, 3), dtype=dtype)
    for b in range(batch):
        sample = (grad[b : b + 1].to(dtype), x[b : b + 1].to(dtype))
        one = [1, 1]
        _, found, _ = torch.ops.aten.convolution_backward(
            *sample, weight, None, one, one, one, False, [0, 0], channels, [False, True, False]
        )
        out[b].copy_(found[:, 0])
    return out
