"""ResNeXt with a layer attention after every residual layer."""

from __future__ import annotations

from typing import Any

from mmpretrain.models.backbones.resnext import Bottleneck as ResNeXtBottleneck

from mmrla.layers.checks import check_count
from mmrla.models.backbones.mrla_resnet import LayerAttentionStage, MRLABottleneck, MRLAResNet
from mmrla.registry import MODELS


class MRLAResNeXtBottleneck(MRLABottleneck, ResNeXtBottleneck):
    """mmpretrain's grouped bottleneck with a layer attention after it."""


@MODELS.register_module()
class MRLAResNeXt(MRLAResNet):
    """mmpretrain's ResNeXt with a layer attention after every residual layer.

    State-dict keys of :class:`mmpretrain.models.ResNeXt` are unchanged.

    Args:
        depth: 50, 101 or 152. ResNeXt consists of grouped bottlenecks, so there are no depths 18
            and 34, which have basic blocks.
        groups: Groups of the 3x3 convolution. Default 32.
        width_per_group: Its channels per group in the first stage. Default 4.
        **kwargs: As in :class:`MRLAResNet`.

    Raises:
        ValueError: As :class:`MRLAResNet`.
    """

    arch_settings = {
        depth: (MRLAResNeXtBottleneck, stages)
        for depth, (block, stages) in MRLAResNet.arch_settings.items()
        if issubclass(block, MRLABottleneck)
    }

    def __init__(
        self, depth: int, groups: int = 32, width_per_group: int = 4, **kwargs: Any
    ) -> None:
        check_count("groups", groups)
        check_count("width_per_group", width_per_group)
        self.groups = groups
        self.width_per_group = width_per_group
        super().__init__(depth, **kwargs)

    def make_res_layer(self, **kwargs: Any) -> LayerAttentionStage:
        """Build one stage; called by the ancestor's constructor."""
        return super().make_res_layer(
            groups=self.groups,
            width_per_group=self.width_per_group,
            base_channels=self.base_channels,
            **kwargs,
        )
