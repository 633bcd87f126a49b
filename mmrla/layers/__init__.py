"""Layer attentions as modules. This floor imports torch and :mod:`mmrla.ops`."""

from mmrla.layers.layer_attention import LayerAttention, Retrieval
from mmrla.layers.mrla import MRLABase, MRLALight

__all__ = ["LayerAttention", "MRLABase", "MRLALight", "Retrieval"]
