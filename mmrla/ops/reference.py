"""Reference implementation of every operation, in plain torch, differentiated by autograd.

The ground truth of the fused operations, used wherever those cannot run: in ``torch.compile``,
whose compiler fuses it, ``torch.export``, ``torch.jit.trace``, ONNX, and with other dtypes. Paper:
Cross-Layer Retrospective Retrieving via Layer Attention, ICLR 2023,
https://openreview.net/forum?id=pvgEL1yS3Ql.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Norm(NamedTuple):
    """Parameters of a batch norm: ``(x - mean) / sqrt(var + eps) * weight + bias``.

    Calling it normalises ``[B, C, H, W]``; with ``batch``, it also updates the running statistics,
    as :class:`torch.nn.BatchNorm2d` does in training.
    """

    weight: Tensor | None
    """``[C]``, gamma; None for 1."""
    bias: Tensor | None
    """``[C]``, beta; None for 0."""
    running_mean: Tensor | None
    """``[C]``; None only with ``batch``: nothing is updated."""
    running_var: Tensor | None
    """``[C]``; None together with ``running_mean``."""
    momentum: float = 0.1
    """Weight of the batch's statistics in the new running ones."""
    eps: float = 1e-5
    """Added to the variance."""
    batch: bool = True
    """Whether to normalise with the batch's statistics instead of the running ones."""

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` normalised."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.batch,
            self.momentum, self.eps,
        )  # fmt: skip

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Weight, bias, running mean and running variance."""
        return self[:4]


class LightWeights(NamedTuple):
    """Parameters of MRLA-light in one layer."""

    query: Tensor
    """``[1, 1, k]``, k odd: Conv1D along the channels."""
    key: Tensor
    """As ``query``."""
    value: Tensor
    """``[C, 1, 3, 3]``: depthwise convolution."""
    lambda_t: Tensor
    """``[C]``: weight of the shortcut."""
    head_channels: int
    """d_k; divides C."""


class BaseWeights(NamedTuple):
    """Parameters of MRLA-base in one layer; fields as in :class:`LightWeights`."""

    query: Tensor
    key: Tensor
    value: Tensor
    head_channels: int


class BaseGroup(NamedTuple):
    """State of a group of MRLA-base so far: one entry per layer in each field."""

    keys: tuple[Tensor, ...] = ()
    """``[B, C]``, in float32 or wider."""
    values: tuple[Tensor, ...] = ()
    """``[B, C, H, W]``."""
    links: tuple[Any, ...] = ()
    """How the fused operation reaches a layer's backward; None if it cannot."""

    def with_layer(self, key: Tensor, value: Tensor, link: Any = None) -> BaseGroup:
        """The group after one more layer."""
        return BaseGroup((*self.keys, key), (*self.values, value), (*self.links, link))


NO_LAYERS = BaseGroup()
"""The group before its first layer."""


def eca_kernel_size(channels: int) -> int:
    """Kernel size of the query's and key's 1-d convolution, from the number of channels.

    ``t = int(|log2(C) + 1| / 2)``, plus one if even (ECA-Net, CVPR 2020, with its gamma = 2 and b =
    1).

    Args:
        channels: C, at least 1.

    Returns:
        An odd kernel size.

    Raises:
        ValueError: ``channels`` is below 1.
    """
    if channels < 1:
        raise ValueError(f"channels must be at least 1, got {channels=}")
    t = int(abs((math.log2(channels) + 1) / 2))
    return t if t % 2 else t + 1


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of means, logits and attention weights: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def autocast_is_on(device: str) -> bool:
    """Whether autocast is on for a type of device."""
    if device == "meta":  # torch has no autocast for it, and says so
        return False
    if hasattr(torch, "get_autocast_dtype"):
        return torch.is_autocast_enabled(device)
    return torch.is_autocast_cpu_enabled() if device == "cpu" else torch.is_autocast_enabled()


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a convolution of ``x``: autocast's if it is on, else that of ``x``."""
    device = x.device.type
    if x.dtype == torch.float64 or not autocast_is_on(device):
        return x.dtype
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(device)
    return torch.get_autocast_cpu_dtype() if device == "cpu" else torch.get_autocast_gpu_dtype()


def channel_means(x: Tensor) -> Tensor:
    """``GAP(x)``, ``[B, C]``, in float32 or wider."""
    with torch.autocast(x.device.type, enabled=False):
        dtype = accumulation_dtype(x.dtype)
        if torch.jit.is_tracing():  # as pooling, which counters of work and exporters know
            return F.adaptive_avg_pool2d(x.to(dtype), 1).flatten(1)
        return x.mean(dim=(2, 3), dtype=dtype)


def project(means: Tensor, weight: Tensor) -> Tensor:
    """One projection of channel means: a Conv1D along the channels, or a fully connected layer.

    Args:
        means: ``[B, C]``, float32 or wider.
        weight: ``[1, 1, k]`` with odd k, or ``[C, C]``; converted to the dtype of ``means``.

    Returns:
        ``[B, C]``.
    """
    with torch.autocast(means.device.type, enabled=False):
        weight = weight.to(means.dtype)
        if weight.dim() == 2:
            return F.linear(means, weight)
        # int: under torch.jit.trace sizes are tensors, which old versions refuse as padding.
        padding = int(weight.shape[-1]) // 2
        return F.conv1d(means.unsqueeze(1), weight, padding=padding).squeeze(1)


def query_key(x: Tensor, query_weight: Tensor, key_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key of a layer: ``Q = Conv1D(GAP(x))``, ``K = Conv1D'(GAP(x))`` (section 4).

    Both 1-d convolutions run along the channel axis. They are computed in float32 or wider, also
    under autocast, like the logits that follow.

    Args:
        x: The layer's output, ``[B, C, H, W]``.
        query_weight: ``[1, 1, k]`` with odd k, or ``[C, C]`` for a fully connected layer.
        key_weight: Like ``query_weight``.

    Returns:
        Query and key, each ``[B, C]``.
    """
    means = channel_means(x)
    return project(means, query_weight), project(means, key_weight)


def per_channel(weights: Tensor, head_channels: int) -> Tensor:
    """Spread one weight per head ``[B, C / d_k]`` over its channels: ``[B, C, 1, 1]``."""
    return weights.repeat_interleave(head_channels, dim=1)[:, :, None, None]


def light_logits(query: Tensor, key: Tensor, head_channels: int) -> Tensor:
    """``<q, k>_head / sqrt(d_k)``, ``[B, C / d_k]``, from query and key ``[B, C]``."""
    heads = (-1, head_channels)
    with torch.autocast(query.device.type, enabled=False):  # logits stay in float32
        logits = torch.einsum("bhd,bhd->bh", query.unflatten(1, heads), key.unflatten(1, heads))
    return logits / math.sqrt(head_channels)


def light_reference(
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
        previous: The previous MRLA output or its substitute, shaped like ``x``, or None in the
            first layer of a group if there is none.
        query_weight: The query's Conv1D, ``[1, 1, k]``, k odd, or fully connected layer,
            ``[C, C]``.
        key_weight: The key's, likewise.
        value_weight: The value's depthwise convolution, ``[C, 1, 3, 3]``; None: the value is x.
        lambda_t: ``[C]``, the weight of ``previous``; None exactly if ``previous`` is.
        head_channels: d_k; divides C.
        value_act: ``'gelu'`` applies it to the value (Algorithm 4); None, nothing.

    Returns:
        o, ``[B, C, H, W]``, in the dtype that the convolution of ``x`` has (autocast's, under it).
    """
    query, key = query_key(x, query_weight, key_weight)
    value = value_of(x, value_weight)
    return gated_value(query, key, value, previous, lambda_t, head_channels, value_act)


def gated_value(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    previous: Tensor | None,
    lambda_t: Tensor | None,
    head_channels: int,
    value_act: str | None = None,
) -> Tensor:
    """:func:`light_reference` from query and key, ``[B, C]``, and the value, ``[B, C, H, W]``."""
    gate = torch.sigmoid(light_logits(query, key, head_channels))
    if value_act == "gelu":
        value = F.gelu(value)
    out = per_channel(gate, head_channels).to(value.dtype) * value
    if previous is not None and lambda_t is not None:
        scale = lambda_t.to(value.dtype)[:, None, None]
        out = out + scale * previous.to(value.dtype)
    return out


def value_of(x: Tensor, weight: Tensor | None) -> Tensor:
    """The value: the depthwise convolution of ``x``, or ``x`` itself without a weight."""
    if weight is None:
        return x.to(autocast_dtype(x))
    return F.conv2d(x, weight, padding=1, groups=x.shape[1])


def layer_weights(query: Tensor, keys: Sequence[Tensor], head_channels: int) -> Tensor:
    """``softmax_s(<q, k_s>_head / sqrt(d_k))``, ``[t, B, C / d_k]``, in float32 or wider."""
    heads = query.unflatten(1, (-1, head_channels))
    stacked_keys = torch.stack(tuple(keys), dim=1).unflatten(2, (-1, head_channels))
    with torch.autocast(query.device.type, enabled=False):  # logits stay in float32
        logits = torch.einsum("bhd,bthd->tbh", heads, stacked_keys) / math.sqrt(head_channels)
    return logits.softmax(dim=0)


def base_reference(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], head_channels: int
) -> Tensor:
    """``o_t = sum_{s<=t} softmax_s(<q_t, k_s>_head / sqrt(d_k)) * V_s`` (Eq. 9).

    The sum runs over the list; values are never stacked, so autograd keeps references to them
    instead of a copy per layer.

    Args:
        query: The current layer's query, ``[B, C]``.
        keys: The keys of layers 1 ... t, each ``[B, C]``.
        values: The values of layers 1 ... t, each ``[B, C, H, W]``.
        head_channels: d_k; divides C.

    Returns:
        o_t, ``[B, C, H, W]``, in the dtype of the values.
    """
    weights = layer_weights(query, keys, head_channels)
    out = values[0].new_zeros(())
    for weight, value in zip(weights, values, strict=True):
        out = torch.addcmul(out, per_channel(weight, head_channels).to(value.dtype), value)
    return out


def mla_reference(
    features: Sequence[Tensor],
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor | None,
    head_channels: int,
) -> Tensor:
    """``o_t = sum_{s<=t} softmax_s(<q_t, k_s>_head / sqrt(d_k)) * V_s`` (Eq. 3 and 4).

    Layer t's own f_K and f_V recompute the keys and values of all features, so a group of t layers
    convolves t (t + 1) / 2 maps.

    Args:
        features: X_1 ... X_t, each ``[B, C, H, W]``, in one dtype.
        query_weight: f_Q of layer t: Conv1D, ``[1, 1, k]``, k odd, or fully connected, ``[C, C]``.
        key_weight: f_K, likewise.
        value_weight: f_V, a depthwise convolution ``[C, 1, 3, 3]``; None: the value is X_s.
        head_channels: d_k; divides C.

    Returns:
        o_t, ``[B, C, H, W]``, in the dtype that the convolution of ``X_t`` has.
    """
    means = [channel_means(x) for x in features]
    query = project(means[-1], query_weight)
    keys = [project(mean, key_weight) for mean in means]
    return base_reference(query, keys, [value_of(x, value_weight) for x in features], head_channels)


def residual_relu(z: Tensor, shortcut: Tensor, norm: Norm) -> Tensor:
    """``y = relu(norm(z) + shortcut)``."""
    return torch.relu_(norm(z).add_(shortcut))


def add_normed(y: Tensor, o: Tensor, out_norm: Norm, drop: Tensor | None) -> Tensor:
    """``y + drop * out_norm(o)``; ``drop`` is ``[B]``."""
    normed = out_norm(o)
    return y + (normed if drop is None else normed * drop.to(normed.dtype)[:, None, None, None])


def light_tail_reference(
    z: Tensor,
    shortcut: Tensor,
    norm: Norm,
    weights: LightWeights,
    out_norm: Norm,
    drop: Tensor | None = None,
) -> Tensor:
    """The end of a residual block with MRLA-light after it.

    ``y = relu(norm(z) + shortcut)``, ``o = mrla_light(y, shortcut)``,
    ``out = y + drop * out_norm(o)``. Norms that use the batch's statistics update their running
    ones.

    Args:
        z: The output of the block's last convolution, ``[B, C, H, W]``.
        shortcut: The block's identity branch, shaped like ``z``, in its dtype.
        norm: The norm after the last convolution.
        weights: MRLA-light's.
        out_norm: The norm after the attention.
        drop: ``[B]``, drop path's factors of the attention branch; None for 1.

    Returns:
        ``out``, ``[B, C, H, W]``.
    """
    y = residual_relu(z, shortcut, norm)
    w = weights
    o = light_reference(y, shortcut, w.query, w.key, w.value, w.lambda_t, w.head_channels)
    return add_normed(y, o, out_norm, drop)


def base_tail_reference(
    z: Tensor,
    shortcut: Tensor,
    norm: Norm,
    weights: BaseWeights,
    out_norm: Norm,
    drop: Tensor | None = None,
    group: BaseGroup = NO_LAYERS,
    recompute: bool = False,
) -> tuple[Tensor, BaseGroup]:
    """The end of a residual block with MRLA-base after it.

    ``y = relu(norm(z) + shortcut)``, ``V_t = DWConv3x3(y)``, ``o`` retrieved from the values so
    far, ``out = y + drop * out_norm(o)``.

    Args:
        z: As in :func:`light_tail_reference`.
        shortcut: Likewise.
        norm: Likewise.
        weights: MRLA-base's.
        out_norm: As in :func:`light_tail_reference`.
        drop: Likewise.
        group: The group as returned by the previous layer; empty for the first.
        recompute: Recompute values in backward instead of keeping them; only the fused operation
            does this.

    Returns:
        ``out``, ``[B, C, H, W]``, and the group with this layer.
    """
    y = residual_relu(z, shortcut, norm)
    query, key = query_key(y, weights.query, weights.key)
    group = group.with_layer(key, value_of(y, weights.value))
    o = base_reference(query, group.keys, group.values, weights.head_channels)
    return add_normed(y, o, out_norm, drop), group
