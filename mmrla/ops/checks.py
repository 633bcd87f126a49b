"""Checks of arguments: errors give the argument, the requirement and the actual value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmrla.ops.reference import (
    NO_LAYERS,
    BaseGroup,
    BaseWeights,
    LightWeights,
    Norm,
    autocast_is_on,
)

VALUE_ACTS = (None, "gelu")


def check_head_channels(channels: int, head_channels: int) -> None:
    """Raise ValueError, listing allowed values, unless ``head_channels`` divides ``channels``."""
    if isinstance(head_channels, bool) or not isinstance(head_channels, int):
        raise TypeError(f"head_channels must be an int, got {head_channels!r}")
    if head_channels < 1 or channels % head_channels:
        allowed = [d for d in range(1, channels + 1) if channels % d == 0]
        raise ValueError(
            f"head_channels must divide the layer's channels, got {head_channels=} with "
            f"{channels=}; allowed: {', '.join(map(str, allowed))}"
        )


def check_feature_map(name: str, x: Tensor) -> None:
    """Raise unless ``x`` is a floating point tensor of four dimensions with at least one pixel."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{name} must be [B, C, H, W], got {name}.shape={tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {name}.dtype={x.dtype}")
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{name} has no pixels, got {name}.shape={tuple(x.shape)}")


def check_same_shape(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Raise unless ``x`` is a feature map of the shape of another."""
    check_feature_map(name, x)
    if x.shape != like.shape:
        raise ValueError(
            f"{name} must have the shape of {like_name}, got "
            f"{name}.shape={tuple(x.shape)} and {like_name}.shape={tuple(like.shape)}"
        )


def check_vector(name: str, x: Tensor, channels: int) -> None:
    """Raise unless ``x`` has one number per channel."""
    if x.shape != (channels,):
        raise ValueError(f"{name} must be [{channels}], got {tuple(x.shape)}")


def check_projection(name: str, weight: Tensor, channels: int, connected: bool = True) -> None:
    """Raise unless a query's or key's weight is a Conv1D's or, if allowed, a connected layer's."""
    conv1d = weight.dim() == 3 and weight.shape[:2] == (1, 1) and weight.shape[2] % 2 == 1
    if not conv1d and not (connected and weight.shape == (channels, channels)):
        other = f" (Conv1D) or [{channels}, {channels}] (fully connected)" if connected else ""
        raise ValueError(f"{name} must be [1, 1, odd]{other}, got shape {tuple(weight.shape)}")


def check_value_weight(x: Tensor, value_weight: Tensor) -> None:
    """Raise unless the value's depthwise convolution fits ``x`` ``[B, C, H, W]``."""
    channels = x.shape[1]
    if value_weight.shape != (channels, 1, 3, 3):
        raise ValueError(
            f"value_weight must be [{channels}, 1, 3, 3] for x.shape={tuple(x.shape)}, "
            f"got {tuple(value_weight.shape)}"
        )
    casts = torch.float64 not in (value_weight.dtype, x.dtype) and autocast_is_on(x.device.type)
    if value_weight.dtype != x.dtype and not casts:
        raise TypeError(
            f"value_weight must have the dtype of x, got {value_weight.dtype} and {x.dtype=}"
        )


def check_one_device(*tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on one device."""
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        names = sorted(map(str, devices))
        raise ValueError(f"all tensors must be on one device, got {names}")


def check_light(
    x: Tensor,
    previous: Tensor | None,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor | None,
    lambda_t: Tensor | None,
    head_channels: int,
    value_act: str | None = None,
) -> None:
    """Raise unless the arguments of ``mrla_light`` fit each other."""
    check_feature_map("x", x)
    channels = x.shape[1]
    if value_act not in VALUE_ACTS:
        raise ValueError(f"value_act must be one of {VALUE_ACTS}, got {value_act!r}")
    check_head_channels(channels, head_channels)
    check_projection("query_weight", query_weight, channels)
    check_projection("key_weight", key_weight, channels)
    if value_weight is not None:
        check_value_weight(x, value_weight)
    if (previous is None) != (lambda_t is None):
        raise ValueError(
            "previous and lambda_t come together, got "
            f"{'no' if previous is None else 'a'} previous and "
            f"{'no' if lambda_t is None else 'a'} lambda_t"
        )
    if previous is not None and lambda_t is not None:
        check_same_shape("previous", previous, "x", x)
        check_vector("lambda_t", lambda_t, channels)
    check_one_device(x, previous, query_weight, key_weight, value_weight, lambda_t)


def check_base(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], head_channels: int
) -> None:
    """Raise unless the arguments of ``mrla_base`` fit each other."""
    if not keys or len(keys) != len(values):
        raise ValueError(
            "keys and values must hold one tensor for each layer so far, at least one, got "
            f"{len(keys)} keys and {len(values)} values"
        )
    if query.dim() != 2:
        raise ValueError(f"query must be [B, C], got {tuple(query.shape)}")
    check_head_channels(query.shape[1], head_channels)
    for s, (key, value) in enumerate(zip(keys, values, strict=True)):
        check_feature_map(f"values[{s}]", value)
        if key.shape != query.shape or value.shape[:2] != query.shape:
            raise ValueError(
                f"keys[{s}] must be [B, C] and values[{s}] [B, C, H, W] with the query's B and C, "
                f"got query {tuple(query.shape)}, key {tuple(key.shape)}, "
                f"value {tuple(value.shape)}"
            )
        if value.shape != values[-1].shape:
            raise ValueError(
                "all values of a group must have one shape, got "
                f"values[{s}].shape={tuple(value.shape)} and "
                f"values[-1].shape={tuple(values[-1].shape)}"
            )
    check_one_device(query, *keys, *values)


def check_mla(
    features: Sequence[Tensor],
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor | None,
    head_channels: int,
) -> None:
    """Raise unless the arguments of ``mla`` fit each other."""
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
        for x in features:
            check_value_weight(x, value_weight)
    check_one_device(*features, query_weight, key_weight, value_weight)


def _check_norm(name: str, norm: Norm, x: Tensor) -> None:
    channels = x.shape[1]
    names = ("weight", "bias", "running_mean", "running_var")
    for key, value in zip(names, norm.tensors, strict=True):
        if value is not None:
            check_vector(f"{name}.{key}", value, channels)
    if (norm.running_mean is None) != (norm.running_var is None):
        raise ValueError(f"{name}.running_mean and running_var come together, got one of them")
    if not norm.batch and norm.running_mean is None:
        raise ValueError(f"{name} with batch=False needs running statistics, got none")
    if norm.batch and x.numel() == channels:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}"
        )


def check_light_tail(
    z: Tensor,
    shortcut: Tensor,
    norm: Norm,
    weights: LightWeights | BaseWeights,
    out_norm: Norm,
    drop: Tensor | None = None,
) -> None:
    """Raise unless the arguments of ``mrla_light_tail`` fit each other."""
    check_feature_map("z", z)
    check_same_shape("shortcut", shortcut, "z", z)
    if shortcut.dtype != z.dtype:
        raise TypeError(
            f"shortcut must have the dtype of z, got {shortcut.dtype} and z.dtype={z.dtype}"
        )
    _check_norm("norm", norm, z)
    _check_norm("out_norm", out_norm, z)
    if drop is not None and drop.shape != z.shape[:1]:
        raise ValueError(f"drop must be [{z.shape[0]}], got {tuple(drop.shape)}")
    check_head_channels(z.shape[1], weights.head_channels)
    check_projection("weights.query", weights.query, z.shape[1], connected=False)
    check_projection("weights.key", weights.key, z.shape[1], connected=False)
    check_value_weight(z, weights.value)
    if isinstance(weights, LightWeights):
        check_vector("weights.lambda_t", weights.lambda_t, z.shape[1])
    check_one_device(z, shortcut, *norm.tensors, *weights[:-1], *out_norm.tensors, drop)


def check_base_tail(
    z: Tensor,
    shortcut: Tensor,
    norm: Norm,
    weights: BaseWeights,
    out_norm: Norm,
    drop: Tensor | None = None,
    group: BaseGroup = NO_LAYERS,
    recompute: bool = False,
) -> None:
    """Raise unless the arguments of ``mrla_base_tail`` fit each other."""
    check_light_tail(z, shortcut, norm, weights, out_norm, drop)
    if not len(group.keys) == len(group.values) == len(group.links):
        raise ValueError(
            f"group must hold as many keys as values and links, got {len(group.keys)} keys, "
            f"{len(group.values)} values, {len(group.links)} links"
        )
    for s, (key, value) in enumerate(zip(group.keys, group.values, strict=True)):
        if key.shape != z.shape[:2] or value.shape != z.shape or value.dtype != z.dtype:
            raise ValueError(
                f"keys[{s}] must be [B, C] and values[{s}] shaped like z, in its dtype, got key "
                f"{tuple(key.shape)}, value {tuple(value.shape)} {value.dtype}, "
                f"z {tuple(z.shape)} {z.dtype}"
            )
    check_one_device(z, *group.keys, *group.values)
