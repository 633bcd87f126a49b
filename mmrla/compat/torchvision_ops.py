"""The functions of ``mmcv._ext`` that detectors need, based on torchvision's kernels.

Signatures and in-place outputs are those of mmcv's Python wrappers (mmcv 2.1 to 2.3). Kernels run
in float32 or float64; half-precision tensors are converted, because torchvision has no bfloat16
kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from mmrla.compat.deformable_ops import (
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
    modulated_deform_conv_backward,
    modulated_deform_conv_forward,
    ms_deform_attn_backward,
    ms_deform_attn_forward,
    wide,
)

HOW_TO_COMPILE = (
    "install mmcv with compiled ops: a prebuilt mmcv wheel that matches your torch and CUDA (see "
    "mmcv's installation guide), or build it with MMCV_WITH_OPS=1 pip install --no-binary mmcv mmcv"
)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of kept boxes ``[K]``, best first; ``offset`` 1 counts x2 - x1 + 1 pixels."""
    boxes = wide(boxes)
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torchvision.ops.nms(boxes, wide(scores), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (ICCV 2017): fills ``dets`` [N, 5] and returns the indices of kept boxes.

    ``method``: 0 drops, 1 decays linearly, 2 decays with a Gaussian of the overlap.
    """
    boxes, scores = wide(boxes), wide(scores).clone()
    areas = (boxes[:, 2:] - boxes[:, :2] + offset).prod(dim=1)
    remaining = torch.arange(len(scores))
    kept: list[int] = []
    while len(remaining):
        best = int(scores[remaining].argmax())
        index = int(remaining[best])
        dets[len(kept), :4] = boxes[index]
        dets[len(kept), 4] = scores[index]
        kept.append(index)
        remaining = torch.cat([remaining[:best], remaining[best + 1 :]])
        top_left = torch.maximum(boxes[index, :2], boxes[remaining, :2])
        bottom_right = torch.minimum(boxes[index, 2:], boxes[remaining, 2:])
        overlap = (bottom_right - top_left + offset).clamp(min=0).prod(dim=1)
        iou = overlap / (areas[index] + areas[remaining] - overlap)
        if method == 2:
            decay = torch.exp(-iou * iou / sigma)
        else:
            over = iou >= iou_threshold
            decay = torch.where(over, 1 - iou if method == 1 else 0.0, 1.0)
        scores[remaining] *= decay
        remaining = remaining[scores[remaining] >= min_score]
    return torch.tensor(kept, dtype=torch.long)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign into ``output`` [R, C, h, w]; ``pool_mode`` 1 averages, 0 (max) is not supported."""
    if pool_mode != 1:
        raise _not_implemented("roi_align with pool_mode='max'")
    pooled = torch.ops.torchvision.roi_align(
        wide(input),
        wide(rois).to(wide(input).dtype),
        spatial_scale,
        aligned_height,
        aligned_width,
        sampling_ratio,
        aligned,
    )
    output.copy_(pooled)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of RoIAlign added into ``grad_input`` [B, C, H, W]."""
    grad = torch.ops.torchvision._roi_align_backward(
        wide(grad_output),
        wide(rois).to(wide(grad_output).dtype),
        spatial_scale,
        aligned_height,
        aligned_width,
        *grad_input.shape,
        sampling_ratio,
        aligned,
    )
    grad_input.add_(grad.to(grad_input.dtype))


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """RoIPool into ``output`` and ``argmax``, each [R, C, h, w]."""
    pooled, indices = torch.ops.torchvision.roi_pool(
        wide(input),
        wide(rois).to(wide(input).dtype),
        spatial_scale,
        pooled_height,
        pooled_width,
    )
    output.copy_(pooled)
    argmax.copy_(indices)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Gradient of RoIPool added into ``grad_input`` [B, C, H, W]."""
    grad = torch.ops.torchvision._roi_pool_backward(
        wide(grad_output),
        wide(rois).to(wide(grad_output).dtype),
        argmax,
        spatial_scale,
        pooled_height,
        pooled_width,
        *grad_input.shape,
    )
    grad_input.add_(grad.to(grad_input.dtype))


def _sigmoid_focal_terms(
    input: Tensor, target: Tensor, weight: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """One-hot target and the weight of each term; a target of C is background."""
    classes = input.size(1)
    one_hot = F.one_hot(target, classes + 1)[:, :classes].to(input.dtype)
    scale = alpha * one_hot + (1 - alpha) * (1 - one_hot)
    if weight.numel():
        # mmcv's kernel weighs a sample by the weight of its own class.
        padded = torch.cat([weight, weight.new_ones(1)]).to(input.dtype)
        scale = scale * padded[target][:, None]
    return one_hot, scale


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss (ICCV 2017, Eq. 5) of sigmoids into ``output`` [N, C]; ``target`` [N] in 0 .. C.

    C is the background.
    """
    logits = wide(input)
    one_hot, scale = _sigmoid_focal_terms(logits, target, wide(weight), alpha)
    signed = torch.where(one_hot.bool(), logits, -logits)
    loss = -scale * torch.sigmoid(-signed).pow(gamma) * F.logsigmoid(signed)
    output.copy_(loss)


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Derivative of the loss by each logit into ``grad_input`` [N, C]."""
    logits = wide(input)
    one_hot, scale = _sigmoid_focal_terms(logits, target, wide(weight), alpha)
    signed = torch.where(one_hot.bool(), logits, -logits)
    p, miss = torch.sigmoid(signed), torch.sigmoid(-signed)
    slope = miss.pow(gamma) * (gamma * p * F.logsigmoid(signed) - miss)
    grad_input.copy_(scale * slope * torch.where(one_hot.bool(), 1.0, -1.0))


def get_compiler_version() -> str:
    """Named in mmengine's and mmdet's environment reports."""
    return "none (mmrla's fallback over torchvision)"


def get_compiling_cuda_version() -> str:
    """Named in mmengine's and mmdet's environment reports."""
    return f"none (torchvision {torchvision.__version__})"


PROVIDED: tuple[Callable[..., Any], ...] = (
    nms,
    softnms,
    roi_align_forward,
    roi_align_backward,
    roi_pool_forward,
    roi_pool_backward,
    sigmoid_focal_loss_forward,
    sigmoid_focal_loss_backward,
    deform_conv_forward,
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    modulated_deform_conv_forward,
    modulated_deform_conv_backward,
    ms_deform_attn_forward,
    ms_deform_attn_backward,
    get_compiler_version,
    get_compiling_cuda_version,
)


def _not_implemented(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"mmcv op {name} needs mmcv's compiled extension, which is not installed; mmrla's fallback "
        f"covers {', '.join(f.__name__ for f in PROVIDED[:-2])}. To get it, {HOW_TO_COMPILE}."
    )


def _missing_op(name: str) -> Callable[..., Any]:
    """Mmcv's wrappers check at import that a function exists, so it fails only when called."""

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise _not_implemented(name)

    missing.__name__ = name
    return missing


def populate(module: ModuleType) -> None:
    """Turn an empty module into a replacement of ``mmcv._ext``."""
    module.__doc__ = __doc__
    for function in PROVIDED:
        setattr(module, function.__name__, function)

    def __getattr__(name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _missing_op(name)

    module.__getattr__ = __getattr__  # type: ignore[method-assign]
