"""MRLA-light in few passes over memory, keeping x and the previous output alone for backward.

With gates ``g`` the value's convolution and its gate are one depthwise convolution with taps
``g * w``. Backward needs no value either: with the moments ``M`` of the output's gradient and x
(:func:`mmrla.ops.depthwise.moments`), ``d w = sum_b g * M`` and ``d g = <w, M>``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrla.ops import passes
from mmrla.ops.custom_op import register, register_differentiable
from mmrla.ops.depthwise import moments, stencil
from mmrla.ops.memory import autocast_dtype, dense, why_not_fused
from mmrla.ops.mrla_light.gate import gate_backward, gate_of
from mmrla.ops.query_key import accumulation_dtype


def _forward(
    x: Tensor,
    previous: Tensor | None,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    lambda_t: Tensor | None,
    head_channels: int,
    gelu: bool,
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    summary = x.mean(dim=(2, 3), dtype=dtype)
    gate = gate_of(summary, query_weight, key_weight, head_channels)[:, :, None, None]
    taps = value_weight.to(dtype).transpose(0, 1)
    scale = None if lambda_t is None else lambda_t.to(dtype)
    if not gelu:
        return stencil(x, gate * taps, scale, previous), summary
    out = F.gelu(stencil(x, taps)).mul_(gate)
    if previous is not None and scale is not None:
        out.addcmul_(previous.to(out.dtype), scale.to(out.dtype)[:, None, None])
    return out, summary


def _forward_fake(x: Tensor, previous: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:2], dtype=accumulation_dtype(x.dtype))


def _backward(
    grad: Tensor,
    x: Tensor,
    previous: Tensor | None,
    summary: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    lambda_t: Tensor | None,
    head_channels: int,
    gelu: bool,
) -> list[Tensor]:
    gate = gate_of(summary, query_weight, key_weight, head_channels)[:, :, None, None]
    taps = value_weight.to(summary.dtype).transpose(0, 1)
    if gelu:
        value = stencil(x, taps)
        grad_gate = passes.dot(grad, F.gelu(value))
        grad_value = torch.ops.aten.gelu_backward((grad * gate).to(value.dtype), value)
        found = moments(grad_value, x)
        grad_taps = found.sum(0)
    else:
        found = moments(grad, x)
        grad_gate = (found * taps).sum(dim=(2, 3))
        grad_taps = (found * gate).sum(0)
        grad_value, taps = grad, gate * taps
    grad_summary, grad_query, grad_key = gate_backward(
        grad_gate, summary, query_weight, key_weight, head_channels
    )
    pixels = x.shape[2] * x.shape[3]
    grad_x = stencil(grad_value, taps.flip(2, 3), bias=grad_summary / pixels)
    grads = [grad_x, grad_query, grad_key, grad_taps.unsqueeze(1).to(value_weight.dtype)]
    if previous is not None and lambda_t is not None:
        grads.append(passes.dot(grad, previous).sum(0).to(lambda_t.dtype))
        grads.append(passes.scaled(grad, lambda_t.to(summary.dtype).expand_as(summary)))
    return grads


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    previous: Tensor | None,
    summary: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    lambda_t: Tensor | None,
    head_channels: int,
    gelu: bool,
) -> list[Tensor]:
    small = [torch.empty_like(w) for w in (query_weight, key_weight, value_weight)]
    grads = [torch.empty_like(grad), *small]
    if lambda_t is not None:
        grads += [torch.empty_like(lambda_t), torch.empty_like(grad)]
    return grads


_backward_op = register(
    "mmrla::light_backward",
    "(Tensor grad, Tensor x, Tensor? previous, Tensor summary, Tensor query_weight, "
    "Tensor key_weight, Tensor value_weight, Tensor? lambda_t, int head_channels, bool gelu) "
    "-> Tensor[]",
    _backward,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, previous, query_weight, key_weight, value_weight, lambda_t, head_channels, gelu = inputs
    ctx.save_for_backward(x, previous, output[1], query_weight, key_weight, value_weight, lambda_t)
    ctx.options = head_channels, gelu


def _grads(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = _backward_op(dense(grad), *ctx.saved_tensors, *ctx.options)
    grad_x, grad_query, grad_key, grad_value, grad_lambda, grad_previous = (
        *grads,
        *(None,) * (6 - len(grads)),
    )
    return grad_x, grad_previous, grad_query, grad_key, grad_value, grad_lambda, None, None


_op = register_differentiable(
    "mmrla::light",
    "(Tensor x, Tensor? previous, Tensor query_weight, Tensor key_weight, Tensor value_weight, "
    "Tensor? lambda_t, int head_channels, bool gelu) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _setup_context,
    _grads,
)


def mrla_light_fused(
    x: Tensor,
    previous: Tensor | None,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    lambda_t: Tensor | None,
    head_channels: int,
    value_act: str | None = None,
) -> Tensor:
    """``o = lambda_t * previous + sigmoid(<q, k>_head / sqrt(d_k)) * DWConv3x3(x)`` (Eq. 10).

    Arguments and result as in :func:`mmrla.ops.mrla_light.naive.mrla_light_naive`. Keeps ``x``
    and ``previous`` for backward, and ``[B, C]`` of small things; accumulates in float32 or wider.
    Has no second derivative.
    """
    dtype = autocast_dtype(x)
    x = dense(x.to(dtype))
    if previous is not None:
        previous = previous.to(dtype)
    return _op(
        x, previous, query_weight, key_weight, value_weight, lambda_t, head_channels,
        value_act == "gelu",
    )[0]  # fmt: skip


def why_not(
    x: Tensor,
    previous: Tensor | None,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> str | None:
    """Why :func:`mrla_light_fused` cannot run, or None; see :class:`mmrla.ops.Backend`."""
    if value_weight is None:
        return "it convolves the value, got value_weight=None"
    if query_weight.dim() != 3 or key_weight.dim() != 3:
        shapes = f"{tuple(query_weight.shape)} and {tuple(key_weight.shape)}"
        return f"it takes query and key of Conv1D, got fully connected ones, {shapes}"
    return why_not_fused(x)
