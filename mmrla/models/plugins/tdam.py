"""Top-down attention module.

Paper: TDAM: Top-Down Attention Module for Contextually Guided Feature Selection in CNNs, ECCV 2022,
https://arxiv.org/abs/2111.13470. A residual branch runs T times. After each run but the last, its
output (top, y) gives a searchlight s for the input of its last m convolutions (bottom, b):

    s   = W relu(W_y mean(y))                                     searchlight='top'
    s   = W [relu(W_y mean(y)); relu(W_b mean(b))]                searchlight='joint'
    b'  = sigmoid(s) * b                                          channels
    b'' = sigmoid(sum_c s_c b'_c) * b'                            positions

and those m convolutions run again on b'', with the same weights but separate norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn

from mmrla.models.plugins.checks import check_counts
from mmrla.models.plugins.contract import BranchPlugin, Rerun
from mmrla.registry import MODELS


class _Searchlight(nn.Module):
    """``[B, C, 1, 1]`` for the bottom from the means of top and, if joint, bottom."""

    def __init__(self, top: int, bottom: int, reduction: int, joint: bool) -> None:
        super().__init__()
        hidden = max(top // reduction, 1)
        self.top = nn.Conv2d(top, hidden, 1, bias=False)
        self.bottom = nn.Conv2d(bottom, hidden, 1, bias=False) if joint else None
        self.out = nn.Conv2d(hidden * (2 if joint else 1), bottom, 1, bias=False)

    def forward(self, top: Tensor, bottom: Tensor) -> Tensor:
        hidden = torch.relu(self.top(top.mean((2, 3), keepdim=True)))
        if self.bottom is not None:
            other = torch.relu(self.bottom(bottom.mean((2, 3), keepdim=True)))
            hidden = torch.cat([hidden, other], dim=1)
        return self.out(hidden)


@MODELS.register_module()
class TDAM(BranchPlugin):
    """Runs the end of a residual branch again on an input modulated by its own output.

    Args:
        in_channels: C of the branch's output.
        branch_channels: Given by the block, see :class:`BranchPlugin`.
        norm_cfg: Given by the block, of the norms of the further runs.
        steps: T, at least 2.
        convs: m, from 1 to the number of the block's convolutions.
        reduction: Ratio of C to the number of hidden channels of the searchlight.
        searchlight: ``'joint'`` (top and bottom) or ``'top'``.

    Raises:
        ValueError: An argument is out of range.
    """

    _abbr_ = "tdam"

    def __init__(
        self, in_channels: int, branch_channels: Sequence[int], norm_cfg: dict[str, Any],
        steps: int = 2, convs: int = 1, reduction: int = 16, searchlight: str = "joint",
    ) -> None:  # fmt: skip
        super().__init__(in_channels, branch_channels, norm_cfg)
        check_counts("TDAM", in_channels=in_channels, convs=convs, reduction=reduction, steps=steps)
        if steps < 2:
            raise ValueError(f"TDAM: steps must be 2 or more, got {steps}")
        if convs > len(self.branch_channels):
            raise ValueError(
                f"TDAM: convs must be from 1 to {len(self.branch_channels)}, which this block has, "
                f"got {convs}"
            )
        if searchlight not in ("joint", "top"):
            raise ValueError(f"TDAM: searchlight must be 'joint' or 'top', got {searchlight!r}")
        self.first = len(self.branch_channels) - convs
        self.searchlight = _Searchlight(
            in_channels, self.branch_channels[self.first], reduction, searchlight == "joint"
        )
        outputs = (*self.branch_channels[1:], in_channels)[self.first :]
        self.norms = nn.ModuleList(
            nn.ModuleList(build_norm_layer(norm_cfg, channels)[1] for channels in outputs)
            for _ in range(steps - 1)
        )

    def last_norms(self) -> list[nn.Module]:
        """The norm that ends the residual branch, for each further run."""
        return [norms[-1] for norms in self.norms]  # type: ignore[index]

    def forward(self, x: Tensor, features: Sequence[Tensor], rerun: Rerun) -> Tensor:
        """Map the branch's output ``[B, C, H, W]`` to that of its last run."""
        bottom = features[self.first]
        for norms in self.norms:
            searchlight = self.searchlight(x, bottom)
            bottom = torch.sigmoid(searchlight) * bottom
            bottom = torch.sigmoid((searchlight * bottom).sum(1, keepdim=True)) * bottom
            x = rerun(self.first, bottom, list(norms.children()))
        return x
