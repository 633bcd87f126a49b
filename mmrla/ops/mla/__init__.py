"""Multi-head layer attention as one operation (Eq. 4 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmrla.ops.dispatch import Backend, Op, always
from mmrla.ops.memory import check_one_device, check_weight_dtype
from mmrla.ops.mla.naive import mla_naive
from mmrla.ops.query_key import (
    check_feature_map,
    check_head_channels,
    check_projection,
    check_value_weight,
)


def _check(
    features: Sequence[Tensor],
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor | None,
    head_channels: int,
) -> None:
    if not features:
        raise ValueError("features must hold one map for each layer so far, at least one, got none")
    for s, x in enumerate(features):
        check_feature_map(f"features[{s}]", x)
        if x.shape != features[-1].shape:
            raise ValueError(
                "all features of a group must have one shape, got "
                f"features[{s}].shape={tuple(x.shape)} and "
                f"features[-1].shape={tuple(features[-1].shape)}"
            )
    channels = features[-1].shape[1]
    check_head_channels(channels, head_channels)
    check_projection("query_weight", query_weight, channels)
    check_projection("key_weight", key_weight, channels)
    if value_weight is not None:
        check_value_weight(features[-1], value_weight)
        for x in features:
            check_weight_dtype("value_weight", value_weight, x)
    check_one_device(*features, query_weight, key_weight, value_weight)


mla = Op("mla", _check, [Backend("naive", mla_naive, always)])
"""``mla(features, query_weight, key_weight, value_weight, head_channels)``.

``o_t = sum_s softmax_s(<f_Q(X_t), f_K(X_s)>_head / sqrt(d_k)) * f_V(X_s)`` with one layer's f_Q,
f_K and f_V; shapes and errors as in :func:`mmrla.ops.mla.naive.mla_naive`.
"""

__all__ = ["mla"]
