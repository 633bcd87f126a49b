"""The 3x3 depthwise convolution of the value, with what comes before and after in one pass.

Two functions carry both directions: the gradient of a convolution with respect to its input is a
convolution with the flipped taps, and :func:`moments` gives the gradients of taps and gates.
"""

from __future__ import annotations

from torch import Tensor

from mmrla.ops.depthwise import lean
from mmrla.ops.triton_support import use_triton


def stencil(
    x: Tensor,
    taps: Tensor,
    scale: Tensor | None = None,
    add: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``out = sum_ij taps[b, c, i, j] * x[b, c, h + i - 1, w + j - 1] + scale * add + ...``.

    Args:
        x: ``[B, C, H, W]``; outside it is zero.
        taps: ``[B, C, 3, 3]``, or ``[1, C, 3, 3]`` for all samples; in the accumulation dtype.
        scale: ``[C]`` or ``[B, C]``, with ``add``.
        add: Shaped like ``x``, any strides.
        bias: ``[B, C]``, added to every pixel.
        residual: Shaped like ``x``, added.

    Returns:
        Like ``x`` in shape, dtype and memory format.
    """
    if use_triton(x):
        from mmrla.ops.depthwise import kernels

        return kernels.stencil(x, taps, scale, add, bias, residual)
    return lean.stencil(x, taps, scale, add, bias, residual)


def moments(grad: Tensor, x: Tensor) -> Tensor:
    """``M[b, c, i, j] = sum_hw grad[b, c, h, w] * x[b, c, h + i - 1, w + j - 1]``.

    Args:
        grad: ``[B, C, H, W]``.
        x: Shaped like ``grad``.

    Returns:
        ``[B, C, 3, 3]`` in the accumulation dtype.
    """
    if use_triton(x):
        from mmrla.ops.depthwise import kernels

        return kernels.moments(grad, x)
    return lean.moments(grad, x)


__all__ = ["moments", "stencil"]
