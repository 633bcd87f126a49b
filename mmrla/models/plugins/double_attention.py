"""Double attention.

Paper: A^2-Nets: Double Attention Networks, NeurIPS 2018, https://arxiv.org/abs/1810.11579, Eq. 5:
``Z = [A(x) softmax(B(x))^T] softmax(V(x))``. The first softmax runs over positions and gathers n
global features of m channels each, the second over those features and distributes them to every
position. A, B and V are 1x1 convolutions, and another one maps Z back to C channels:
``out = x + extend(Z)``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmrla.models.plugins.checks import check_counts
from mmrla.registry import MODELS


@MODELS.register_module()
class DoubleAttention(nn.Module):
    """A residual block that gathers features from all positions and distributes them to each.

    Args:
        in_channels: C.
        reduction: Ratio of C to m and n. Default 2, which gives the paper's 33.0 M parameters with
            its five blocks in ResNet-50.

    Raises:
        ValueError: An argument is not positive.
    """

    _abbr_ = "double_attention"

    def __init__(self, in_channels: int, reduction: int = 2) -> None:
        super().__init__()
        check_counts("DoubleAttention", in_channels=in_channels, reduction=reduction)
        channels = max(in_channels // reduction, 1)
        self.features = nn.Conv2d(in_channels, channels, 1)
        self.gather = nn.Conv2d(in_channels, channels, 1)
        self.distribute = nn.Conv2d(in_channels, channels, 1)
        self.extend = nn.Conv2d(channels, in_channels, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as the identity, like any block added to a network that works without it."""
        for parameter in self.extend.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the same shape."""
        features = self.features(x).flatten(2)
        gather = self.gather(x).flatten(2).softmax(dim=2)
        distribute = self.distribute(x).flatten(2).softmax(dim=1)
        descriptors = torch.einsum("bmp,bnp->bmn", features, gather)
        z = torch.einsum("bmn,bnp->bmp", descriptors, distribute)
        return x + self.extend(z.unflatten(2, x.shape[2:]))
