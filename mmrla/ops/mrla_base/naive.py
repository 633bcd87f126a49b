"""MRLA-base's retrieval in plain torch: the ground truth of every faster version."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmrla.ops.query_key import per_channel


def mrla_base_naive(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], head_channels: int
) -> Tensor:
    """``o_t = sum_{s<=t} softmax_s(<q_t, k_s>_head / sqrt(d_k)) * V_s`` (Eq. 9).

    The sum runs over the list; values are never stacked, so that autograd keeps references to
    them instead of a copy a layer.

    Args:
        query: The current layer's query, ``[B, C]``.
        keys: The keys of layers 1 ... t, each ``[B, C]``.
        values: The values of layers 1 ... t, each ``[B, C, H, W]``.
        head_channels: d_k; divides C.

    Returns:
        o_t, ``[B, C, H, W]``, in the dtype of the values.
    """
    heads = query.unflatten(1, (-1, head_channels))
    stacked_keys = torch.stack(tuple(keys), dim=1).unflatten(2, (-1, head_channels))
    with torch.autocast(query.device.type, enabled=False):  # logits stay in float32
        logits = torch.einsum("bhd,bthd->tbh", heads, stacked_keys) / math.sqrt(head_channels)
    weights = logits.softmax(dim=0)
    out = values[0].new_zeros(())
    for weight, value in zip(weights, values, strict=True):
        out = torch.addcmul(out, per_channel(weight, head_channels).to(value.dtype), value)
    return out
