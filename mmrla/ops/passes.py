"""Passes over feature maps that the fused operations are made of, in plain torch.

Each walks sample by sample, so that what one step wrote is still cached for the next, and works in
the accumulation dtype. ``out`` tensors have the dtype and shape of a feature map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmrla.ops.batch_norm import Affine
from mmrla.ops.query_key import accumulation_dtype


def _column(channels: Tensor) -> Tensor:
    return channels[:, None, None]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """``sum_hw a * b`` of two ``[B, C, H, W]``: ``[B, C]``."""
    dtype = accumulation_dtype(a.dtype)
    out = a.new_empty(a.shape[:2], dtype=dtype)
    for i in range(len(a)):
        out[i] = (a[i].to(dtype) * b[i]).sum(dim=(1, 2))
    return out


def residual_relu(z: Tensor, shortcut: Tensor, norm: Affine) -> tuple[Tensor, Tensor]:
    """``y = relu(norm(z) + shortcut)`` and its mean over pixels, ``[B, C]``."""
    dtype = accumulation_dtype(z.dtype)
    y = torch.empty_like(z)
    mean = z.new_empty(z.shape[:2], dtype=dtype)
    scale, shift = _column(norm.scale), _column(norm.shift)
    for i in range(len(z)):
        if z.dtype == dtype:
            torch.mul(z[i], scale, out=y[i]).add_(shift).add_(shortcut[i]).relu_()
        else:
            y[i] = (z[i].to(dtype) * scale).add_(shift).add_(shortcut[i]).relu_()
        torch.sum(y[i], dim=(1, 2), dtype=dtype, out=mean[i])
    return y, mean.div_(z.shape[2] * z.shape[3])


def add_norm_(y: Tensor, o: Tensor, norm: Affine, scale: Tensor | None) -> Tensor:
    """``y += scale_b * norm(o)`` in place; ``scale`` is ``[B]``."""
    for i in range(len(y)):
        factor, shift = norm.scale, norm.shift
        if scale is not None:
            factor, shift = factor * scale[i], shift * scale[i]
        y[i].add_((o[i] * _column(factor)).add_(_column(shift)))
    return y


def norm_backward(
    x: Tensor, grad: Tensor, norm: Affine, out: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of ``norm(x)`` when that of its result is ``g = scale_b * grad``.

    Args:
        x: The norm's input.
        grad: Shaped like ``x``.
        norm: The norm.
        out: Where the gradient of ``x`` goes; may be ``x`` itself.
        scale: ``[B]``, or None for 1.

    Returns:
        The gradients of the norm's weight and bias, ``[C]``.
    """
    dtype = accumulation_dtype(x.dtype)
    sums = x.new_zeros((2, x.shape[1]), dtype=dtype)
    for i in range(len(x)):
        centred = torch.sub(x[i], _column(norm.mean))  # so that a large mean cancels nothing
        found = torch.stack(
            (grad[i].sum(dim=(1, 2), dtype=dtype), centred.mul_(grad[i]).sum(dim=(1, 2)))
        )
        sums += found if scale is None else found * scale[i]
    sum_grad, sum_product = sums
    count = x.numel() // x.shape[1]
    spread = -norm.scale * norm.inverse_std.square() * sum_product / count
    offset = -norm.scale * sum_grad / count - spread * norm.mean
    for i in range(len(x)):
        factor = _column(norm.scale if scale is None else norm.scale * scale[i])
        if not norm.uses_batch:
            torch.mul(grad[i], factor, out=out[i])
        elif x.dtype == dtype:
            torch.mul(x[i], _column(spread), out=out[i])
            out[i].add_(_column(offset)).addcmul_(grad[i], factor)
        else:
            found = x[i] * _column(spread)
            out[i] = found.add_(_column(offset)).addcmul_(grad[i].to(dtype), factor)
    return sum_product * norm.inverse_std, sum_grad


def relu_backward_(grad: Tensor, y: Tensor) -> Tensor:
    """``grad`` set to zero, in place, where ``y`` is not positive."""
    for i in range(len(grad)):
        torch.ops.aten.threshold_backward.grad_input(grad[i], y[i], 0, grad_input=grad[i])
    return grad


def scale_add_(out: Tensor, scale: Tensor, add: Tensor) -> Tensor:
    """``out = scale_c * out + add`` in place."""
    for i in range(len(out)):
        out[i].mul_(_column(scale)).add_(add[i])
    return out


def weighted_sum(values: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``sum_s weights[s] * values[s]``, weights ``[t, B, C]``, without stacking the values."""
    dtype = accumulation_dtype(values[-1].dtype)
    out = torch.empty_like(values[-1])
    for i in range(len(out)):
        same = out.dtype == dtype
        total = out[i] if same else torch.empty_like(out[i], dtype=dtype)
        torch.mul(values[0][i], _column(weights[0, i]), out=total)
        for value, weight in zip(values[1:], weights[1:, i], strict=True):
            total.addcmul_(value[i] if same else value[i].to(dtype), _column(weight))
        if not same:
            out[i] = total
    return out


def dots(grad: Tensor, values: Sequence[Tensor]) -> Tensor:
    """``sum_hw grad * values[s]`` for every s: ``[t, B, C]``."""
    dtype = accumulation_dtype(grad.dtype)
    out = grad.new_empty((len(values), *grad.shape[:2]), dtype=dtype)
    for i in range(len(grad)):
        sample = grad[i].to(dtype)
        scratch = torch.empty_like(sample)
        for s, value in enumerate(values):
            torch.sum(torch.mul(sample, value[i], out=scratch), dim=(1, 2), out=out[s, i])
    return out


def scaled(grad: Tensor, weight: Tensor, add: Tensor | None = None) -> Tensor:
    """``weight[b, c] * grad + add``."""
    out = torch.empty_like(grad)
    for i in range(len(grad)):
        torch.mul(grad[i], _column(weight[i]), out=out[i])
        if add is not None:
            out[i].add_(add[i])
    return out
