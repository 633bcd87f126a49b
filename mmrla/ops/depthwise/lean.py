"""The depthwise stencil in plain torch, as convolutions whose groups are channels."""

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
    batch, channels, height, width = x.shape
    wide = x.to(dtype)
    if x.is_contiguous():
        # Taps differ between samples: every channel of every sample is a group.
        maps = wide.view(1, batch * channels, height, width)
        weight = taps.expand(batch, -1, -1, -1).reshape(-1, 1, 3, 3)
        shift = None if bias is None else bias.reshape(-1)
        out = F.conv2d(maps, weight, shift, padding=1, groups=batch * channels).view_as(x)
    else:
        out = torch.empty_like(x, dtype=dtype)
        for b in range(batch):
            weight = taps[b if len(taps) > 1 else 0].unsqueeze(1)
            shift = None if bias is None else bias[b]
            out[b] = F.conv2d(wide[b : b + 1], weight, shift, padding=1, groups=channels)[0]
    if scale is not None and add is not None:
        out.addcmul_(add.to(dtype), scale[:, None, None])
    if residual is not None:
        out.add_(residual)
    return out.to(x.dtype)


def moments(grad: Tensor, x: Tensor) -> Tensor:
    """See :func:`mmrla.ops.depthwise.moments`."""
    dtype = accumulation_dtype(x.dtype)
    batch, channels, height, width = x.shape
    if grad.is_contiguous() and x.is_contiguous():
        view = (1, batch * channels, height, width)
        return _tap_gradients(grad.to(dtype).view(view), x.to(dtype).view(view)).view(
            batch, channels, 3, 3
        )
    out = x.new_empty((batch, channels, 3, 3), dtype=dtype)
    for b in range(batch):
        out[b] = _tap_gradients(grad[b : b + 1].to(dtype), x[b : b + 1].to(dtype))[:, 0]
    return out


def _tap_gradients(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of a depthwise convolution's weight, ``[C, 1, 3, 3]``, over one sample."""
    channels, one = x.shape[1], [1, 1]
    weight = x.new_empty((channels, 1, 3, 3))
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, one, one, one, False, [0, 0], channels, [False, True, False]
    )[1]
