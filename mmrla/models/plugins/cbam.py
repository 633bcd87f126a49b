"""Convolutional block attention module.

Paper: CBAM: Convolutional Block Attention Module, ECCV 2018, https://arxiv.org/abs/1807.06521,
Eq. 1 to 3: ``x' = x * sigmoid(MLP(mean(x)) + MLP(max(x)))`` with mean and maximum over positions,
then ``out = x' * sigmoid(norm(conv_7x7([max(x'); mean(x')])))`` with both over channels. The batch
norm after the convolution is from the released code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmrla.models.plugins.checks import check_counts, check_odd
from mmrla.registry import MODELS


@MODELS.register_module()
class CBAM(nn.Module):
    """A gate for each channel, then one for each position.

    Args:
        in_channels: C.
        reduction: Ratio of C to the number of channels in the MLP's hidden layer.
        kernel_size: Of the convolution that computes the gates of positions, odd.

    Raises:
        ValueError: An argument is not positive, or ``kernel_size`` even.
    """

    _abbr_ = "cbam"

    def __init__(self, in_channels: int, reduction: int = 16, kernel_size: int = 7) -> None:
        super().__init__()
        check_counts("CBAM", in_channels=in_channels, reduction=reduction)
        check_odd("CBAM", kernel_size=kernel_size)
        hidden = max(in_channels // reduction, 1)
        self.mlp = nn.Sequential(
            nn.Linear(in_channels, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, in_channels)
        )
        self.spatial = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        # One channel of gates: the released code's slow statistics.
        self.spatial_norm = nn.BatchNorm2d(1, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Scale ``[B, C, H, W]`` channel by channel, then position by position."""
        gate = torch.sigmoid(self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3))))
        x = x * gate[:, :, None, None]
        summary = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], dim=1)
        return x * torch.sigmoid(self.spatial_norm(self.spatial(summary)))
