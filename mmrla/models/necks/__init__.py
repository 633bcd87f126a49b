"""Necks that the hosts need and mmdet does not have."""

from mmrla.models.necks.simple_fpn import SimpleFeaturePyramid

__all__ = ["SimpleFeaturePyramid"]
