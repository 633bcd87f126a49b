"""Backbones that carry a layer attention."""

from mmrla.models.backbones.mrla_resnet import MRLAResNet
from mmrla.models.backbones.mrla_resnet_cifar import MRLAResNetCIFAR
from mmrla.models.backbones.mrla_resnext import MRLAResNeXt
from mmrla.models.backbones.mrla_vit import MRLAVisionTransformer

__all__ = ["MRLAResNeXt", "MRLAResNet", "MRLAResNetCIFAR", "MRLAVisionTransformer"]
