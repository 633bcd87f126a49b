"""ResNets for CIFAR with a layer attention after every residual layer.

Networks: Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2,
https://arxiv.org/abs/1512.03385. With bottlenecks, as works after MRLA train them: Strengthening
Layer Interaction via Dynamic Layer Attention, https://arxiv.org/abs/2406.13392, and KCLA,
https://arxiv.org/abs/2606.28405.
"""

from __future__ import annotations

from typing import Any

from mmpretrain.models.backbones import ResNet_CIFAR
from torch import Tensor

from mmrla.models.backbones.mrla_resnet import MRLABasicBlock, MRLABottleneck, MRLAResNet
from mmrla.registry import MODELS

DEPTHS = (20, 56, 110)
# Each block's class, and the weighted layers that n blocks per stage make: 6 n or 9 n.
BLOCKS = {"basic": (MRLABasicBlock, 6), "bottleneck": (MRLABottleneck, 9)}


@MODELS.register_module()
class MRLAResNetCIFAR(MRLAResNet, ResNet_CIFAR):
    """ResNet-20, 56 and 110 with a layer attention after every residual layer.

    Three stages of stride 1, 2 and 2 on mmpretrain's ``ResNet_CIFAR``. The stem is a 3x3
    convolution of stride 1 to 16 channels, without pooling. A shortcut is the identity, or a 1x1
    convolution with a norm if a block changes the channels or has a stride: with bottlenecks in the
    first block of each stage, with basic blocks in that of the second and third. A stage with fewer
    channels than ``head_channels`` has one head.

    In the protocol of DLA and KCLA the blocks are bottlenecks and no norm starts at zero
    (``zero_init_residual=False``; the default here, mmpretrain's, is True). Their initialisation of
    convolutions, normal with a standard deviation of ``sqrt(2 / (k * k * C_out))``, is mmpretrain's
    default.

    Args:
        depth: 20, 56 or 110.
        block: ``'basic'``, 6 n + 2 layers and stages of 16, 32 and 64 channels, or
            ``'bottleneck'``, 9 n + 2 layers and stages of 64, 128 and 256 channels, with a quarter
            of them in the 3x3 convolutions.
        **kwargs: As in :class:`MRLAResNet`. ``out_indices`` counts three stages, default (2,).

    Raises:
        ValueError: As :class:`MRLAResNet`; an unknown block, or an ``expansion`` of basic blocks.

    Example:
        >>> import torch
        >>> from mmrla.models import MRLAResNetCIFAR
        >>> [tuple(y.shape) for y in MRLAResNetCIFAR(20).eval()(torch.rand(1, 3, 32, 32))]
        [(1, 64, 8, 8)]
        >>> backbone = MRLAResNetCIFAR(20, block='bottleneck').eval()
        >>> [tuple(y.shape) for y in backbone(torch.rand(1, 3, 32, 32))]
        [(1, 256, 8, 8)]
    """

    fit_heads = True

    def __init__(self, depth: int, block: str = "basic", **kwargs: Any) -> None:
        if not isinstance(block, str) or block not in BLOCKS:
            raise ValueError(f"block must be one of {sorted(BLOCKS)}, got {block!r}")
        if block == "basic" and kwargs.get("expansion") not in (None, 1):
            raise ValueError(
                f"expansion={kwargs['expansion']!r} needs block='bottleneck', got block='basic'"
            )
        kind, layers = BLOCKS[block]
        self.arch_settings = {d: (kind, ((d - 2) // layers,) * 3) for d in DEPTHS}
        defaults: dict[str, Any] = dict(
            stem_channels=16, base_channels=16, num_stages=3, strides=(1, 2, 2),
            dilations=(1, 1, 1), out_indices=(2,),
        )  # fmt: skip
        if kwargs.get("deep_stem"):
            raise ValueError(f"deep_stem: a CIFAR ResNet has none, got {kwargs['deep_stem']!r}")
        super().__init__(depth, **{**defaults, **kwargs})

    def _stem(self, x: Tensor) -> Tensor:
        return self.relu(self.norm1(self.conv1(x)))
