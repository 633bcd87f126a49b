"""Squeeze-and-excitation.

Paper: Squeeze-and-Excitation Networks, CVPR 2018, https://arxiv.org/abs/1709.01507, Eq. 2 to 4:
``out = x * sigmoid(W_2 relu(W_1 mean(x)))``, on mmpretrain's layer.
"""

from __future__ import annotations

from typing import Any

from mmpretrain.models.utils import SELayer

from mmrla.models.plugins.checks import check_counts
from mmrla.registry import MODELS


@MODELS.register_module()
class SE(SELayer):
    """mmpretrain's ``SELayer`` as a plugin: a gate for each channel from all channels' means.

    Args:
        in_channels: C.
        ratio: Ratio of C to the channels of the hidden layer, rounded to a multiple of 8.
        **kwargs: Other arguments of mmpretrain's ``SELayer``.

    Raises:
        ValueError: ``ratio`` is not a positive integer.
    """

    _abbr_ = "se_layer"

    def __init__(self, in_channels: int, ratio: int = 16, **kwargs: Any) -> None:
        check_counts("SE", in_channels=in_channels, ratio=ratio)
        super().__init__(in_channels, ratio=ratio, **kwargs)
