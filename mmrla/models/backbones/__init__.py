"""Backbones that carry a layer attention."""

from mmrla.models.backbones.ceit import CeiT, MRLACeiT
from mmrla.models.backbones.mrla_efficientnet import MRLAEfficientNet
from mmrla.models.backbones.mrla_pvt import MRLAPyramidVisionTransformerV2
from mmrla.models.backbones.mrla_resnet import MRLAResNet
from mmrla.models.backbones.mrla_resnet_cifar import MRLAResNetCIFAR
from mmrla.models.backbones.mrla_resnext import MRLAResNeXt
from mmrla.models.backbones.mrla_vit import MRLADistilledVisionTransformer, MRLAVisionTransformer

__all__ = [
    "CeiT", "MRLACeiT", "MRLADistilledVisionTransformer", "MRLAEfficientNet",
    "MRLAPyramidVisionTransformerV2", "MRLAResNeXt", "MRLAResNet", "MRLAResNetCIFAR",
    "MRLAVisionTransformer",
]  # fmt: skip
