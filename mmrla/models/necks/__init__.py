"""Necks that hosts here need and mmdet does not ship."""

from mmrla.models.necks.simple_fpn import SimpleFeaturePyramid

__all__ = ["SimpleFeaturePyramid"]
