"""Heads that the recipes need and mmpretrain does not have."""

from mmrla.models.heads.dropout_head import DropoutLinearClsHead

__all__ = ["DropoutLinearClsHead"]
