"""The end of a residual block with MRLA-light behind it, as one operation.

``y = relu(norm(z) + shortcut)``, ``o = mrla_light(y, shortcut)``,
``out = y + scale * out_norm(o)``. The fused version keeps ``z`` and ``shortcut`` for backward,
which the plain block keeps too, and computes ``y`` and ``o`` again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmrla.ops import passes
from mmrla.ops import residual_tail as tail
from mmrla.ops.batch_norm import BatchNorm
from mmrla.ops.custom_op import register, register_differentiable
from mmrla.ops.depthwise import moments, stencil
from mmrla.ops.memory import dense
from mmrla.ops.mrla_light.gate import gate_backward, gate_of
from mmrla.ops.mrla_light.naive import mrla_light_naive
from mmrla.ops.query_key import accumulation_dtype
from mmrla.ops.residual_tail import TailOutput


def mrla_light_tail_naive(
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
) -> TailOutput:
    """The tail in plain torch.

    Args:
        z: The output of the block's last convolution, ``[B, C, H, W]``.
        shortcut: The block's identity branch, shaped like ``z``.
        norm: The norm behind the last convolution.
        query_weight: As in :func:`mmrla.ops.mrla_light.naive.mrla_light_naive`.
        key_weight: Likewise.
        value_weight: Likewise.
        lambda_t: Likewise.
        head_channels: Likewise.
        out_norm: The norm behind the attention.
        scale: ``[B]``, drop path's factor of the attention branch; None for 1.

    Returns:
        ``out`` and the batch's statistics that the norms used.
    """
    y, *used = tail.residual_relu_naive(z, shortcut, norm)
    o = mrla_light_naive(
        y, shortcut, query_weight, key_weight, value_weight, lambda_t, head_channels
    )
    return tail.output_naive(y, o, out_norm, scale, (used[0], used[1]))


def _forward(
    z: Tensor,
    shortcut: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    lambda_t: Tensor,
    head_channels: int,
    scale: Tensor | None,
    *norms: Any,
) -> tuple[Tensor, ...]:
    norm, out_norm = tail.norms_of(norms)
    y, summary, statistics = tail.residual_relu(z, shortcut, norm)
    gate = gate_of(summary, query_weight, key_weight, head_channels)[:, :, None, None]
    taps = gate * value_weight.to(gate.dtype).transpose(0, 1)
    lam = lambda_t.to(gate.dtype)
    if not out_norm.uses_batch:
        # The norm of something linear in taps and lambda goes into them: one pass.
        out_used, out_statistics = tail.resolve(out_norm, y)
        factor, shift = passes.scaled_affine(out_used, scale)
        taps = taps * factor.expand_as(summary)[:, :, None, None]
        out = stencil(y, taps, factor * lam, shortcut, shift.expand_as(summary), y)
        return out, summary, *statistics, *out_statistics
    o = stencil(y, taps, lam, shortcut)
    out_used, out_statistics = tail.resolve(out_norm, o)
    return passes.add_norm_(y, o, out_used, scale), summary, *statistics, *out_statistics


def _forward_fake(z: Tensor, *args: Any) -> tuple[Tensor, ...]:
    summary = z.new_empty(z.shape[:2], dtype=accumulation_dtype(z.dtype))
    return torch.empty_like(z), summary, *tail.fake_statistics(args[-10:], z)


def _backward(
    grad: Tensor,
    z: Tensor,
    shortcut: Tensor,
    summary: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    lambda_t: Tensor,
    head_channels: int,
    scale: Tensor | None,
    *norms: Any,
) -> list[Tensor]:
    norm, out_norm = tail.restored_norms(norms)
    dtype = summary.dtype
    y = passes.residual_relu(z, shortcut, norm, mean=False)[0]
    gate = gate_of(summary, query_weight, key_weight, head_channels)[:, :, None, None]
    weight = value_weight.to(dtype).transpose(0, 1)
    lam = lambda_t.to(dtype)
    pixels = z.shape[2] * z.shape[3]
    if out_norm.uses_batch:
        o = stencil(y, gate * weight, lam, shortcut)
        grad_o, grad_out_weight, grad_out_bias = passes.norm_backward(o, grad, out_norm, scale)
        grad_lambda = passes.dot(grad_o, shortcut).sum(0)
        found = moments(grad_o, y)
        taps = gate * weight
    else:
        # o's gradient is a factor times grad, so that factors stand for it, and sums for o.
        grad_o = grad = passes.laid_out(grad, z)
        found, with_shortcut = moments(grad, y), passes.dot(grad, shortcut)
        with_o = (found * gate * weight).sum(dim=(2, 3)) + lam * with_shortcut
        grad_out_weight, grad_out_bias = tail.frozen_norm_grads(with_o, grad, out_norm, scale)
        factor = passes.scaled_affine(out_norm, scale)[0].expand_as(summary)
        grad_lambda = (factor * with_shortcut).sum(0)
        found = found * factor[:, :, None, None]
        taps = gate * weight * factor[:, :, None, None]
    grad_summary, grad_query, grad_key = gate_backward(
        (found * weight).sum(dim=(2, 3)), summary, query_weight, key_weight, head_channels
    )
    grad_y = stencil(grad_o, taps.flip(2, 3), bias=grad_summary / pixels, residual=grad)
    grad_z, grad_sum, grad_weight, grad_bias = tail.residual_relu_backward(grad_y, y, z, norm)
    if out_norm.uses_batch:
        grad_shortcut = passes.scale_add_(grad_o, lam, grad_sum)
    else:
        grad_shortcut = passes.scaled(grad_o, factor * lam, grad_sum)
    grad_value = (found * gate).sum(0).unsqueeze(1)
    return [
        grad_z,
        grad_shortcut,
        grad_query,
        grad_key,
        grad_value.to(value_weight.dtype),
        grad_lambda.to(lambda_t.dtype),
        grad_weight,
        grad_bias,
        grad_out_weight,
        grad_out_bias,
    ]


def _backward_fake(
    grad: Tensor,
    z: Tensor,
    shortcut: Tensor,
    summary: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    lambda_t: Tensor,
    *args: Any,
) -> list[Tensor]:
    maps = [torch.empty_like(z) for _ in range(2)]
    weights = [torch.empty_like(w) for w in (query_weight, key_weight, value_weight, lambda_t)]
    return [*maps, *weights, *(summary.new_empty(z.shape[1]) for _ in range(4))]


_backward_op = register(
    "mmrla::light_tail_backward",
    "(Tensor grad, Tensor z, Tensor shortcut, Tensor summary, Tensor query_weight, "
    "Tensor key_weight, Tensor value_weight, Tensor lambda_t, int head_channels, Tensor? scale, "
    f"{tail.SAVED_SCHEMA}) -> Tensor[]",
    _backward,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, head_channels, scale = inputs[:8]
    norms, numbers = tail.saved_norms(inputs[8:], output[2:])
    ctx.save_for_backward(*tensors[:2], output[1], *tensors[2:], scale, *norms)
    ctx.options = head_channels, numbers


def _grads(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    head_channels, numbers = ctx.options
    saved = ctx.saved_tensors
    tensors, scale, norms = saved[:7], saved[7], saved[8:]
    found = _backward_op(dense(grad), *tensors, head_channels, scale, *norms, *numbers)
    return *found[:6], None, None, *tail.norm_grads(found[6:], norms)


_op = register_differentiable(
    "mmrla::light_tail",
    "(Tensor z, Tensor shortcut, Tensor query_weight, Tensor key_weight, Tensor value_weight, "
    f"Tensor lambda_t, int head_channels, Tensor? scale, {tail.NORM_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _setup_context,
    _grads,
)


def mrla_light_tail_fused(
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
) -> TailOutput:
    """See :func:`mrla_light_tail_naive`; keeps ``z`` and ``shortcut`` alone for backward.

    Has no second derivative, and no gradient of ``scale`` and of the statistics.
    """
    out, _, *statistics = _op(
        dense(z), dense(shortcut), query_weight, key_weight, value_weight, lambda_t,
        head_channels, tail.factors(scale, z), *tail.flat_norms(norm, out_norm),
    )  # fmt: skip
    return TailOutput(out, *(s.detach() for s in statistics))
