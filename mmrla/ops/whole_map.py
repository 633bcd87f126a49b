"""The ends of residual blocks on whole feature maps in plain torch, with hand-written backward.

Used by :mod:`mmrla.ops.fused` on a CPU and on every device without Triton. In addition to ``z`` and
the shortcut, which the plain block keeps too, it keeps ``o`` for backward: the value and ``y`` are
not needed or cheap to recompute, ``o`` is not. Small tensors are float32 or wider.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrla.ops.reference import (
    BaseWeights,
    LightWeights,
    Norm,
    accumulation_dtype,
    layer_weights,
    light_logits,
    per_channel,
    project,
)

aten = torch.ops.aten


def laid_out(x: Tensor, like: Tensor) -> Tensor:
    """``x`` itself if it has the strides of ``like``, else a copy with these strides."""
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


def normalise(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """``norm(x)``, and the mean and inverse standard deviation that it used, ``[C]``."""
    wide = accumulation_dtype(x.dtype)
    running_mean, running_var = norm.running_mean, norm.running_var
    # torch wants parameters and running statistics in one dtype.
    dtype = wide if running_mean is None else running_mean.dtype
    weight, bias = (None if p is None else p.to(dtype) for p in norm[:2])
    if norm.batch:
        out, mean, inverse = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, True, norm.momentum, norm.eps
        )
        return out, mean.to(wide), inverse.to(wide)
    out = F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, norm.eps)
    return out, *_running(norm, wide)


def _running(norm: Norm, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation of a norm that uses its running statistics, ``[C]``."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean.to(wide), torch.rsqrt(norm.running_var.to(wide) + norm.eps)


def norm_backward(
    grad: Tensor, x: Tensor, norm: Norm, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, weight and bias of :func:`normalise`."""
    weight = None if norm.weight is None else norm.weight.to(mean.dtype)
    grad_x, grad_weight, grad_bias = aten.native_batch_norm_backward(
        grad, x, weight, mean, inverse.pow(-2) - norm.eps, mean, inverse, norm.batch, norm.eps,
        [True, True, True],
    )  # fmt: skip
    return laid_out(grad_x, x), grad_weight, grad_bias


def y_again(z: Tensor, s: Tensor, norm: Norm, mean: Tensor, inverse: Tensor) -> Tensor:
    """``relu(norm(z) + s)`` with the statistics that forward used."""
    return normed_again(z, norm, mean, inverse).add_(s).relu_()


def normed_again(x: Tensor, norm: Norm, mean: Tensor, inverse: Tensor) -> Tensor:
    """``norm(x)`` with the statistics that forward used."""
    weight, bias = (None if p is None else p.to(mean.dtype) for p in norm[:2])
    variance = inverse.pow(-2) - norm.eps
    return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, norm.eps)


def value_again(
    z: Tensor, s: Tensor, norm: Norm, w: BaseWeights, mean: Tensor, inverse: Tensor
) -> Tensor:
    """A layer's value, from the arguments of forward and the statistics that its norm used."""
    y = y_again(z, s, norm, mean, inverse)
    return laid_out(conv(y, w.value), z)


def statistics_of(saved: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation that the norm used, from what forward kept."""
    return saved[1], saved[2]


def without_maps(saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors kept by forward, without those that :func:`base_backward` can recompute."""
    return saved[:5]


def _retrieved(values: Sequence[Tensor], factors: Sequence[Tensor]) -> Tensor:
    """``sum_s factors[s] * values[s]``; factors are ``[B, C, 1, 1]``, in the values' dtype."""
    if len(values) == 1:  # the softmax over one layer is 1
        return values[0]
    o = torch.mul(values[-1], factors[-1])
    for value, factor in zip(values[:-1], factors, strict=False):
        _add(o, factor, value)
    return o


def _as_rows(x: Tensor) -> Tensor:
    """``[B, C, H, W]`` in channels_last as ``[B, H, W * C]``."""
    return x.permute(0, 2, 3, 1).flatten(2)


def _add(x: Tensor, factor: Tensor, y: Tensor | None = None) -> Tensor:
    """``x += factor * y``, without ``y`` ``x += factor``; the factor broadcasts over the maps."""
    # torch's loops run over the innermost dimension. With fewer channels than it has lanes they are
    # scalar, so a row becomes one dimension.
    rows = x
    if _is_half(x) and x.shape[1] < 32 and x.is_contiguous(memory_format=torch.channels_last):
        factor = _as_rows(factor.expand(*x.shape[:2], 1, x.shape[3]))
        rows, y = _as_rows(x), None if y is None else _as_rows(y)
    if y is None:
        rows.add_(factor)
    else:
        rows.addcmul_(y, factor)
    return x


def on_map(x: Tensor, like: Tensor) -> Tensor:
    """``[B]``, ``[C]`` or ``[B, C]`` as a factor of maps like ``like``."""
    return x.to(like.dtype)[..., None, None]


def scale_samples(x: Tensor, drop: Tensor) -> Tensor:
    """``drop * x`` in place; ``drop`` is ``[B]``."""
    return x.mul_(drop.to(x.dtype)[:, None, None, None])


def pixel_dot(a: Tensor, b: Tensor, room: Tensor) -> Tensor:
    """``sum_hw a * b``, ``[B, C]``; ``room`` is a map to write the products to."""
    return pixel_sums(torch.mul(a, b, out=room))


def pixel_sums(x: Tensor) -> Tensor:
    """``sum_hw x``, ``[B, C]``, in float32 or wider."""
    wide = accumulation_dtype(x.dtype)
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or x.numel() < 2**21:
        return x.sum((2, 3), dtype=wide)
    # Asked for float32, torch casts the whole map first. It adds up a column in float32 in any case
    # and rounds the sum; the errors of the columns average out.
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).sum(1).sum(1, dtype=wide)
    return x.sum(2).sum(2, dtype=wide)


def _channel_dot(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """``sum_bhw a * b``, ``[C]``: the weight's gradient of a norm that changes nothing."""
    zero, one = like.new_zeros(a.shape[1]), like.new_ones(a.shape[1])
    return aten.native_batch_norm_backward(
        a, b, None, None, None, zero, one, True, 0.0, [False, True, False]
    )[1]


def _finish(
    y: Tensor, o: Tensor, out_norm: Norm, drop: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``y + drop * out_norm(o)``, and the mean and inverse standard deviation used."""
    normed, mean, inverse = normalise(o, out_norm)
    if drop is not None:
        scale_samples(normed, drop)
    return normed.add_(y), mean, inverse


def _finish_frozen(
    y: Tensor, terms: Iterable[tuple[Tensor, Tensor]], out_norm: Norm
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_finish` in ``y`` itself if the norm uses its running statistics, without ``o``.

    ``o`` is the sum of factor times map over ``terms``; factors are ``[B, C]`` or ``[C]``. The norm
    is part of the factors, which saves a pass over the maps and the memory of ``o``.
    """
    mean, inverse = _running(out_norm, accumulation_dtype(y.dtype))
    scale = inverse if out_norm.weight is None else inverse * out_norm.weight
    for factor, x in terms:
        _add(y, on_map(factor * scale, y), x)
    shift = -mean * scale if out_norm.bias is None else out_norm.bias - mean * scale
    return _add(y, on_map(shift, y)), mean, inverse


def start(z: Tensor, s: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``y``, its channel means, and the statistics that the norm used."""
    y, mean, inverse = normalise(z, norm)
    y = laid_out(y, z).add_(s).relu_()
    return y, pixel_sums(y) / y.shape[2:].numel(), mean, inverse


def start_backward(
    grad_y: Tensor, grad_means: Tensor, y: Tensor, z: Tensor, norm: Norm, mean: Tensor,
    inverse: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of z, s and the norm's weight and bias; ``grad_y`` becomes that of s.

    ``grad_means`` is the gradient of y's channel means, ``[B, C]``.
    """
    _add(grad_y, on_map(grad_means / z.shape[2:].numel(), grad_y))
    grad_s = aten.threshold_backward.grad_input(grad_y, y, 0, grad_input=grad_y)
    grad_z, grad_weight, grad_bias = norm_backward(grad_s, z, norm, mean, inverse)
    return grad_z, grad_s, grad_weight, grad_bias


@functools.cache
def _emulates_bfloat16() -> bool:
    # There a depthwise convolution in bfloat16 takes about 35 times float32's time, casts included.
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _conv_dtype(x: Tensor) -> torch.dtype:
    slow = x.device.type == "cpu" and x.dtype == torch.bfloat16 and _emulates_bfloat16()
    return torch.float32 if slow else x.dtype


def conv(x: Tensor, weight: Tensor) -> Tensor:
    """The depthwise convolution."""
    dtype = _conv_dtype(x)
    out = F.conv2d(x.to(dtype), weight.to(dtype), padding=1, groups=x.shape[1])
    return out.to(x.dtype)


def conv_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the depthwise convolution's input and weight."""
    one, dtype = [1, 1], _conv_dtype(x)
    grad_x, grad_weight, _ = aten.convolution_backward(
        grad.to(dtype), x.to(dtype), weight.to(dtype), None, one, one, one, False, [0, 0],
        x.shape[1], [True, True, False],
    )  # fmt: skip
    return laid_out(grad_x.to(x.dtype), x), grad_weight


def leaves_of(*tensors: Tensor) -> list[Tensor]:
    """Leaves with the values of ``tensors``, for a small graph inside a hand-written backward."""
    return [t.detach().requires_grad_() for t in tensors]


def light_forward(
    z: Tensor, s: Tensor, norm: Norm, w: LightWeights, out_norm: Norm, drop: Tensor | None,
    keep: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """See :func:`mmrla.ops.reference.light_tail_reference`.

    Returns:
        The output, and what :func:`light_backward` needs beside the arguments.
    """
    y, means, *used = start(z, s, norm)
    logits = light_logits(project(means, w.query), project(means, w.key), w.head_channels)
    gate = torch.sigmoid(logits)
    value = conv(y, w.value)
    keeps_o = keep and not _is_half(z)
    if out_norm.batch or drop is not None or keeps_o:
        o = _light_o(value, s, gate, w, in_place=not keep or keeps_o)
        out, *out_used = _finish(y, o, out_norm, drop)
    else:
        terms = ((gate.repeat_interleave(w.head_channels, dim=1), value), (w.lambda_t, s))
        out, *out_used = _finish_frozen(y, terms, out_norm)
    return out, (means, *used, *out_used, value) if keep else ()


def _is_half(x: Tensor) -> bool:
    return x.element_size() == 2


def _light_o(value: Tensor, s: Tensor, gate: Tensor, w: LightWeights, in_place: bool) -> Tensor:
    """``gate * value + lambda * s``."""
    factor = per_channel(gate, w.head_channels).to(value.dtype)
    o = torch.mul(value, factor, out=value if in_place else None)
    return _add(o, on_map(w.lambda_t, o), s)


def light_backward(
    grad: Tensor, z: Tensor, s: Tensor, norm: Norm, w: LightWeights, out_norm: Norm,
    drop: Tensor | None, saved: Sequence[Tensor],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of z, s, the norm's weight and bias, query, key, value, lambda, the out norm's.

    Forward keeps o and no value: ``gate * sum(grad_o * value) = sum(grad_o * o) - lambda *
    sum(grad_o * s)``. If o is in half precision and the gate is small, the rounding of o would
    dominate, so forward keeps the value instead, and o is recomputed.
    """
    means, mean, inverse, out_mean, out_inverse, o = saved
    with torch.enable_grad():
        means, query, key = leaves_of(means, w.query, w.key)
        logits = light_logits(project(means, query), project(means, key), w.head_channels)
    gate = torch.sigmoid(logits.detach())
    value = o if _is_half(o) else None
    if value is not None:
        o = _light_o(value, s, gate, w, in_place=False)
    grad_normed = grad if drop is None else scale_samples(grad.clone(), drop)
    grad_o, *grad_out_norm = norm_backward(grad_normed, o, out_norm, out_mean, out_inverse)
    room = torch.empty_like(o)
    if value is None:
        with_s = pixel_dot(grad_o, s, room)
        grad_lambda = with_s.sum(0)
        with_value = pixel_dot(grad_o, o, room) - w.lambda_t.to(mean.dtype) * with_s
    else:
        grad_lambda = _channel_dot(grad_o, s, mean)
        with_value = pixel_dot(grad_o, value, room) * gate.repeat_interleave(w.head_channels, dim=1)
    per_head = with_value.unflatten(1, (-1, w.head_channels)).sum(-1)
    grad_means, *grad_projections = torch.autograd.grad(
        logits, (means, query, key), per_head * (1 - gate)
    )
    grad_value = torch.mul(grad_o, per_channel(gate, w.head_channels).to(o.dtype), out=room)
    y = y_again(z, s, norm, mean, inverse)
    grad_y, grad_taps = conv_backward(grad_value, y, w.value)
    grad_y.add_(grad)
    grad_z, grad_sum, *grad_norm = start_backward(grad_y, grad_means, y, z, norm, mean, inverse)
    grad_s = grad_o.mul_(on_map(w.lambda_t, o)).add_(grad_sum)
    return (
        grad_z, grad_s, *grad_norm, *grad_projections, grad_taps, grad_lambda, *grad_out_norm,
    )  # fmt: skip


def base_forward(
    z: Tensor, s: Tensor, norm: Norm, w: BaseWeights, out_norm: Norm, drop: Tensor | None,
    keys: Sequence[Tensor], values: Sequence[Tensor], keep: bool,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """See :func:`mmrla.ops.reference.base_tail_reference`.

    Returns:
        The output, the layer's key and value, and what :func:`base_backward` needs beside them.
    """
    y, means, *used = start(z, s, norm)
    key = project(means, w.key)
    value = laid_out(conv(y, w.value), z)
    weights = layer_weights(project(means, w.query), (*keys, key), w.head_channels)
    factors = weights.repeat_interleave(w.head_channels, dim=2)
    if out_norm.batch or drop is not None or keep:
        o = _retrieved((*values, value), [on_map(f, z) for f in factors])
        out, *out_used = _finish(y, o, out_norm, drop)
        kept = (o,) if keys else ()  # in a group's first layer, it is the value
        return out, key, value, (means, *used, *out_used, *kept) if keep else ()
    terms = zip(factors, (*values, value), strict=True)
    return _finish_frozen(y, terms, out_norm)[0], key, value, ()


def base_backward(
    grad: Tensor, grad_key: Tensor | None, z: Tensor, s: Tensor, norm: Norm, w: BaseWeights,
    out_norm: Norm, drop: Tensor | None, keys: Sequence[Tensor], values: Sequence[Tensor],
    later: Sequence[tuple[Tensor, Tensor]], saved: Sequence[Tensor],
) -> tuple:  # fmt: skip
    """Gradients of one layer, its own key and value being the last of ``keys`` and ``values``.

    ``grad_key`` is the gradient of its key from later layers, ``[B, C]``, or None; ``later`` are
    their contributions to its value: a map and its factors ``[B, C]`` each.

    Returns:
        Gradients of z, s, the norm's weight and bias, query, key, value, the out norm's weight and
        bias, those of earlier keys, the map ``grad_o`` and factors ``[t, B, C]``: the gradient of
        value s is ``factors[s] * grad_o``.
    """
    means, mean, inverse, out_mean, out_inverse, *kept = saved
    with torch.enable_grad():
        means, query, key, *earlier = leaves_of(means, w.query, w.key, *keys[:-1])
        own = project(means, key)
        weights = layer_weights(project(means, query), (*earlier, own), w.head_channels)
    factors = weights.detach().repeat_interleave(w.head_channels, dim=2)
    o = kept[0] if kept else _retrieved(values, [on_map(f, z) for f in factors])
    grad_normed = grad if drop is None else scale_samples(grad.clone(), drop)
    grad_o, *grad_out_norm = norm_backward(grad_normed, o, out_norm, out_mean, out_inverse)
    room = torch.empty_like(o)
    dots = torch.stack([pixel_dot(grad_o, value, room) for value in values])
    with torch.enable_grad():
        per_head = dots.unflatten(2, (-1, w.head_channels)).sum(-1)
        outputs, grads = [weights], [per_head]
        if grad_key is not None:
            outputs, grads = [weights, own], [per_head, grad_key]
        grad_means, *grad_projections = torch.autograd.grad(
            outputs, (means, query, key, *earlier), grads
        )
    grad_value = torch.mul(grad_o, on_map(factors[-1], o), out=room)
    for left, factor in later:
        _add(grad_value, on_map(factor, o), left)
    y = y_again(z, s, norm, mean, inverse)
    grad_y, grad_taps = conv_backward(grad_value, y, w.value)
    grad_y.add_(grad)
    grad_z, grad_sum, *grad_norm = start_backward(grad_y, grad_means, y, z, norm, mean, inverse)
    return (
        grad_z, grad_sum, *grad_norm, *grad_projections[:2], grad_taps, *grad_out_norm,
        grad_projections[2:], grad_o, factors,
    )  # fmt: skip
