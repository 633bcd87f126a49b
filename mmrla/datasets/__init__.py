"""Data: the generated demo set, and CIFAR."""

from mmrla.datasets.cifar import FolderCIFAR10, FolderCIFAR100
from mmrla.datasets.shapes import CLASSES, generate_shapes

__all__ = ["CLASSES", "FolderCIFAR10", "FolderCIFAR100", "generate_shapes"]
