"""Looking at networks that carry a layer attention: what they cost, what they attend to."""

from mmrla.analysis.complexity import Complexity, activation_memory, complexity

__all__ = ["Complexity", "activation_memory", "complexity"]
