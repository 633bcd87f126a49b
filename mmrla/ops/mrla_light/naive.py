"""MRLA-light in plain torch: the ground truth of every faster version."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrla.ops.memory import autocast_dtype
from mmrla.ops.query_key import per_channel, query_key


def mrla_light_naive(
    x: Tensor,
    previous: Tensor | None,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor | None,
    lambda_t: Tensor | None,
    head_channels: int,
    value_act: str | None = None,
) -> Tensor:
    """``o = lambda_t * previous + sigmoid(<q, k>_head / sqrt(d_k)) * DWConv3x3(x)`` (Eq. 10).

    Args:
        x: The layer's output, ``[B, C, H, W]``.
        previous: What stands for the previous MRLA output, shaped like ``x``, or None in the first
            layer of a group where there is none.
        query_weight: The query's Conv1D, ``[1, 1, k]``, k odd, or fully connected layer,
            ``[C, C]``.
        key_weight: The key's, likewise.
        value_weight: The value's depthwise convolution, ``[C, 1, 3, 3]``; None: the value is x.
        lambda_t: ``[C]``, the weight of ``previous``; None exactly where ``previous`` is.
        head_channels: d_k; divides C.
        value_act: ``'gelu'`` applies it to the value (Algorithm 4); None, nothing.

    Returns:
        o, ``[B, C, H, W]``, in the dtype that the convolution of ``x`` has (autocast's, under it).
    """
    query, key = query_key(x, query_weight, key_weight)
    heads = (-1, head_channels)
    with torch.autocast(x.device.type, enabled=False):  # logits stay in float32
        logits = torch.einsum("bhd,bhd->bh", query.unflatten(1, heads), key.unflatten(1, heads))
    gate = torch.sigmoid(logits / math.sqrt(head_channels))
    if value_weight is None:
        value = x.to(autocast_dtype(x))
    else:
        value = F.conv2d(x, value_weight, padding=1, groups=x.shape[1])
    if value_act == "gelu":
        value = F.gelu(value)
    out = per_channel(gate, head_channels).to(value.dtype) * value
    if previous is not None and lambda_t is not None:
        scale = lambda_t.to(value.dtype)[:, None, None]
        out = out + scale * previous.to(value.dtype)
    return out
