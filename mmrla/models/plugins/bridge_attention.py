"""Bridge attention.

Paper: BA-Net: Bridge Attention for Deep Convolutional Neural Networks, ECCV 2022,
https://arxiv.org/abs/2112.04150: the gate of a block uses all its convolutions, not only the last.
With F_i the output of convolution i of the block (after norm and activation; the last after its
norm), ``out = F_n * sigmoid(W relu(sum_i norm_i(W_i mean(F_i))))``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmrla.models.plugins.checks import check_counts
from mmrla.models.plugins.contract import BranchPlugin, Rerun
from mmrla.registry import MODELS


class _Squeeze(nn.Sequential):
    """``norm(W mean(F))``: ``[B, C, H, W]`` to ``[B, hidden]``."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__(nn.Linear(channels, hidden, bias=False), nn.BatchNorm1d(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean((2, 3)))


@MODELS.register_module()
class BridgeAttention(BranchPlugin):
    """A gate for each channel from the outputs of all convolutions of a residual block.

    Its batch norms get one value per sample and channel, so training needs at least two samples.

    Args:
        in_channels: C.
        branch_channels: Given by the block, see :class:`BranchPlugin`.
        norm_cfg: Given by the block; unused, because the norms here are one-dimensional.
        reduction: Ratio of C to the number of channels that the outputs are squeezed to.

    Raises:
        ValueError: ``reduction`` is not a positive integer.
    """

    _abbr_ = "bridge_attention"

    def __init__(
        self, in_channels: int, branch_channels: Sequence[int], norm_cfg: Any, reduction: int = 16
    ) -> None:
        super().__init__(in_channels, branch_channels, norm_cfg)
        check_counts("BridgeAttention", in_channels=in_channels, reduction=reduction)
        hidden = max(in_channels // reduction, 1)
        outputs = (*self.branch_channels[1:], in_channels)
        self.squeeze = nn.ModuleList(_Squeeze(channels, hidden) for channels in outputs)
        self.excite = nn.Linear(hidden, in_channels, bias=False)

    def forward(self, x: Tensor, features: Sequence[Tensor], rerun: Rerun) -> Tensor:
        """Scale the branch's output ``[B, C, H, W]`` channel by channel."""
        outputs = (*features[1:], x)
        pairs = zip(self.squeeze, outputs, strict=True)
        bridged = torch.stack([squeeze(output) for squeeze, output in pairs]).sum(0)
        gate = torch.sigmoid(self.excite(torch.relu(bridged)))
        return x * gate[:, :, None, None]
