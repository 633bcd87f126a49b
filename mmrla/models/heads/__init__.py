"""Heads that recipes here need and mmpretrain does not ship."""

from mmrla.models.heads.dropout_head import DropoutLinearClsHead

__all__ = ["DropoutLinearClsHead"]
