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

from mmrla.compat.deformable_ops import DEFORMABLE, wide

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
    boxes: Tensor, scores: Tensor, dets: Tensor, iou_threshold: float, sigma: float,
    min_score: float, method: int, offset: int,
) -> Tensor:  # fmt: skip
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


def _regions(x: Tensor, rois: Tensor, kind: str, options: dict[str, Any]) -> tuple[Any, ...]:
    """The first arguments of torchvision's kernels, from mmcv's of ``kind`` aligned or pooled."""
    x = wide(x)
    sides = options[f"{kind}_height"], options[f"{kind}_width"]
    return x, rois.to(x.dtype), options["spatial_scale"], *sides


def roi_align_forward(
    input: Tensor, rois: Tensor, output: Tensor, *argmax: Tensor, **options: Any
) -> None:
    """RoIAlign into ``output`` [R, C, h, w]; ``pool_mode`` 1 averages, 0 (max) is not supported."""
    if options["pool_mode"] != 1:
        raise _not_implemented("roi_align with pool_mode='max'")
    arguments = _regions(input, rois, "aligned", options)
    sampling = options["sampling_ratio"], options["aligned"]
    output.copy_(torch.ops.torchvision.roi_align(*arguments, *sampling))


def roi_align_backward(
    grad_output: Tensor, rois: Tensor, y: Tensor, x: Tensor, grad_input: Tensor, **options: Any
) -> None:
    """Gradient of RoIAlign added into ``grad_input`` [B, C, H, W]."""
    arguments = _regions(grad_output, rois, "aligned", options)
    sampling = options["sampling_ratio"], options["aligned"]
    grad = torch.ops.torchvision._roi_align_backward(*arguments, *grad_input.shape, *sampling)
    grad_input.add_(grad.to(grad_input.dtype))


def roi_pool_forward(
    input: Tensor, rois: Tensor, output: Tensor, argmax: Tensor, **options: Any
) -> None:
    """RoIPool into ``output`` and ``argmax``, each [R, C, h, w]."""
    arguments = _regions(input, rois, "pooled", options)
    pooled, indices = torch.ops.torchvision.roi_pool(*arguments)
    output.copy_(pooled)
    argmax.copy_(indices)


def roi_pool_backward(
    grad_output: Tensor, rois: Tensor, argmax: Tensor, grad_input: Tensor, **options: Any
) -> None:
    """Gradient of RoIPool added into ``grad_input`` [B, C, H, W]."""
    grad, regions, *bins = _regions(grad_output, rois, "pooled", options)
    grad = torch.ops.torchvision._roi_pool_backward(grad, regions, argmax, *bins, *grad_input.shape)
    grad_input.add_(grad.to(grad_input.dtype))


def _sigmoid_focal_terms(
    input: Tensor, target: Tensor, weight: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sign of each logit, the logit towards its target, and the weight of its term.

    A target of C is background.
    """
    logits, weight = wide(input), wide(weight)
    classes = logits.size(1)
    one_hot = F.one_hot(target, classes + 1)[:, :classes].to(logits.dtype)
    scale = alpha * one_hot + (1 - alpha) * (1 - one_hot)
    if weight.numel():
        # mmcv's kernel weighs a sample by the weight of its own class.
        padded = torch.cat([weight, weight.new_ones(1)]).to(logits.dtype)
        scale = scale * padded[target][:, None]
    sign = 2 * one_hot - 1
    return sign, sign * logits, scale


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss (ICCV 2017, Eq. 5) of sigmoids into ``output`` [N, C]; ``target`` [N] in 0 .. C.

    C is the background.
    """
    _, signed, scale = _sigmoid_focal_terms(input, target, weight, alpha)
    output.copy_(-scale * torch.sigmoid(-signed).pow(gamma) * F.logsigmoid(signed))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Derivative of the loss by each logit into ``grad_input`` [N, C]."""
    sign, signed, scale = _sigmoid_focal_terms(input, target, weight, alpha)
    p, miss = torch.sigmoid(signed), torch.sigmoid(-signed)
    slope = miss.pow(gamma) * (gamma * p * F.logsigmoid(signed) - miss)
    grad_input.copy_(scale * slope * sign)


def get_compiler_version() -> str:
    """Named in mmengine's and mmdet's environment reports."""
    return "none (mmrla's fallback over torchvision)"


def get_compiling_cuda_version() -> str:
    """Named in mmengine's and mmdet's environment reports."""
    return f"none (torchvision {torchvision.__version__})"


PROVIDED: tuple[Callable[..., Any], ...] = (
    nms, softnms, roi_align_forward, roi_align_backward, roi_pool_forward, roi_pool_backward,
    sigmoid_focal_loss_forward, sigmoid_focal_loss_backward, *DEFORMABLE, get_compiler_version,
    get_compiling_cuda_version,
)  # fmt: skip


def _not_implemented(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"mmcv op {name} needs mmcv's compiled extension, which is not installed; mmrla's fallback "
        f"covers {', '.join(f.__name__ for f in PROVIDED[:-2])}. To get it, {HOW_TO_COMPILE}."
    )


def populate(module: ModuleType) -> None:
    """Turn an empty module into a replacement of ``mmcv._ext``."""
    module.__doc__ = __doc__
    for function in PROVIDED:
        setattr(module, function.__name__, function)

    def __getattr__(name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        # mmcv's wrappers check at import that a function exists, so it fails only when called.
        def missing(*args: Any, **kwargs: Any) -> Any:
            raise _not_implemented(name)

        missing.__name__ = name
        return missing

    module.__getattr__ = __getattr__  # type: ignore[method-assign]
