"""Multi-head layer attention in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from mmrla.ops.memory import autocast_dtype
from mmrla.ops.mrla_base import mrla_base
from mmrla.ops.query_key import project, summary_of


def mla_naive(
    features: Sequence[Tensor],
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor | None,
    head_channels: int,
) -> Tensor:
    """``o_t = sum_{s<=t} softmax_s(<q_t, k_s>_head / sqrt(d_k)) * V_s`` (Eq. 3 and 4).

    Layer t's own f_K and f_V make the keys and values of all features anew, so that a group of t
    layers convolves t (t + 1) / 2 maps. What follows is the retrieval of MRLA-base, in whatever
    backend that has.

    Args:
        features: X_1 ... X_t, each ``[B, C, H, W]``, in one dtype.
        query_weight: f_Q of layer t: Conv1D, ``[1, 1, k]``, k odd, or fully connected, ``[C, C]``.
        key_weight: f_K, likewise.
        value_weight: f_V, a depthwise convolution ``[C, 1, 3, 3]``; None: the value is X_s.
        head_channels: d_k; divides C.

    Returns:
        o_t, ``[B, C, H, W]``, in the dtype that the convolution of ``X_t`` has.
    """
    summaries = [summary_of(x) for x in features]
    query = project(summaries[-1], query_weight)
    keys = [project(summary, key_weight) for summary in summaries]
    if value_weight is None:
        values = [x.to(autocast_dtype(x)) for x in features]
    else:
        values = [F.conv2d(x, value_weight, padding=1, groups=x.shape[1]) for x in features]
    return mrla_base(query, keys, values, head_channels)
