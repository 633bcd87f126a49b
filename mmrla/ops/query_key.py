"""The query and key of one layer, shared by every layer attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def eca_kernel_size(channels: int) -> int:
    """Kernel size of the query's and key's 1-d convolution, from the number of channels.

    ``t = int(|log2(C) + 1| / 2)``, made odd by adding one (ECA-Net, CVPR 2020, with its
    gamma = 2 and b = 1).

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
    """The dtype that means, logits and attention weights are computed in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def summary_of(x: Tensor) -> Tensor:
    """``GAP(x)``, ``[B, C]``, in float32 or wider."""
    with torch.autocast(x.device.type, enabled=False):
        return x.mean(dim=(2, 3), dtype=accumulation_dtype(x.dtype))


def project(summary: Tensor, weight: Tensor) -> Tensor:
    """One projection of a summary: a Conv1D along the channels, or a fully connected layer.

    Args:
        summary: ``[B, C]``, float32 or wider.
        weight: ``[1, 1, k]`` with odd k, or ``[C, C]``; taken in the summary's dtype.

    Returns:
        ``[B, C]``.
    """
    with torch.autocast(summary.device.type, enabled=False):
        weight = weight.to(summary.dtype)
        if weight.dim() == 2:
            return F.linear(summary, weight)
        # int: under torch.jit.trace sizes are tensors, which old versions refuse as padding.
        padding = int(weight.shape[-1]) // 2
        return F.conv1d(summary.unsqueeze(1), weight, padding=padding).squeeze(1)


def query_key(x: Tensor, query_weight: Tensor, key_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key of a layer: ``Q = Conv1D(GAP(x))``, ``K = Conv1D'(GAP(x))`` (section 4).

    Both 1-d convolutions slide along the channel axis. Computed in float32 or wider, also under
    autocast, because the logits that follow are.

    Args:
        x: The layer's output, ``[B, C, H, W]``.
        query_weight: ``[1, 1, k]`` with odd k, or ``[C, C]`` for a fully connected layer.
        key_weight: Like ``query_weight``.

    Returns:
        Query and key, each ``[B, C]``.
    """
    summary = summary_of(x)
    return project(summary, query_weight), project(summary, key_weight)


def _kernels(query_weight: Tensor, key_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Both Conv1D weights as ``[2, k]``, the smaller one framed by zeros."""
    size = max(query_weight.shape[-1], key_weight.shape[-1])
    both = (w.to(dtype).view(-1) for w in (query_weight, key_weight))
    return torch.stack([F.pad(w, [(size - len(w)) // 2] * 2) for w in both])


def _windows(x: Tensor, size: int) -> Tensor:
    """What each step of a Conv1D over the last axis sees: ``[..., C, k]``."""
    return F.pad(x, (size // 2, size // 2)).unfold(-1, size, 1)


def query_key_of(
    summary: Tensor, query_weight: Tensor, key_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Query and key, each ``[B, C]``, of a summary ``[B, C]``, in its dtype.

    Each in memory of its own: a key that is kept must not keep its query.
    """
    kernels = _kernels(query_weight, key_weight, summary.dtype)
    both = _windows(summary, kernels.shape[1]) @ kernels.t()
    query, key = (one.clone(memory_format=torch.contiguous_format) for one in both.unbind(-1))
    return query, key


def query_key_backward(
    grad_query: Tensor,
    grad_key: Tensor,
    summary: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`query_key_of`.

    Returns:
        The gradients of the summary, ``[B, C]``, and of both weights, in the weights' dtypes.
    """
    kernels = _kernels(query_weight, key_weight, summary.dtype)
    size = kernels.shape[1]
    grads = torch.stack([grad_query, grad_key])
    grad_summary = (_windows(grads, size) @ kernels.flip(1)[:, :, None].unsqueeze(1)).sum((0, 3))
    found = grads.flatten(1) @ _windows(summary, size).reshape(-1, size)
    frames = ((size - w.shape[-1]) // 2 for w in (query_weight, key_weight))
    grad_weights = (
        f[frame : size - frame].clone().view_as(w).to(w.dtype)
        for f, frame, w in zip(found, frames, (query_weight, key_weight), strict=True)
    )
    return grad_summary, *grad_weights


def per_channel(weights: Tensor, head_channels: int) -> Tensor:
    """Spread one weight a head ``[B, C / d_k]`` over its channels: ``[B, C, 1, 1]``."""
    return weights.repeat_interleave(head_channels, dim=1)[:, :, None, None]


def check_head_channels(channels: int, head_channels: int) -> None:
    """Raise ValueError, naming what is allowed, unless ``head_channels`` divides ``channels``."""
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


def check_projection(name: str, weight: Tensor, channels: int) -> None:
    """Raise unless a query's or key's weight is a Conv1D's or a fully connected layer's."""
    conv1d = weight.dim() == 3 and weight.shape[:2] == (1, 1) and weight.shape[2] % 2 == 1
    if not conv1d and weight.shape != (channels, channels):
        raise ValueError(
            f"{name} must be [1, 1, odd] (Conv1D) or [{channels}, {channels}] (fully connected), "
            f"got shape {tuple(weight.shape)}"
        )


def check_query_key_value(
    x: Tensor, query_weight: Tensor, key_weight: Tensor, value_weight: Tensor, head_channels: int
) -> None:
    """Raise unless the weights of query, key and value fit ``x`` ``[B, C, H, W]``."""
    channels = x.shape[1]
    check_head_channels(channels, head_channels)
    for name, weight in (("query_weight", query_weight), ("key_weight", key_weight)):
        if weight.dim() != 3 or weight.shape[:2] != (1, 1) or weight.shape[2] % 2 == 0:
            raise ValueError(f"{name} must be [1, 1, odd], got shape {tuple(weight.shape)}")
    check_value_weight(x, value_weight)


def check_value_weight(x: Tensor, value_weight: Tensor) -> None:
    """Raise unless the value's depthwise convolution fits ``x`` ``[B, C, H, W]``."""
    channels = x.shape[1]
    if value_weight.shape != (channels, 1, 3, 3):
        raise ValueError(
            f"value_weight must be [{channels}, 1, 3, 3] for x.shape={tuple(x.shape)}, "
            f"got {tuple(value_weight.shape)}"
        )
