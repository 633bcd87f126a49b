"""MRLA-light's gate, one weight a head and sample, and its gradient by hand."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmrla.ops.query_key import query_key_backward, query_key_of


def gate_of(
    summary: Tensor, query_weight: Tensor, key_weight: Tensor, head_channels: int
) -> Tensor:
    """``sigmoid(<q, k>_head / sqrt(d_k))``, spread over channels: ``[B, C]`` from ``[B, C]``."""
    query, key = query_key_of(summary, query_weight, key_weight)
    logits = (query * key).unflatten(1, (-1, head_channels)).sum(-1) / math.sqrt(head_channels)
    return torch.sigmoid(logits).repeat_interleave(head_channels, dim=1)


def gate_backward(
    grad_gate: Tensor,
    summary: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    head_channels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`gate_of`: of the summary and of both weights.

    The gate itself is computed again; it is tiny.
    """
    query, key = query_key_of(summary, query_weight, key_weight)
    heads = (-1, head_channels)
    root = math.sqrt(head_channels)
    gate = torch.sigmoid((query * key).unflatten(1, heads).sum(-1) / root)
    grad_logits = grad_gate.unflatten(1, heads).sum(-1) * gate * (1 - gate) / root
    grad_logits = grad_logits.repeat_interleave(head_channels, dim=1)
    return query_key_backward(
        grad_logits * key, grad_logits * query, summary, query_weight, key_weight
    )
