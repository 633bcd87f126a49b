"""Layer attentions as modules. This floor imports torch and :mod:`mmrla.ops`."""

from mmrla.layers.dianet import DIAUnit
from mmrla.layers.dla import DLABase, DLALight
from mmrla.layers.layer_attention import PLACEMENTS, LayerAttention
from mmrla.layers.mrla import MRLABase, MRLALight
from mmrla.layers.rla import RecurrentLayerAggregation

__all__ = [
    "PLACEMENTS",
    "DIAUnit",
    "DLABase",
    "DLALight",
    "LayerAttention",
    "MRLABase",
    "MRLALight",
    "RecurrentLayerAggregation",
]
