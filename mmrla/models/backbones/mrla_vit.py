"""Vision transformer with a layer attention after every block.

Paper: Cross-Layer Retrospective Retrieving via Layer Attention, ICLR 2023,
https://openreview.net/forum?id=pvgEL1yS3Ql, Algorithms 2 and 4; DeiT:
https://arxiv.org/abs/2012.12877.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mmcv.cnn.bricks import DropPath
from mmpretrain.models.backbones import VisionTransformer
from mmpretrain.models.utils import build_norm_layer, resize_pos_embed
from torch import Tensor, nn

from mmrla.models.builder import build_layer_attention
from mmrla.models.warm_start import init_weights_warm
from mmrla.registry import MODELS

# Algorithm 4: in a transformer the value of MRLA-light passes a GELU.
_DEFAULTS = {"MRLALight": dict(value_act="gelu")}


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
        self.attention = build_layer_attention(layer_attention, embed_dims, _DEFAULTS)
        self.norm = build_norm_layer(norm_cfg, embed_dims)
        self.shortcut_norm = None
        if self.attention.uses_shortcut:
            self.shortcut_norm = build_norm_layer(norm_cfg, embed_dims)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()

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


@MODELS.register_module()
class MRLAVisionTransformer(VisionTransformer):
    """mmpretrain's ViT (DeiT) with a layer attention after every block.

    Arguments and state-dict keys of :class:`mmpretrain.models.VisionTransformer` are unchanged;
    the added keys all contain ``mrla``.

    Args:
        layer_attention: Config of the layer attention, None for the plain network. MRLA-light's
            value passes a GELU here (Algorithm 4) unless ``value_act`` says otherwise.
            Default: ``dict(type='MRLALight', head_channels=16)``.
        mrla_group_size: Blocks 0, g, 2g, ... begin a new group. Default 4.
        mrla_drop_path_rate: Stochastic depth of the attention branch. Default 0, as released.
        norm_cfg: Of all norms, those around the layer attention too.
        **kwargs: Arguments of :class:`mmpretrain.models.VisionTransformer`.

    Raises:
        ValueError: A group size below 1, an unknown layer attention, or ``head_channels`` that does
            not divide the width.
    """

    def __init__(
        self,
        *args: Any,
        layer_attention: Mapping[str, Any] | None = dict(type="MRLALight", head_channels=16),
        mrla_group_size: int = 4,
        mrla_drop_path_rate: float = 0.0,
        norm_cfg: Mapping[str, Any] = dict(type="LN", eps=1e-6),
        **kwargs: Any,
    ) -> None:
        if isinstance(mrla_group_size, bool) or not isinstance(mrla_group_size, int):
            raise TypeError(f"mrla_group_size must be an int, got {mrla_group_size!r}")
        if mrla_group_size < 1:
            raise ValueError(f"mrla_group_size must be at least 1, got {mrla_group_size}")
        super().__init__(*args, norm_cfg=norm_cfg, **kwargs)
        self.layer_attention = layer_attention
        self.mrla_group_size = mrla_group_size
        if layer_attention is not None:
            for layer in self.layers:
                # A child of its layer, so that what freezes or scales the layer does it to both.
                layer.mrla = LayerAttentionOnTokens(
                    layer_attention, self.embed_dims, norm_cfg, mrla_drop_path_rate
                )
        if self.frozen_stages > 0:
            self._freeze_stages()

    def init_weights(self) -> None:
        """As the ancestor's, or a warm start."""
        if not init_weights_warm(self):
            super().init_weights()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """As the ancestor's: a tuple with one output for each of ``out_indices``."""
        x, grid = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = x + resize_pos_embed(
            self.pos_embed,
            self.patch_resolution,
            grid,
            mode=self.interpolate_mode,
            num_extra_tokens=self.num_extra_tokens,
        )
        x = self.pre_norm(self.drop_after_pos(x))
        outs, state = [], None
        for i, layer in enumerate(self.layers):
            if i % self.mrla_group_size == 0:
                state = None
            shortcut, x = x, layer(x)
            if self.layer_attention is not None:
                x, state = layer.mrla(x, shortcut, grid, self.num_extra_tokens, state)
            if i == len(self.layers) - 1 and self.final_norm:
                x = self.ln1(x)
            if i in self.out_indices:
                outs.append(self._format_output(x, grid))
        return tuple(outs)
