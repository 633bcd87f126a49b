"""ResNets for CIFAR with a layer attention after every residual layer.

Networks: Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2,
https://arxiv.org/abs/1512.03385.
"""

from __future__ import annotations

from typing import Any

from mmpretrain.models.backbones import ResNet_CIFAR
from torch import Tensor

from mmrla.models.backbones.mrla_resnet import MRLABasicBlock, MRLAResNet
from mmrla.registry import MODELS


@MODELS.register_module()
class MRLAResNetCIFAR(MRLAResNet, ResNet_CIFAR):
    """ResNet-20, 56 and 110 with a layer attention after every residual layer.

    Three stages of 16, 32 and 64 channels behind a 3x3 stem of stride 1, on mmpretrain's
    ``ResNet_CIFAR``, whose shortcuts between stages are 1x1 projections. Where a stage has fewer
    channels than ``head_channels``, it has one head.

    Args:
        depth: 20, 56 or 110: 6 n + 2.
        **kwargs: As in :class:`MRLAResNet`. ``out_indices`` counts three stages, default (2,).

    Raises:
        ValueError: As :class:`MRLAResNet`.

    Example:
        >>> import torch
        >>> from mmrla.models import MRLAResNetCIFAR
        >>> [tuple(y.shape) for y in MRLAResNetCIFAR(20).eval()(torch.rand(1, 3, 32, 32))]
        [(1, 64, 8, 8)]
    """

    arch_settings = {depth: (MRLABasicBlock, ((depth - 2) // 6,) * 3) for depth in (20, 56, 110)}
    fit_heads = True

    def __init__(self, depth: int, **kwargs: Any) -> None:
        defaults: dict[str, Any] = dict(
            stem_channels=16,
            base_channels=16,
            num_stages=3,
            strides=(1, 2, 2),
            dilations=(1, 1, 1),
            out_indices=(2,),
        )
        if kwargs.get("deep_stem"):
            raise ValueError(f"deep_stem: a CIFAR ResNet has none, got {kwargs['deep_stem']!r}")
        super().__init__(depth, **{**defaults, **kwargs})

    def _stem(self, x: Tensor) -> Tensor:
        return self.relu(self.norm1(self.conv1(x)))
