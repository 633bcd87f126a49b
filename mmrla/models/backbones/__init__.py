"""Backbones that carry a layer attention."""

from mmrla.models.backbones.mrla_resnet import MRLAResNet
from mmrla.models.backbones.mrla_resnext import MRLAResNeXt

__all__ = ["MRLAResNeXt", "MRLAResNet"]
