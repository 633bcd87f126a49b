"""A layer attention after a layer, with the norms and drop path around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.utils.checkpoint as cp
from mmcv.cnn.bricks import DropPath
from mmpretrain.models.utils import build_norm_layer
from torch import Tensor, nn

from mmrla.layers.builder import TOKEN_DEFAULTS
from mmrla.layers.token_branch import TokenBranch
from mmrla.models.builder import build_layer_attention

# d_k of the paper.
_MAP_DEFAULTS: dict[str, dict[str, Any]] = {"QueryKeyValue": dict(head_channels=8)}


def build_drop_path(rate: float) -> nn.Module:
    """Stochastic depth of a rate, or nothing for 0."""
    return DropPath(rate) if rate > 0 else nn.Identity()


class LayerAttentionOnMap(nn.Module):
    """A layer attention after a convolutional layer: ``out = x + drop_path(norm(o_t))``.

    Args:
        layer_attention: Config of the layer attention; by default 8 channels per head.
        channels: C.
        norm_cfg: Of the norm, in mmcv's style; mmpretrain's LN2d too.
        drop_path_rate: Stochastic depth of what is added.
        with_cp: Recompute it in the backward pass.
    """

    def __init__(
        self,
        layer_attention: Mapping[str, Any],
        channels: int,
        norm_cfg: Mapping[str, Any],
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        self.attention = build_layer_attention(layer_attention, channels, _MAP_DEFAULTS)
        self.norm = build_norm_layer(norm_cfg, channels)
        self.drop_path = build_drop_path(drop_path_rate)
        self.with_cp = with_cp

    def start_as_identity(self) -> None:
        """Make the branch add zero; the norm's gamma has a gradient, so training can change it."""
        for parameter in self.norm.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, shortcut: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Map a layer's output and input, each ``[B, C, H, W]``, to the new output."""
        if self.with_cp and x.requires_grad:
            return cp.checkpoint(self._forward, x, shortcut, state, use_reentrant=False)
        return self._forward(x, shortcut, state)

    def _forward(self, x: Tensor, shortcut: Tensor, state: Any) -> tuple[Tensor, Any]:
        o, state = self.attention(x, shortcut, state)
        return x + self.drop_path(self.norm(o)), state


class LayerAttentionOnTokens(TokenBranch):
    """A layer attention after a transformer block, built from configs; see :class:`TokenBranch`.

    Args:
        layer_attention: Config of the layer attention.
        embed_dims: C.
        norm_cfg: Of the norms.
        drop_path_rate: Stochastic depth of what is added; 0 in the released code.
    """

    def __init__(
        self, layer_attention: Any, embed_dims: int, norm_cfg: Any, drop_path_rate: float = 0.0
    ) -> None:
        super().__init__(
            build_layer_attention(layer_attention, embed_dims, TOKEN_DEFAULTS),
            lambda: build_norm_layer(norm_cfg, embed_dims),
            build_drop_path(drop_path_rate),
        )
