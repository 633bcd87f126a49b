"""MRLA-light as one operation (Eq. 8 and 10, Algorithms 3 and 4 of the paper)."""

from __future__ import annotations

from torch import Tensor

from mmrla.ops.batch_norm import BatchNorm
from mmrla.ops.dispatch import Backend, Op, always
from mmrla.ops.memory import check_one_device, check_weight_dtype
from mmrla.ops.mrla_light import fused
from mmrla.ops.mrla_light.naive import mrla_light_naive
from mmrla.ops.mrla_light.tail import mrla_light_tail_fused, mrla_light_tail_naive
from mmrla.ops.query_key import (
    check_feature_map,
    check_head_channels,
    check_projection,
    check_query_key_value,
    check_value_weight,
)
from mmrla.ops.residual_tail import check_tail, why_not_tail

VALUE_ACTS = (None, "gelu")


def _check(
    x: Tensor,
    previous: Tensor | None,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor | None,
    lambda_t: Tensor | None,
    head_channels: int,
    value_act: str | None = None,
) -> None:
    check_feature_map("x", x)
    channels = x.shape[1]
    if value_act not in VALUE_ACTS:
        raise ValueError(f"value_act must be one of {VALUE_ACTS}, got {value_act!r}")
    check_head_channels(channels, head_channels)
    check_projection("query_weight", query_weight, channels)
    check_projection("key_weight", key_weight, channels)
    if value_weight is not None:
        check_value_weight(x, value_weight)
        check_weight_dtype("value_weight", value_weight, x)
    if (previous is None) != (lambda_t is None):
        raise ValueError(
            "previous and lambda_t come together, got "
            f"{'no' if previous is None else 'a'} previous and "
            f"{'no' if lambda_t is None else 'a'} lambda_t"
        )
    if previous is not None and lambda_t is not None:
        check_feature_map("previous", previous)
        if previous.shape != x.shape:
            raise ValueError(
                "previous must have the shape of x, got "
                f"previous.shape={tuple(previous.shape)} and x.shape={tuple(x.shape)}"
            )
        if lambda_t.shape != (channels,):
            raise ValueError(f"lambda_t must be [{channels}], got {tuple(lambda_t.shape)}")
    check_one_device(x, previous, query_weight, key_weight, value_weight, lambda_t)


def _check_tail(
    z: Tensor,
    shortcut: Tensor,
    norm: BatchNorm,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    lambda_t: Tensor,
    head_channels: int,
    out_norm: BatchNorm,
    scale: Tensor | None = None,
) -> None:
    check_tail(z, shortcut, norm, out_norm, scale)
    check_query_key_value(z, query_weight, key_weight, value_weight, head_channels)
    check_weight_dtype("value_weight", value_weight, z)
    if lambda_t.shape != z.shape[1:2]:
        raise ValueError(f"lambda_t must be [{z.shape[1]}], got {tuple(lambda_t.shape)}")
    weights = (query_weight, key_weight, value_weight, lambda_t)
    check_one_device(z, shortcut, *norm[:4], *weights, *out_norm[:4], scale)


mrla_light = Op(
    "mrla_light",
    _check,
    [
        Backend("fused", fused.mrla_light_fused, fused.why_not),
        Backend("naive", mrla_light_naive, always),
    ],
)
"""``mrla_light(x, previous, query_weight, key_weight, value_weight, lambda_t, head_channels,
value_act=None)``.

``o = lambda_t * previous + sigmoid(<q, k>_head / sqrt(d_k)) * DWConv3x3(x)``; shapes and errors as
in :func:`mmrla.ops.mrla_light.naive.mrla_light_naive`; ``backend=`` forces an implementation.
"""

mrla_light_tail = Op(
    "mrla_light_tail",
    _check_tail,
    [
        Backend("fused", mrla_light_tail_fused, why_not_tail),
        Backend("naive", mrla_light_tail_naive, always),
    ],
)
"""``mrla_light_tail(z, shortcut, norm, query_weight, key_weight, value_weight, lambda_t,
head_channels, out_norm, scale=None)``.

``y = relu(norm(z) + shortcut)``, ``out = y + scale * out_norm(mrla_light(y, shortcut))``;
arguments and result in :func:`mmrla.ops.mrla_light.tail.mrla_light_tail_naive`.
"""

__all__ = ["mrla_light", "mrla_light_tail"]
