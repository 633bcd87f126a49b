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
    _factors,
    _in_dtypes_of,
    _maps,
    _needs_backward,
    _on_device_of,
    _once,
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
        ctx: Any, norms: tuple[Norm, Norm], d: int, keep: bool, z: Tensor, s: Tensor,
        earlier: Tensor | None, weight: Tensor | None, drop: Tensor | None, key_norms: Tensor,
        *parameters: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        norm, w, out_norm = _bundles(norms, parameters, key_norms, d)
        with _on_device_of(z):
            y, means, *used = whole_map._start(z, s, norm)
            share, factor, total = _factors_from(means, w, weight)
            # Of a first layer the mean is its output, which nothing else keeps.
            mean = y if earlier is None else torch.lerp(earlier, y, _map(share, d, y))
            o = whole_map._conv(mean, w.value).mul_(_map(factor, d, y))
            normed, *out_used = whole_map._normalise(o, out_norm)
            normed = normed.clamp_(min=0)
            if drop is not None:
                whole_map._drop(normed, drop)
            out = normed.add_(y)
        if keep:
            ctx.save_for_backward(
                z, s, earlier, weight, drop, key_norms, mean, means, *used, *out_used, *parameters
            )
        frozen = (n._replace(running_mean=None, running_var=None) for n in norms)
        ctx.norms, ctx.d = tuple(n._replace(weight=None, bias=None) for n in frozen), d
        ctx.set_materialize_grads(False)
        return out, mean, total

    @staticmethod
    @_once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        z, s, earlier, weight, drop, key_norms, mean, means, *rest = ctx.saved_tensors
        used, out_used, parameters = rest[:2], rest[2:4], rest[4:]
        norm, w, out_norm = _bundles(ctx.norms, parameters, key_norms, ctx.d)
        grad, grad_mean, grad_total = grads
        with _on_device_of(z):
            grad = torch.zeros_like(z) if grad is None else whole_map.laid_out(grad, z)
            with torch.enable_grad():
                leaves = whole_map._with_grad(means, w.query, w.key, w.gate)
                if weight is not None:
                    leaves += whole_map._with_grad(weight)
                roots = _factors_from(
                    leaves[0], w._replace(query=leaves[1], key=leaves[2], gate=leaves[3]),
                    leaves[4] if weight is not None else None,
                )  # fmt: skip
            share, factor = (_map(x.detach(), ctx.d, z) for x in roots[:2])
            scaled = mean * factor
            o = whole_map._conv(mean, w.value).mul_(factor)
            normed = whole_map._normed_again(o, out_norm, *out_used)
            grad_normed = grad * (normed >= 0)
            if drop is not None:
                whole_map._drop(grad_normed, drop)
            grad_o, *grad_out_norm = whole_map._norm_backward(grad_normed, o, out_norm, *out_used)
            # The convolution's transpose commutes with factors of channels.
            spread, grad_taps = whole_map._conv_backward(grad_o, scaled, w.value)
            room = scaled
            grad_factor = _per_head(whole_map._dot(spread, mean, room), ctx.d)
            grad_m = spread.mul_(factor)
            if grad_mean is not None:
                grad_m.add_(whole_map.laid_out(grad_mean, z))
            y = whole_map._y_again(z, s, norm, *used)
            grad_earlier, grad_y, grad_share = None, grad_m, None
            if earlier is not None:
                difference = torch.sub(y, earlier)
                grad_share = _per_head(whole_map._dot(grad_m, difference, room), ctx.d)
                grad_y = grad_m * share
                grad_earlier = grad_m.sub_(grad_y)
            found = torch.autograd.grad(
                [r for r, g in zip(roots, (grad_share, grad_factor, grad_total), strict=True)
                 if g is not None],
                leaves,
                [g for g in (grad_share, grad_factor, grad_total) if g is not None],
            )  # fmt: skip
            grad_y.add_(grad)
            grad_z, grad_s, *grad_norm = whole_map._start_backward(
                grad_y, found[0], y, z, norm, *used
            )
        small = (*grad_norm, *found[1:3], grad_taps, found[3], *grad_out_norm)
        return (
            None, None, None, grad_z, grad_s, grad_earlier, *(found[4:] or [None]), None, None,
            *_in_dtypes_of(small, tuple(parameters)),
        )  # fmt: skip


def _bundles(
    norms: tuple[Norm, Norm], parameters: Any, key_norms: Tensor, d: int
) -> tuple[Norm, KCLAWeights, Norm]:
    """Norms and weights with what autograd sees of them."""
    weight, bias, query, key, value, gate, out_weight, out_bias = parameters
    norm, out_norm = norms
    return (
        norm._replace(weight=weight, bias=bias),
        KCLAWeights(query, key, value, gate, key_norms, d),
        out_norm._replace(weight=out_weight, bias=out_bias),
    )


def _map(x: Tensor, d: int, like: Tensor) -> Tensor:
    return per_channel(x, d).to(like.dtype)


def _per_head(x: Tensor, d: int) -> Tensor:
    return x.unflatten(1, (-1, d)).sum(2)


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
    earlier, weight = (None, None) if state is None else state
    parameters = (*norm[:2], *weights[:4], *out_norm[:2])
    z, shortcut = _maps(z, shortcut)
    if earlier is not None:
        earlier = whole_map.laid_out(earlier.to(z.dtype), z)
    keep = _needs_backward((z, shortcut, earlier, weight, *parameters))
    out, mean, total = _Tail.apply(
        (norm, out_norm), weights.head_channels, keep, z, shortcut, earlier, weight,
        _factors(drop, z), weights.key_norms, *parameters,
    )  # fmt: skip
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
