"""Datasets: the generated demo set, CIFAR, checked COCO, and Pascal VOC converted to COCO."""

from mmrla.datasets.checked_coco import CheckedCocoDataset
from mmrla.datasets.cifar import FolderCIFAR10, FolderCIFAR100
from mmrla.datasets.coco_check import check_coco
from mmrla.datasets.findings import DataError, Finding
from mmrla.datasets.shapes import CLASSES, generate_shapes
from mmrla.datasets.voc import voc_to_coco

__all__ = [
    "CLASSES", "CheckedCocoDataset", "DataError", "Finding", "FolderCIFAR10", "FolderCIFAR100",
    "check_coco", "generate_shapes", "voc_to_coco",
]  # fmt: skip
