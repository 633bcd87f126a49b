"""Efficient channel attention.

Paper: ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks, CVPR 2020,
https://arxiv.org/abs/1910.03151, Eq. 9 and 12: ``out = x * sigmoid(conv1d_k(mean(x)))``, with k the
odd number that follows ``|log2(C) / gamma + b / gamma|``, gamma = 2 and b = 1.
"""

from __future__ import annotations

import torch
from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn

from mmrla.models.plugins.checks import check_counts, check_odd
from mmrla.ops import eca_kernel_size
from mmrla.registry import MODELS


@MODELS.register_module()
class ECA(nn.Module):
    """A gate for each channel from the means of k neighbouring channels.

    Args:
        in_channels: C.
        kernel_size: k, odd. Default None: from C, as above (5 for 256 to 1024 channels, 7 for
            2048 in ResNet-50).
        drop_path_rate: Stochastic depth of the module: in training a sample bypasses it with this
            probability, ``out = x * (1 + drop_path(gate - 1))``.

    Raises:
        ValueError: ``kernel_size`` is even or not positive, or the rate is not in [0, 1).
    """

    _abbr_ = "eca"

    def __init__(
        self, in_channels: int, kernel_size: int | None = None, drop_path_rate: float = 0.0
    ) -> None:
        super().__init__()
        check_counts("ECA", in_channels=in_channels)
        if kernel_size is None:
            kernel_size = eca_kernel_size(in_channels)
        check_odd("ECA", kernel_size=kernel_size)
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"ECA: drop_path_rate must be in [0, 1), got {drop_path_rate!r}")
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else None
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def reset_parameters(self) -> None:
        """The framework's initialisation, as in the released code."""
        self.conv.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Scale ``[B, C, H, W]`` channel by channel."""
        means = x.mean((2, 3))
        gate = torch.sigmoid(self.conv(means[:, None])[:, 0])
        if self.drop_path is not None:
            gate = 1 + self.drop_path(gate - 1)
        return x * gate[:, :, None, None]
