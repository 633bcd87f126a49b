"""Weighted sums over a list of maps, with weights for each token: attention residuals.

Paper: Attention Residuals, Moonshot AI, 2026, https://arxiv.org/abs/2603.15031.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmrla.ops.fused import is_compiling


def inverse_rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    """One over the root mean square of each token, ``[..., C]`` to ``[...]``, float32 or wider."""
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.rsqrt(norm.square() / x.shape[-1] + eps)


def weighted_sum(sources: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """``sum_i weights_i * sources_i``, one map at a time; the weights broadcast."""
    total = weights[0] * sources[0]
    for weight, source in zip(weights[1:], sources[1:], strict=True):
        total = torch.addcmul(total, weight, source)
    return total


def source_weights(query: Tensor, scales: Tensor, sources: Sequence[Tensor]) -> Tensor:
    """``softmax_i(query . RMSNorm(sources_i))``, ``[T, ...]``; see :func:`attend_to_sources`."""
    return (scales * _products(query, sources)).softmax(0)


def attend_to_sources(query: Tensor, scales: Tensor, sources: Sequence[Tensor]) -> Tensor:
    """``sum_i softmax_i(query . RMSNorm(sources_i)) * sources_i``, token by token.

    Backward keeps the sources themselves and a few numbers per token: T layers that share a list of
    sources keep T maps, not T squared.

    Args:
        query: ``[C]``.
        scales: ``[T, ...]``: :func:`inverse_rms` of each source.
        sources: T maps ``[..., C]``, of any floating point types.

    Returns:
        ``[..., C]`` in the type of the first source.
    """
    with torch.autocast(query.device.type, enabled=False):
        if is_compiling() or torch.jit.is_tracing() or not torch.is_grad_enabled():
            return _weighted(source_weights(query, scales, sources), sources)
        return _AttendToSources.apply(query, scales, *sources)


def _products(query: Tensor, sources: Sequence[Tensor]) -> Tensor:
    return torch.stack([source @ query.to(source.dtype) for source in sources])


def _weighted(weights: Tensor, sources: Sequence[Tensor]) -> Tensor:
    return weighted_sum(sources, weights[..., None].unbind()).to(sources[0].dtype)


class _AttendToSources(torch.autograd.Function):
    """What autograd would do, without its products as large as the maps."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, scales: Tensor, *sources: Tensor) -> Tensor:
        products = _products(query, sources)
        weights = (scales * products).softmax(0)
        ctx.save_for_backward(query, scales, products, weights, *sources)
        return _weighted(weights, sources)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, scales, products, weights, *sources = ctx.saved_tensors
        rows = grad.reshape(-1, 1, grad.shape[-1])
        # By matrix products: they read both maps once and write no third one.
        dots = [torch.bmm(rows.to(v.dtype), v.reshape(*rows.shape[::2], 1)) for v in sources]
        grad_weights = torch.stack(dots).view_as(weights).to(weights.dtype)
        grad_logits = weights * (grad_weights - (weights * grad_weights).sum(0))
        grad_products = grad_logits * scales
        grad_query = torch.zeros_like(query)
        grads: list[Tensor | None] = []
        for i, source in enumerate(sources):
            share = grad_products[i].to(source.dtype)
            grad_query += share.reshape(-1) @ source.reshape(-1, source.shape[-1])
            if ctx.needs_input_grad[2 + i]:
                own = (weights[i, ..., None] * grad).addcmul_(grad_products[i, ..., None], query)
                grads.append(own.to(source.dtype))
            else:
                grads.append(None)
        return grad_query, grad_logits * products, *grads
