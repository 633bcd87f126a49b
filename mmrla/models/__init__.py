"""Networks: hosts of layer attention, built on mmpretrain's and mmdet's."""

from mmrla.compat import log_ops_in_use
from mmrla.models.backbones import (
    MRLAResNet,
    MRLAResNetCIFAR,
    MRLAResNeXt,
    MRLAVisionTransformer,
)
from mmrla.models.builder import build_layer_attention
from mmrla.models.warm_start import WarmStart

__all__ = [
    "MRLAResNeXt",
    "MRLAResNet",
    "MRLAResNetCIFAR",
    "MRLAVisionTransformer",
    "WarmStart",
    "build_layer_attention",
]

log_ops_in_use()
