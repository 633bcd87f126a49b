"""Layer attentions as modules. This floor imports torch and :mod:`mmrla.ops`."""

from mmrla.layers.depthwise import DWConv
from mmrla.layers.layer_attention import LayerAttention, Retrieval
from mmrla.layers.linear_rla import LinearRLA
from mmrla.layers.mla import MLA
from mmrla.layers.mrla import MRLABase, MRLALight

__all__ = ["MLA", "DWConv", "LayerAttention", "LinearRLA", "MRLABase", "MRLALight", "Retrieval"]
