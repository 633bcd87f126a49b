"""Converts the modules around a layer attention to the fused operations' arguments."""

from __future__ import annotations

from torch import Tensor, nn

from mmrla.ops import Norm


def is_plain(*modules: nn.Module) -> bool:
    """Whether these modules and their parts have no hooks, so they need not be called."""
    return not any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks
        or part._backward_pre_hooks
        for module in modules
        for part in module.modules()
    )  # fmt: skip


def norm_of(norm: nn.BatchNorm2d) -> Norm:
    """The parameters ``norm`` uses now; in training it counts the batch, as its forward does."""
    tracks = norm.track_running_stats or not norm.training
    running_mean, running_var = (norm.running_mean, norm.running_var) if tracks else (None, None)
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and running_mean is not None and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # a cumulative average
            momentum = 1.0 / float(norm.num_batches_tracked)
    return Norm(
        norm.weight, norm.bias, running_mean, running_var, momentum, norm.eps,
        norm.training or running_mean is None,
    )  # fmt: skip


def drop_path_scale(drop_path: nn.Module, z: Tensor) -> Tensor | None:
    """Factors ``[B]`` of drop path for a map ``z``; None if it drops nothing.

    Its own mode counts: with frozen stages, a block in eval may have attention that trains.
    """
    if isinstance(drop_path, nn.Identity) or not drop_path.training:
        return None
    return drop_path(z.new_ones(z.shape[0]))
