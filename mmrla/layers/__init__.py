"""Layer attentions as modules. This package imports only torch and :mod:`mmrla.ops`."""

from mmrla.layers.attn_res import AttnRes
from mmrla.layers.denseformer import DenseFormer
from mmrla.layers.depthwise import DWConv
from mmrla.layers.dianet import DIAUnit
from mmrla.layers.dla import DLABase, DLALight
from mmrla.layers.kcla import KCLA
from mmrla.layers.layer_attention import PLACEMENTS, LayerAttention, Retrieval
from mmrla.layers.linear_rla import LinearRLA
from mmrla.layers.mla import MLA
from mmrla.layers.mrla import MRLABase, MRLALight
from mmrla.layers.rla import RecurrentLayerAggregation

__all__ = [
    "KCLA", "MLA", "PLACEMENTS", "AttnRes", "DIAUnit", "DLABase", "DLALight", "DWConv",
    "DenseFormer", "LayerAttention", "LinearRLA", "MRLABase", "MRLALight",
    "RecurrentLayerAggregation", "Retrieval",
]  # fmt: skip
