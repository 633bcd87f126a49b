"""A linear classifier after dropout, as EfficientNets are trained."""

from __future__ import annotations

from typing import Any

from mmpretrain.models.heads import LinearClsHead
from torch import Tensor, nn

from mmrla.registry import MODELS


@MODELS.register_module()
class DropoutLinearClsHead(LinearClsHead):
    """mmpretrain's linear head with dropout before it; the state-dict keys are the same.

    Args:
        dropout_rate: Share of features set to zero in training, in [0, 1).
        **kwargs: As in :class:`mmpretrain.models.LinearClsHead`.

    Raises:
        ValueError: A rate outside [0, 1).
    """

    def __init__(self, *args: Any, dropout_rate: float = 0.2, **kwargs: Any) -> None:
        if not 0 <= dropout_rate < 1:
            raise ValueError(f"dropout_rate must be in [0, 1), got {dropout_rate!r}")
        super().__init__(*args, **kwargs)
        self.dropout = nn.Dropout(dropout_rate)

    def pre_logits(self, feats: tuple[Tensor, ...]) -> Tensor:
        """The last of ``feats``, ``[B, C]``, with dropout."""
        return self.dropout(super().pre_logits(feats))
