"""Key-correlated layer attention as operations: its factors, and the end of a residual block.

Paper: Enhancing Layer Interaction Using Key-Correlated Layer Attention,
https://arxiv.org/abs/2606.28405. The state is kept as ``u / z`` and ``z``: a weighted mean has the
magnitude of a feature map, while ``u`` itself, with weights up to exp(10), would overflow in
float16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrla.ops import checks, whole_map
from mmrla.ops.dispatch import Backend, Op, always
from mmrla.ops.fused import (
    Call,
    dense_maps,
    drop_factors,
    first_order,
    in_dtypes_of,
    needs_backward,
    on_device_of,
    unsupported_reason,
)
from mmrla.ops.reference import (
    BaseWeights,
    Norm,
    channel_means,
    per_channel,
    project,
    residual_relu,
)

MOST = 10
"""Upper bound of the logarithm of a layer's weight."""
EPS = 1e-3
"""Added to the sum of weights."""


class KCLAWeights(NamedTuple):
    """Parameters of a layer."""

    query: Tensor
    """``[1, 1, k]``, k odd: Conv1D along the channels."""
    key: Tensor
    """As ``query``."""
    value: Tensor
    """``[C, 1, 3, 3]``: depthwise convolution."""
    gate: Tensor
    """``[C / d_k, C / d_k]``: linear map over the heads."""
    key_norms: Tensor
    """``[C / d_k]``, n_h: fixed."""
    head_channels: int
    """d_k; divides C."""


class KCLAState(NamedTuple):
    """State passed on by a layer, of the same size at every depth."""

    mean: Tensor
    """``u / z``, ``[B, C, H, W]``: weighted mean of the layers' outputs so far."""
    weight: Tensor
    """``z``, ``[B, C / d_k]``, in float32 or wider: the sum of their weights."""


def layer_weight(key: Tensor, key_norms: Tensor) -> Tensor:
    """``exp(min(||k_h|| / n_h, 10))``, ``[B, heads]``, from a key ``[B, C]``."""
    lengths = key.unflatten(1, (key_norms.shape[0], -1)).norm(dim=2)
    return (lengths / key_norms.to(key.dtype)).clamp(max=MOST).exp()


def along_key(query: Tensor, key: Tensor, head_channels: int) -> Tensor:
    """``q . k / ||k||`` of each head, ``[B, heads]``, from query and key ``[B, C]``."""
    query, key = (x.unflatten(1, (-1, head_channels)) for x in (query, key))
    return (query * F.normalize(key, dim=2)).sum(2)


def factors_of(
    weight: Tensor, logits: Tensor, previous: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors from the weight, the gate's logits and the earlier weights' sum, ``[B, heads]``.

    Returns:
        The layer's share in the mean ``u / z``; the factor of its value,
        ``sigmoid(logits) * z / (z + 1e-3)``; and the new sum of weights.
    """
    total = weight if previous is None else previous + weight
    return weight / total, torch.sigmoid(logits) * (total / (total + EPS)), total


def _factors_from(means: Tensor, w: KCLAWeights, previous: Tensor | None) -> tuple[Tensor, ...]:
    """:func:`factors_of` from the channel means of the layer's output."""
    query, key = project(means, w.query), project(means, w.key)
    logits = project(along_key(query, key, w.head_channels), w.gate)
    return factors_of(layer_weight(key, w.key_norms), logits, previous)


def kcla_tail_reference(
    z: Tensor,
    shortcut: Tensor,
    norm: Norm,
    weights: KCLAWeights,
    out_norm: Norm,
    drop: Tensor | None = None,
    state: KCLAState | None = None,
) -> tuple[Tensor, KCLAState]:
    """The end of a residual block with KCLA after it.

    ``y = relu(norm(z) + shortcut)``, ``m_t = m_{t-1} + e_t / z_t * (y - m_{t-1})``,
    ``o = sigmoid(W_h (q.k / ||k||)) * z_t / (z_t + 1e-3) * DWConv3x3(m_t)``,
    ``out = y + drop * relu(out_norm(o))``. The derivative of that relu at 0 is 1, so a
    zero-initialised out norm can learn.

    Args:
        z: The output of the block's last convolution, ``[B, C, H, W]``.
        shortcut: The block's identity branch, shaped like ``z``, in its dtype.
        norm: The norm after the last convolution.
        weights: KCLA's.
        out_norm: The norm after the attention.
        drop: ``[B]``, drop path's factors of the attention branch; None for 1.
        state: State from the previous layer, None for the first.

    Returns:
        ``out``, ``[B, C, H, W]``, and the new state.
    """
    y = residual_relu(z, shortcut, norm)
    with torch.autocast(y.device.type, enabled=False):
        share, factor, total = _factors_from(
            channel_means(y), weights, None if state is None else state.weight
        )
    d = weights.head_channels
    mean = y
    if state is not None:
        mean = state.mean.to(y.dtype)
        mean = mean + per_channel(share, d).to(y.dtype) * (y - mean)
    value = F.conv2d(mean, weights.value, padding=1, groups=y.shape[1])
    normed = out_norm(per_channel(factor, d).to(value.dtype) * value).clamp(min=0)
    if drop is not None:
        normed = normed * drop.to(normed.dtype)[:, None, None, None]
    return y + normed, KCLAState(mean, total)


class _Tail(torch.autograd.Function):
    """Keeps z, the shortcut and one mean per layer; y and o are recomputed in backward."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, keep: bool, z: Tensor, s: Tensor, earlier: Tensor | None,
        weight: Tensor | None, *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        norm, w, out_norm, drop = call
        with on_device_of(z):
            y, means, *used = whole_map.start(z, s, norm)
            share, factor, total = _factors_from(means, w, weight)
            # Of a first layer the mean is its output, which nothing else keeps.
            mean = y if earlier is None else torch.lerp(earlier, y, _map(share, w, y))
            o = whole_map.conv(mean, w.value).mul_(_map(factor, w, y))
            normed, *out_used = whole_map.normalise(o, out_norm)
            normed = normed.clamp_(min=0)
            if drop is not None:
                whole_map.scale_samples(normed, drop)
            out = normed.add_(y)
        if keep:
            ctx.save_for_backward(
                z, s, earlier, weight, drop, mean, means, *used, *out_used, *parameters
            )
        ctx.call = call.without_tensors()
        ctx.set_materialize_grads(False)
        return out, mean, total

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        z, s, earlier, weight, drop, mean, means, *rest = ctx.saved_tensors
        used, out_used, parameters = rest[:2], rest[2:4], tuple(rest[4:])
        norm, w, out_norm, _ = ctx.call.with_tensors(parameters, drop)
        grad, grad_mean, grad_total = grads
        with on_device_of(z):
            grad = torch.zeros_like(z) if grad is None else whole_map.laid_out(grad, z)
            with torch.enable_grad():
                leaves = whole_map.leaves_of(means, w.query, w.key, w.gate)
                if weight is not None:
                    leaves += whole_map.leaves_of(weight)
                roots = _factors_from(
                    leaves[0], w._replace(query=leaves[1], key=leaves[2], gate=leaves[3]),
                    leaves[4] if weight is not None else None,
                )  # fmt: skip
            share, factor = (_map(x.detach(), w, z) for x in roots[:2])
            scaled = mean * factor
            o = whole_map.conv(mean, w.value).mul_(factor)
            normed = whole_map.normed_again(o, out_norm, *out_used)
            grad_normed = grad * (normed >= 0)
            if drop is not None:
                whole_map.scale_samples(grad_normed, drop)
            grad_o, *grad_out_norm = whole_map.norm_backward(grad_normed, o, out_norm, *out_used)
            # The convolution's transpose commutes with factors of channels.
            spread, grad_taps = whole_map.conv_backward(grad_o, scaled, w.value)
            room = scaled
            grad_factor = _per_head(whole_map.pixel_dot(spread, mean, room), w)
            grad_m = spread.mul_(factor)
            if grad_mean is not None:
                grad_m.add_(whole_map.laid_out(grad_mean, z))
            y = whole_map.y_again(z, s, norm, *used)
            grad_earlier, grad_y, grad_share = None, grad_m, None
            if earlier is not None:
                difference = torch.sub(y, earlier)
                grad_share = _per_head(whole_map.pixel_dot(grad_m, difference, room), w)
                grad_y = grad_m * share
                grad_earlier = grad_m.sub_(grad_y)
            grads = (grad_share, grad_factor, grad_total)
            given = {r: g for r, g in zip(roots, grads, strict=True) if g is not None}
            found = torch.autograd.grad(list(given), leaves, list(given.values()))
            grad_y.add_(grad)
            grad_z, grad_s, *grad_norm = whole_map.start_backward(
                grad_y, found[0], y, z, norm, *used
            )
        small = (*grad_norm, *found[1:3], grad_taps, found[3], None, *grad_out_norm)
        return (
            None, None, grad_z, grad_s, grad_earlier, *(found[4:] or [None]),
            *in_dtypes_of(small, parameters),
        )  # fmt: skip


def _map(x: Tensor, w: KCLAWeights, like: Tensor) -> Tensor:
    return per_channel(x, w.head_channels).to(like.dtype)


def _per_head(x: Tensor, w: KCLAWeights) -> Tensor:
    return x.unflatten(1, (-1, w.head_channels)).sum(2)


def _lean_tail(
    z: Tensor,
    shortcut: Tensor,
    norm: Norm,
    weights: KCLAWeights,
    out_norm: Norm,
    drop: Tensor | None = None,
    state: KCLAState | None = None,
) -> tuple[Tensor, KCLAState]:
    """See :func:`kcla_tail_reference`. Has no second derivative, and no gradient of ``drop``."""
    call = Call(norm, weights, out_norm, drop_factors(drop, z))
    earlier, weight = (None, None) if state is None else state
    z, shortcut = dense_maps(z, shortcut)
    if earlier is not None:
        earlier = whole_map.laid_out(earlier.to(z.dtype), z)
    tensors = (z, shortcut, earlier, weight, *call.parameters())
    out, mean, total = _Tail.apply(call, needs_backward(tensors), *tensors)
    return out, KCLAState(mean, total)


def check_state(x: Tensor, state: KCLAState | None, head_channels: int) -> None:
    """Raise unless a state fits a feature map ``[B, C, H, W]``.

    Raises:
        ValueError: It belongs to maps of another shape, or to other heads.
    """
    if state is None:
        return
    checks.check_same_shape("mean of the state", state.mean, "x", x)
    heads = (x.shape[0], x.shape[1] // head_channels)
    if state.weight.shape != heads:
        raise ValueError(f"weight of the state must be {heads}, got {tuple(state.weight.shape)}")


def _check(
    z: Tensor,
    shortcut: Tensor,
    norm: Norm,
    weights: KCLAWeights,
    out_norm: Norm,
    drop: Tensor | None = None,
    state: KCLAState | None = None,
) -> None:
    common = BaseWeights(*weights[:3], weights.head_channels)
    checks.check_light_tail(z, shortcut, norm, common, out_norm, drop)
    heads = z.shape[1] // weights.head_channels
    if weights.gate.shape != (heads, heads):
        raise ValueError(f"weights.gate must be [{heads}, {heads}], got {weights.gate.shape}")
    checks.check_vector("weights.key_norms", weights.key_norms, heads)
    check_state(z, state, weights.head_channels)
    checks.check_one_device(z, *(state or ()))


kcla_tail = Op(
    "kcla_tail",
    _check,
    [
        Backend("fused", _lean_tail, lambda z, *args, **kwargs: unsupported_reason(z)),
        Backend("naive", kcla_tail_reference, always),
    ],
)
"""``kcla_tail(z, shortcut, norm, weights, out_norm, drop=None, state=None)``.

``out = y + drop * relu(out_norm(o))`` with ``y = relu(norm(z) + shortcut)``; arguments and result
as in :func:`kcla_tail_reference`.
"""
