"""Data: the generated demo set."""

from mmrla.datasets.shapes import CLASSES, generate_shapes

__all__ = ["CLASSES", "generate_shapes"]
