"""Analysis of networks with layer attention: their cost, and what they attend to."""

from mmrla.analysis.complexity import Complexity, activation_memory, complexity
from mmrla.analysis.recorder import (
    GroupRecord,
    LayerAttentionRecorder,
    query_similarity,
    record_layer_attention,
)

__all__ = [
    "Complexity",
    "GroupRecord",
    "LayerAttentionRecorder",
    "activation_memory",
    "complexity",
    "query_similarity",
    "record_layer_attention",
]
