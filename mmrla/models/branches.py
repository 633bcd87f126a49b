"""A layer attention behind a layer, with the norms and drop path around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.utils.checkpoint as cp
from mmcv.cnn.bricks import DropPath
from mmpretrain.models.utils import build_norm_layer
from torch import Tensor, nn

from mmrla.models.builder import build_layer_attention

# d_k of the paper; and Algorithm 4: in a transformer the value of MRLA-light passes a GELU.
_MAP_DEFAULTS: dict[str, dict[str, Any]] = {
    "MRLALight": dict(head_channels=8),
    "MRLABase": dict(head_channels=8),
    "MLA": dict(head_channels=8),
    "LinearRLA": dict(head_channels=8),
}
_TOKEN_DEFAULTS: dict[str, dict[str, Any]] = {
    "MRLALight": dict(head_channels=16, value_act="gelu"),
    "MRLABase": dict(head_channels=16),
    "MLA": dict(head_channels=16),
    "LinearRLA": dict(head_channels=16),
}


def build_drop_path(rate: float) -> nn.Module:
    """Stochastic depth of a rate, or nothing for 0."""
    return DropPath(rate) if rate > 0 else nn.Identity()


class LayerAttentionOnMap(nn.Module):
    """A layer attention behind a convolutional layer: ``out = x + drop_path(norm(o_t))``.

    Args:
        layer_attention: Config of the layer attention; 8 channels a head unless it says otherwise.
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
        """Make what is added zero; the norm's gamma has a gradient, so that it grows in."""
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


class LayerAttentionOnTokens(nn.Module):
    """A layer attention behind a transformer block, with the norms around it.

    ``xn = LN(x)``, ``sn = LN'(shortcut)`` where the attention takes the shortcut; the patch tokens
    form a map and go through the attention, extra tokens (class, distillation) pass through:
    ``out = x + drop_path(concat(xn_extra, o_p))``.

    Args:
        layer_attention: Config of the layer attention.
        embed_dims: C.
        norm_cfg: Of the norms.
        drop_path_rate: Stochastic depth of what is added; 0 in the released code.
    """

    def __init__(
        self,
        layer_attention: Mapping[str, Any],
        embed_dims: int,
        norm_cfg: Mapping[str, Any],
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention = build_layer_attention(layer_attention, embed_dims, _TOKEN_DEFAULTS)
        self.norm = build_norm_layer(norm_cfg, embed_dims)
        self.shortcut_norm = None
        if self.attention.uses_shortcut:
            self.shortcut_norm = build_norm_layer(norm_cfg, embed_dims)
        self.drop_path = build_drop_path(drop_path_rate)

    def start_as_identity(self) -> None:
        """Make what is added zero: norms of zeros give a value, shortcut and extra tokens of zeros.

        Their own gradients are not zero, so that all of it grows in.
        """
        for norm in (self.norm, self.shortcut_norm):
            for parameter in norm.parameters() if norm is not None else ():
                nn.init.zeros_(parameter)

    def forward(
        self, x: Tensor, shortcut: Tensor, grid: tuple[int, int], extra: int, state: Any
    ) -> tuple[Tensor, Any]:
        """Map a block's output and input, each ``[B, extra + H*W, C]``, to the new output.

        Raises:
            ValueError: The tokens behind the extra ones do not fill the grid.
        """
        normed = self.norm(x)
        patches = to_map(normed, grid, extra)
        previous = patches
        if self.shortcut_norm is not None:
            previous = to_map(self.shortcut_norm(shortcut), grid, extra)
        o, state = self.attention(patches, previous, state)
        retrieved = torch.cat([normed[:, :extra], o.flatten(2).transpose(1, 2)], dim=1)
        return x + self.drop_path(retrieved), state


def to_map(tokens: Tensor, grid: tuple[int, int], extra: int) -> Tensor:
    """Patch tokens of ``[B, extra + H*W, C]`` as a map ``[B, C, H, W]``.

    Raises:
        ValueError: The tokens behind the extra ones do not fill the grid.
    """
    count = tokens.shape[1] - extra
    if count != grid[0] * grid[1]:
        raise ValueError(
            f"{count} patch tokens ({tokens.shape[1]} tokens, {extra} of them extra) do not make a "
            f"grid of {grid[0]} x {grid[1]} = {grid[0] * grid[1]}"
        )
    return tokens[:, extra:].transpose(1, 2).unflatten(2, grid)
