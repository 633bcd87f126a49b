"""MRLA-light as one operation (Eq. 8 and 10, Algorithms 3 and 4 of the paper)."""

from __future__ import annotations

from torch import Tensor

from mmrla.ops.dispatch import Backend, Op, always
from mmrla.ops.mrla_light.naive import mrla_light_naive
from mmrla.ops.query_key import check_feature_map, check_head_channels

VALUE_ACTS = (None, "gelu")


def _check(
    x: Tensor,
    previous: Tensor | None,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    lambda_t: Tensor | None,
    head_channels: int,
    value_act: str | None = None,
) -> None:
    check_feature_map("x", x)
    channels = x.shape[1]
    if value_act not in VALUE_ACTS:
        raise ValueError(f"value_act must be one of {VALUE_ACTS}, got {value_act!r}")
    check_head_channels(channels, head_channels)
    for name, weight in (("query_weight", query_weight), ("key_weight", key_weight)):
        if weight.dim() != 3 or weight.shape[:2] != (1, 1) or weight.shape[2] % 2 == 0:
            raise ValueError(f"{name} must be [1, 1, odd], got shape {tuple(weight.shape)}")
    if value_weight.shape != (channels, 1, 3, 3):
        raise ValueError(
            f"value_weight must be [{channels}, 1, 3, 3] for x.shape={tuple(x.shape)}, "
            f"got {tuple(value_weight.shape)}"
        )
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
    others = (previous, query_weight, key_weight, value_weight, lambda_t)
    devices = {str(t.device) for t in others if t is not None} | {str(x.device)}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {sorted(devices)}")


mrla_light = Op("mrla_light", _check, [Backend("naive", mrla_light_naive, always)])
"""``mrla_light(x, previous, query_weight, key_weight, value_weight, lambda_t, head_channels,
value_act=None)``.

``o = lambda_t * previous + sigmoid(<q, k>_head / sqrt(d_k)) * DWConv3x3(x)``; shapes and errors as
in :func:`mmrla.ops.mrla_light.naive.mrla_light_naive`; ``backend=`` forces an implementation.
"""

__all__ = ["mrla_light"]
