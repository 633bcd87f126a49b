"""Networks: hosts of layer attention, built on networks of mmpretrain and mmdet."""

from mmrla.compat import log_ops_in_use, warn_about_versions
from mmrla.models import backbones
from mmrla.models.backbones import *  # noqa: F403
from mmrla.models.builder import build_layer_attention
from mmrla.models.heads import DropoutLinearClsHead
from mmrla.models.necks import SimpleFeaturePyramid
from mmrla.models.plugins import (
    CBAM,
    ECA,
    SE,
    TDAM,
    AttentionAugmentedConv,
    BridgeAttention,
    DoubleAttention,
)
from mmrla.models.warm_start import WarmStart
from mmrla.models.wrapper import LayerAttentionWrapper

__all__ = [
    "CBAM", "ECA", "SE", "TDAM", "AttentionAugmentedConv", "BridgeAttention", "DoubleAttention",
    "DropoutLinearClsHead", "LayerAttentionWrapper", "SimpleFeaturePyramid", "WarmStart",
    "build_layer_attention",
]  # fmt: skip
__all__ += backbones.__all__

log_ops_in_use()
warn_about_versions()
