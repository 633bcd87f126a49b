"""Passes over feature maps ``[B, C, H, W]`` that the fused operations are made of.

In plain torch, or by Triton's kernels where those run. Sums are taken, and factors applied, in the
accumulation dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrla.ops.batch_norm import UsedNorm
from mmrla.ops.query_key import accumulation_dtype
from mmrla.ops.tiles import tiles
from mmrla.ops.triton_support import use_triton


def laid_out(x: Tensor, like: Tensor) -> Tensor:
    """``x`` with the strides of a fresh ``torch.empty_like(like)``, copied where it has others."""
    out = torch.empty_like(like, dtype=x.dtype, device="meta")
    if x.stride() == out.stride():
        return x
    return torch.empty_like(like, dtype=x.dtype).copy_(x)


def _kernels(*maps: Tensor | None) -> Any:
    """Triton's kernels where they can run these feature maps, else None."""
    given = [x for x in maps if x is not None]
    if not use_triton(given[0]):
        return None
    from mmrla.ops import passes_triton

    return passes_triton if all(map(passes_triton.is_dense, given)) else None


def dot(a: Tensor, b: Tensor) -> Tensor:
    """``sum_hw a * b`` of two feature maps: ``[B, C]``."""
    if kernels := _kernels(a, b):
        return kernels.dot(a, b)
    dtype = accumulation_dtype(a.dtype)
    out = a.new_empty(a.shape[:2], dtype=dtype)
    for tile in tiles(a):
        out[tile] = (a[tile].to(dtype) * b[tile]).sum(dim=(2, 3))
    return out


def residual_relu(
    z: Tensor, shortcut: Tensor, norm: UsedNorm, mean: bool = True
) -> tuple[Tensor, Tensor]:
    """``y = relu(norm(z) + shortcut)`` and its mean over pixels, ``[B, C]``, if asked for."""
    if kernels := _kernels(z, shortcut):
        y = kernels.affine_add(z, *norm.affine(), shortcut, torch.empty_like(z), relu=True)
        if not mean:
            return y, y.new_empty(0)
        return y, y.mean(dim=(2, 3), dtype=accumulation_dtype(z.dtype))
    y = torch.empty_like(z)
    means = z.new_empty(z.shape[:2] if mean else 0, dtype=accumulation_dtype(z.dtype))
    for tile in tiles(z):
        now = norm.of(tile[1])
        normed = F.batch_norm(z[tile], now.mean, now.var, now.weight, now.bias, False, 0.0, now.eps)
        torch.add(normed, shortcut[tile], out=y[tile]).relu_()
        if mean:
            means[tile] = y[tile].mean(dim=(2, 3), dtype=means.dtype)
    return y, means


def add_relu_(y: Tensor, shortcut: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """``relu(y + shortcut)`` in place, laid out as ``like``, and its mean over pixels."""
    y = laid_out(y, like)
    mean = y.new_empty(y.shape[:2], dtype=accumulation_dtype(y.dtype))
    for tile in tiles(y):
        mean[tile] = y[tile].add_(shortcut[tile]).relu_().mean(dim=(2, 3), dtype=mean.dtype)
    return y, mean


def scaled_affine(norm: UsedNorm, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """``scale_b * norm`` as a factor and a shift, ``[C]``, or ``[B, C]`` with a scale."""
    factor, shift = norm.affine()
    return (factor, shift) if scale is None else (scale[:, None] * factor, scale[:, None] * shift)


def add_norm_(y: Tensor, o: Tensor, norm: UsedNorm, scale: Tensor | None) -> Tensor:
    """``y += scale_b * norm(o)`` in place; ``scale`` is ``[B]``."""
    factor, shift = scaled_affine(norm, scale)
    if kernels := _kernels(y, o):
        return kernels.affine_add(o, factor, shift, y, y)
    factor, shift = (v.expand(y.shape[:2])[..., None, None] for v in (factor, shift))
    for tile in tiles(y):
        if y.dtype == factor.dtype:
            y[tile].addcmul_(o[tile], factor[tile]).add_(shift[tile])
        else:
            y[tile].add_((o[tile] * factor[tile]).add_(shift[tile]))
    return y


def norm_backward(
    x: Tensor, grad: Tensor, norm: UsedNorm, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``norm(x)`` when that of its result is ``scale_b * grad``.

    Args:
        x: The norm's input.
        grad: Shaped like ``x``.
        norm: The norm.
        scale: ``[B]``, or None for 1.

    Returns:
        The gradients of ``x`` and of the norm's weight and bias, ``[C]``.
    """
    if scale is not None:
        grad = grad * scale.to(grad.dtype)[:, None, None, None]
    inverse_std = torch.rsqrt(norm.var + norm.eps)
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        grad, x, norm.weight, norm.mean, norm.var, norm.mean, inverse_std, norm.uses_batch,
        norm.eps, [True, True, True],
    )  # fmt: skip
    return laid_out(grad_x, x), grad_weight, grad_bias


def relu_backward_(grad: Tensor, y: Tensor) -> Tensor:
    """``grad`` set to zero, in place, where ``y`` is not positive."""
    return torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=grad)


def scale_add_(out: Tensor, scale: Tensor, add: Tensor) -> Tensor:
    """``out = scale_c * out + add`` in place."""
    if kernels := _kernels(out, add):
        return kernels.affine_add(out, scale, None, add, out)
    for tile in tiles(out):
        out[tile].mul_(scale[tile[1], None, None]).add_(add[tile])
    return out


def weighted_sum(
    values: Sequence[Tensor],
    weights: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``sum_s weights[s] * values[s] + bias + residual``, without stacking the values.

    Goes sample by sample, so that the sum stays cached.

    Args:
        values: Each ``[B, C, H, W]``.
        weights: ``[t, B, C]``.
        bias: ``[B, C]``, with ``residual``.
        residual: Shaped like a value.
    """
    kernels = _kernels(*values, residual)
    if kernels and all(v.stride() == values[-1].stride() for v in values):
        return kernels.weighted_sum(values, weights, bias, residual)
    dtype = accumulation_dtype(values[-1].dtype)
    out = torch.empty_like(values[-1])
    columns = weights[..., None, None]
    for i in range(len(out)):
        same = out.dtype == dtype
        total = out[i] if same else torch.empty_like(out[i], dtype=dtype)
        if residual is None or bias is None:
            torch.mul(values[0][i], columns[0, i], out=total)
        else:
            torch.add(residual[i], bias[i, :, None, None], out=total)
        for s in range(0 if residual is not None else 1, len(values)):
            value = values[s][i]
            total.addcmul_(value if same else value.to(dtype), columns[s, i])
        if not same:
            out[i] = total
    return out


def dots(grad: Tensor, values: Sequence[Tensor]) -> Tensor:
    """``sum_hw grad * values[s]`` for every s: ``[t, B, C]``."""
    if kernels := _kernels(grad, *values):
        return torch.stack([kernels.dot(grad, value) for value in values])
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
    if kernels := _kernels(grad, add):
        return kernels.affine_add(grad, weight, None, add, torch.empty_like(grad))
    out = torch.mul(grad, weight[:, :, None, None], out=torch.empty_like(grad))
    return out if add is None else out.add_(add)
