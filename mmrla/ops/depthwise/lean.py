"""The depthwise stencil in plain torch, as convolutions whose groups are channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrla.ops.query_key import accumulation_dtype

PART = 1 << 19
"""Values that one convolution takes on a CPU where a map has many more: its temporary copies then
stay cached, and small enough for the allocator to keep instead of returning to the system."""


def _parts(x: Tensor) -> list[slice]:
    """``[1, groups, H, W]`` in parts of about :data:`PART` values."""
    groups, pixels = x.shape[1], x.shape[2] * x.shape[3]
    if x.device.type != "cpu" or groups * pixels <= 2 * PART:
        return [slice(None)]
    size = max(1, PART // pixels)
    return [slice(first, first + size) for first in range(0, groups, size)]


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
    batch, channels, height, width = x.shape
    wide = x.to(dtype)
    if x.is_contiguous():
        # Taps differ between samples: every channel of every sample is a group.
        view = (1, batch * channels, height, width)
        value = _convolve(
            wide.view(view),
            taps.expand(batch, -1, -1, -1).reshape(-1, 1, 3, 3),
            None if bias is None else bias.reshape(-1),
        ).view_as(x)
    else:
        value = torch.empty_like(x, dtype=dtype)
        for b in range(batch):
            weight = taps[b if len(taps) > 1 else 0].unsqueeze(1)
            shift = None if bias is None else bias[b]
            value[b] = _convolve(wide[b : b + 1], weight, shift)[0]
    if scale is not None and add is not None:
        value.addcmul_(add.to(dtype), scale[:, None, None])
    if residual is not None:
        value.add_(residual)
    return value.to(x.dtype)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise convolution of one sample ``[1, C, H, W]``."""
    parts = _parts(x)
    out = torch.empty_like(x) if len(parts) > 1 else x
    for p in parts:
        part, shift = x[:, p], None if bias is None else bias[p]
        found = F.conv2d(part, weight[p], shift, padding=1, groups=part.shape[1])
        if len(parts) == 1:
            return found
        out[:, p] = found
    return out


def moments(grad: Tensor, x: Tensor) -> Tensor:
    """See :func:`mmrla.ops.depthwise.moments`."""
    dtype = accumulation_dtype(x.dtype)
    batch, channels, height, width = x.shape
    if grad.is_contiguous() and x.is_contiguous():
        view = (1, batch * channels, height, width)
        found = _tap_gradients(grad.to(dtype).view(view), x.to(dtype).view(view))
        return found.view(batch, channels, 3, 3)
    out = x.new_empty((batch, channels, 3, 3), dtype=dtype)
    for b in range(batch):
        out[b] = _tap_gradients(grad[b : b + 1].to(dtype), x[b : b + 1].to(dtype))[:, 0]
    return out


def _tap_gradients(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of a depthwise convolution's weight, ``[C, 1, 3, 3]``, over one sample."""
    weight, one = x.new_empty((x.shape[1], 1, 3, 3)), [1, 1]
    found = []
    for p in _parts(x):
        part = weight[p]
        sample = (grad[:, p], x[:, p], part, None, one, one, one, False, [0, 0], len(part))
        found.append(torch.ops.aten.convolution_backward(*sample, [False, True, False])[1])
    return found[0] if len(found) == 1 else torch.cat(found)
