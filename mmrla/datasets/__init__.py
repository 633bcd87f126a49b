"""Data: the generated demo set, CIFAR, and COCO's format with a check."""

from mmrla.datasets.checked_coco import CheckedCocoDataset
from mmrla.datasets.cifar import FolderCIFAR10, FolderCIFAR100
from mmrla.datasets.coco_check import DataError, Finding, check_coco
from mmrla.datasets.shapes import CLASSES, generate_shapes

__all__ = [
    "CLASSES",
    "CheckedCocoDataset",
    "DataError",
    "Finding",
    "FolderCIFAR10",
    "FolderCIFAR100",
    "check_coco",
    "generate_shapes",
]
