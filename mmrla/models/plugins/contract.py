"""Interface between residual blocks and plugins that need more than their input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

Rerun = Callable[[int, Tensor, Sequence[nn.Module]], Tensor]


class BranchPlugin(nn.Module):
    """A plugin after a residual branch that uses intermediate results of the branch.

    It is built with the arguments below in addition to its own, and comes after the last
    convolution.

    Args:
        in_channels: Channels of the branch's output.
        branch_channels: Channels of the inputs of the branch's convolutions, in order: the
            block's input first.
        norm_cfg: The block's, in mmcv's style.
    """

    def __init__(
        self, in_channels: int, branch_channels: Sequence[int], norm_cfg: dict[str, Any]
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.branch_channels = tuple(branch_channels)
        self.norm_cfg = norm_cfg

    def forward(self, x: Tensor, features: Sequence[Tensor], rerun: Rerun) -> Tensor:
        """Map the branch's output to a new one.

        Args:
            x: After the last norm, ``[B, C, H, W]``.
            features: The inputs of the branch's convolutions, in order.
            rerun: ``rerun(first, x, norms)`` runs the branch's convolutions from number ``first``
                (from 0) to the last on ``x`` once more, with ``norms`` in place of the block's.

        Returns:
            A tensor shaped like ``x``.
        """
        raise NotImplementedError


class ConvPlugin(nn.Module):
    """A plugin that replaces a convolution, built with the arguments below and its own.

    Args:
        in_channels: Channels of its input.
        out_channels: Channels of its output.
        kernel_size: As of the convolution it replaces, like those below.
        stride: As above.
        padding: As above.
        dilation: As above.
        groups: As above.
    """
