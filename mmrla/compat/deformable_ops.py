"""Deformable convolution and attention of ``mmcv._ext``, on torchvision and mmcv's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Half precision as float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _deform_conv(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """torchvision's, with the names that mmcv gives stride, padding and dilation.

    It reads groups and offset groups off the shapes.
    """
    names = ("d{}", "pad{}", "dilation{}"), "HW"  # of DCNv1
    if "stride_h" in options:
        names = ("stride_{}", "pad_{}", "dilation_{}"), "hw"
    stride, padding, dilation = (tuple(options[n.format(s)] for s in names[1]) for n in names[0])
    return torchvision.ops.deform_conv2d(
        wide(input), wide(offset), wide(weight), None, stride, padding, dilation,
        None if mask is None else wide(mask),
    )  # fmt: skip


def _grads(grad_output: Tensor, run: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of ``run`` by ``inputs`` through torchvision's own autograd."""
    leaves = [wide(x).detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        out = run(*leaves)
    return torch.autograd.grad(out, leaves, grad_output.to(out.dtype))


def _fill(targets: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for target, grad in zip(targets, grads, strict=True):
        target.copy_(grad)


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, *buffers: Tensor, **options: Any
) -> None:
    """Deformable convolution (ICCV 2017) into ``output``."""
    output.copy_(_deform_conv(input, weight, offset, None, options))


def deform_conv_backward_input(
    input: Tensor, offset: Tensor, grad_output: Tensor, grad_input: Tensor, grad_offset: Tensor,
    weight: Tensor, columns: Tensor, **options: Any,
) -> None:  # fmt: skip
    """Gradients by input and offset."""
    grads = _grads(
        grad_output, lambda x, o: _deform_conv(x, weight, o, None, options), input, offset
    )
    _fill((grad_input, grad_offset), grads)


def deform_conv_backward_parameters(
    input: Tensor, offset: Tensor, grad_output: Tensor, grad_weight: Tensor, *buffers: Tensor,
    scale: float = 1, **options: Any,
) -> None:  # fmt: skip
    """Gradient by the weight, scaled and added into ``grad_weight``."""
    # grad_weight has the shape of the weight, and the gradient does not depend on its values.
    (by_weight,) = _grads(
        grad_output, lambda w: _deform_conv(input, w, offset, None, options), grad_weight
    )
    grad_weight.add_(by_weight.to(grad_weight.dtype), alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor, mask: Tensor,
    output: Tensor, columns: Tensor, with_bias: bool = False, **options: Any,
) -> None:  # fmt: skip
    """Modulated deformable convolution (DCNv2, CVPR 2019) into ``output``."""
    out = _deform_conv(input, weight, offset, mask, options)
    if with_bias:
        out = out + wide(bias)[:, None, None]
    output.copy_(out.view_as(output))


def modulated_deform_conv_backward(
    input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor, mask: Tensor,
    columns: Tensor, grad_input: Tensor, grad_weight: Tensor, grad_bias: Tensor,
    grad_offset: Tensor, grad_mask: Tensor, grad_output: Tensor, with_bias: bool = False,
    **options: Any,
) -> None:  # fmt: skip
    """All gradients of the modulated deformable convolution, in place."""
    inputs = (input, weight, offset, mask)
    grads = _grads(grad_output, lambda x, w, o, m: _deform_conv(x, w, o, m, options), *inputs)
    _fill((grad_input, grad_weight, grad_offset, grad_mask), grads)
    if with_bias:
        grad_bias.copy_(grad_output.sum(dim=(0, 2, 3)))


def _multi_scale_attention(*inputs: Tensor) -> Tensor:
    # mmcv's own for CPU, which it does not take on a GPU. Late: mmcv.ops imports this module.
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(*inputs)


def ms_deform_attn_forward(
    value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, sampling_locations: Tensor,
    attention_weights: Tensor, im2col_step: int,
) -> Tensor:  # fmt: skip
    """Multi-scale deformable attention (ICLR 2021), ``[B, queries, heads * channels]``.

    Args:
        value: ``[B, sum of H * W, heads, channels]``.
        spatial_shapes: H and W of each level, ``[levels, 2]``.
        level_start_index: Follows from the shapes.
        sampling_locations: x and y in 0 .. 1, ``[B, queries, heads, levels, points, 2]``.
        attention_weights: ``[B, queries, heads, levels, points]``.
        im2col_step: Images at a time in compiled mmcv; no result depends on it.
    """
    inputs = (wide(value), spatial_shapes, wide(sampling_locations), wide(attention_weights))
    return _multi_scale_attention(*inputs).to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, sampling_locations: Tensor,
    attention_weights: Tensor, grad_output: Tensor, grad_value: Tensor, grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor, im2col_step: int,
) -> None:  # fmt: skip
    """All gradients of multi-scale deformable attention, in place."""
    grads = _grads(
        grad_output,
        lambda v, locations, weights: _multi_scale_attention(v, spatial_shapes, locations, weights),
        value, sampling_locations, attention_weights,
    )  # fmt: skip
    _fill((grad_value, grad_sampling_loc, grad_attn_weight), grads)


DEFORMABLE = (
    deform_conv_forward, deform_conv_backward_input, deform_conv_backward_parameters,
    modulated_deform_conv_forward, modulated_deform_conv_backward, ms_deform_attn_forward,
    ms_deform_attn_backward,
)  # fmt: skip
