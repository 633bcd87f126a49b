"""Weighted sums over a list of maps, with weights for each token: attention residuals.

Paper: Attention Residuals, Moonshot AI, 2026, https://arxiv.org/abs/2603.15031.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def inverse_rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    """One over the root mean square of each token, ``[..., C]`` to ``[...]``, float32 or wider."""
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.rsqrt(norm.square() / x.shape[-1] + eps)


def weighted_sum(sources: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """``sum_i weights_i * sources_i``, one map at a time; the weights broadcast."""
    total = weights[0] * sources[0]
    for weight, source in zip(weights[1:], sources[1:], strict=True):
        total.addcmul_(weight, source)
    return total


def source_weights(query: Tensor, scales: Tensor, sources: Sequence[Tensor]) -> Tensor:
    """``softmax_i(query . RMSNorm(sources_i))``, ``[T, ...]``; see :func:`attend_to_sources`."""
    products = torch.stack([source @ query.to(source.dtype) for source in sources])
    return (scales * products).softmax(0)


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
        weights = source_weights(query, scales, sources)[..., None]
        return weighted_sum(sources, weights.unbind()).to(sources[0].dtype)
