"""MRLA-base's attention weights over layers, and their gradient by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def weights_of(query: Tensor, keys: Sequence[Tensor], head_channels: int) -> Tensor:
    """``softmax_s(<q, k_s>_head / sqrt(d_k))`` spread over channels: ``[t, B, C]``."""
    heads = (-1, head_channels)
    logits = (query * torch.stack(list(keys))).unflatten(2, heads).sum(-1)
    weights = (logits / math.sqrt(head_channels)).softmax(dim=0)
    return weights.repeat_interleave(head_channels, dim=2)


def weights_backward(
    grad_weights: Tensor, weights: Tensor, query: Tensor, keys: Sequence[Tensor], head_channels: int
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`weights_of`, ``[B, C]`` of the query and ``[t, B, C]`` of the keys."""
    heads = (-1, head_channels)
    per_head = grad_weights.unflatten(2, heads).sum(-1)
    weights = weights[:, :, ::head_channels]
    grad_logits = weights * (per_head - (weights * per_head).sum(0)) / math.sqrt(head_channels)
    grad_logits = grad_logits.repeat_interleave(head_channels, dim=2)
    return (grad_logits * torch.stack(list(keys))).sum(0), grad_logits * query
