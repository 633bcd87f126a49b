"""The simple feature pyramid: levels of all strides from the one map of a plain ViT.

Paper: Exploring Plain Vision Transformer Backbones for Object Detection, ECCV 2022,
https://arxiv.org/abs/2203.16527, section 3 and Figure 2c.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log2
from typing import Any

import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule, ModuleList
from mmpretrain.models.utils import build_norm_layer
from torch import Tensor, nn

from mmrla.registry import MODELS


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Levels of stride 4, 8, 16, 32 from one map of stride 16, and coarser ones by subsampling.

    Each level scales the map (transposed 2x2 convolutions up, max pooling down), then a 1x1 and a
    3x3 convolution, each followed by a LayerNorm over channels.

    Args:
        in_channels: C of the map.
        out_channels: C of every level.
        num_outs: Levels; those beyond ``scales`` subsample the last by two.
        scales: Size of each level over that of the map, powers of two from 1/2 to 4.
        norm_cfg: Of the norms, over channels. Default LayerNorm for maps.
        init_cfg: Of the module.

    Raises:
        ValueError: A scale that is not possible, or fewer ``num_outs`` than ``scales``.

    Example:
        >>> import torch
        >>> from mmrla.models import SimpleFeaturePyramid
        >>> neck = SimpleFeaturePyramid(192, 256)
        >>> [tuple(y.shape[2:]) for y in neck((torch.rand(1, 192, 8, 6),))]
        [(32, 24), (16, 12), (8, 6), (4, 3), (2, 2)]
    """

    def __init__(
        self, in_channels: int, out_channels: int = 256, num_outs: int = 5,
        scales: Sequence[float] = (4.0, 2.0, 1.0, 0.5),
        norm_cfg: Mapping[str, Any] = dict(type="LN2d", eps=1e-6), init_cfg: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(init_cfg)
        if num_outs < len(scales):
            raise ValueError(
                f"num_outs must be at least the number of scales, got {num_outs} with {scales}"
            )
        self.num_outs = num_outs
        self.levels = ModuleList()
        for scale in scales:
            resize, width = self._resize(scale, in_channels, norm_cfg)
            self.levels.append(
                nn.Sequential(
                    *resize,
                    ConvModule(width, out_channels, 1, bias=False, act_cfg=None),
                    build_norm_layer(norm_cfg, out_channels),
                    ConvModule(out_channels, out_channels, 3, padding=1, bias=False, act_cfg=None),
                    build_norm_layer(norm_cfg, out_channels),
                )
            )

    @staticmethod
    def _resize(
        scale: float, channels: int, norm_cfg: Mapping[str, Any]
    ) -> tuple[list[nn.Module], int]:
        if scale == 0.5:
            return [nn.MaxPool2d(2, 2)], channels
        doublings = log2(scale) if scale > 0 else -1
        if doublings not in (0, 1, 2):
            raise ValueError(f"scales must be of 4, 2, 1 and 0.5, got {scale}")
        layers: list[nn.Module] = []
        for step in range(int(doublings)):
            if step:
                layers += [build_norm_layer(norm_cfg, channels), nn.GELU()]
            layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, stride=2))
            channels //= 2
        return layers, channels

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Map the last of ``inputs``, ``[B, C, H, W]``, to ``num_outs`` levels."""
        outs = [level(inputs[-1]) for level in self.levels]
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], 1, stride=2))
        return tuple(outs)
