"""``nn.BatchNorm2d`` as what the fused operations take, and its running statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmrla.ops import BatchNorm


def is_plain(*modules: nn.Module) -> bool:
    """Whether no hook of these modules or their parts would miss that they are not called."""
    return not any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks
        or part._backward_pre_hooks
        for module in modules
        for part in module.modules()
    )  # fmt: skip


def batch_norm_of(norm: nn.BatchNorm2d) -> BatchNorm:
    """What ``norm`` would compute with now, in training or evaluation."""
    frozen = not norm.training and norm.running_mean is not None
    return BatchNorm(
        norm.weight,
        norm.bias,
        norm.running_mean if frozen else None,
        norm.running_var if frozen else None,
        norm.eps,
    )


@torch.no_grad()
def update_running_statistics(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Move the running statistics as ``norm``'s own forward does, in training.

    Args:
        norm: The batch norm.
        mean: The batch's mean, ``[C]``.
        var: The batch's biased variance, ``[C]``.
        count: Values a channel in the batch.
    """
    running_mean, running_var = norm.running_mean, norm.running_var
    if not norm.training or running_mean is None or running_var is None:
        return
    momentum: float | Tensor = 0.0 if norm.momentum is None else norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # a cumulative average
            momentum = norm.num_batches_tracked.reciprocal()
    unbiased = var * (count / (count - 1))
    for running, now in ((running_mean, mean), (running_var, unbiased)):
        running.mul_(1 - momentum).add_(now * momentum)
