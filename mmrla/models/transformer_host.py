"""Behaviour common to hosts made of transformer blocks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from math import isqrt
from typing import Any

from mmcv.cnn.bricks import DropPath
from mmpretrain.models.utils import resize_pos_embed
from torch import Tensor, nn

from mmrla.layers.builder import check_added
from mmrla.layers.checks import check_count
from mmrla.models.arguments import check_arch, check_arguments, check_patches, check_token_norm
from mmrla.models.branches import LayerAttentionOnTokens
from mmrla.models.builder import build_layer_attention, layer_attention_class
from mmrla.models.host import LayerAttentionHost, branch_rate, check_drop_path_rate

_NORM_CFG: Mapping[str, Any] = dict(type="LN", eps=1e-6)


def check_transformer(host: Any, given: Mapping[str, Any], norm_cfg: Any) -> None:
    """Raise TypeError or ValueError, naming the argument, if one of a ViT is invalid."""
    defaults = {
        name: parameter.default
        for cls in reversed(host.__mro__)
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if parameter.default is not parameter.empty
    }
    arch = given.get("arch", defaults["arch"])
    check_arch(arch, host.arch_zoo)
    check_token_norm(norm_cfg)
    layers = (host.arch_zoo[arch.lower()] if isinstance(arch, str) else arch)["num_layers"]
    check_arguments(
        host, {**given, "norm_cfg": norm_cfg}, outputs=layers, frozen=layers, negative_outputs=True
    )
    patch_size = given.get("patch_size", defaults["patch_size"])
    check_patches(given.get("img_size", defaults["img_size"]), patch_size)


def add_positions(vit: Any, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens with a ViT's position embedding, resized to their grid, after dropout."""
    positions = resize_pos_embed(
        vit.pos_embed, vit.patch_resolution, grid, vit.interpolate_mode, vit.num_extra_tokens
    )
    return vit.drop_after_pos(x + positions)


class LayerAttentionTransformer(LayerAttentionHost):
    """A mixin before a ViT of mmpretrain: a layer attention after each of its blocks.

    There are no norms and no stochastic depth around a type that replaces a block's output
    (``placement = 'output'``) or comes after each sub-layer, in hosts that support this placement;
    for both, the whole network is one group.

    Args:
        layer_attention: Config of the layer attention, None for the plain network.
        mrla_group_size: Blocks 0, g, 2g, ... begin a new group.
        mrla_drop_path_rate: Stochastic depth of the attention branch; None: the block's own.
        norm_cfg: Of all norms, including those around the layer attention.
        **kwargs: The ancestor's.

    Raises:
        TypeError: A group size that is not an int.
        ValueError: A group size below 1, a rate outside [0, 1), or one for a type that adds
            nothing to a block; an unknown layer attention, one that this host does not support, or
            ``head_channels`` that does not divide the width.
    """

    placements: tuple[str, ...] = ("after", "output")

    def __init__(
        self,
        *args: Any,
        layer_attention: Mapping[str, Any] | None = None,
        mrla_group_size: int = 4,
        mrla_drop_path_rate: float | None = 0.0,
        norm_cfg: Mapping[str, Any] = _NORM_CFG,
        **kwargs: Any,
    ) -> None:
        check_count("mrla_group_size", mrla_group_size)
        check_drop_path_rate(mrla_drop_path_rate)
        given = {**dict(zip(("arch", "img_size"), args, strict=False)), **kwargs}
        check_transformer(type(self), given, norm_cfg)
        super().__init__(*args, layer_attention=layer_attention, norm_cfg=norm_cfg, **kwargs)
        self.mrla_group_size = mrla_group_size
        for part in self.modules():
            if isinstance(part, DropPath):
                part.drop_prob = float(part.drop_prob)  # numpy's, which torch.compile cannot follow
        if layer_attention is not None:
            self._kind = layer_attention_class(layer_attention)
            check_added(self._kind, mrla_drop_path_rate)
            for index, layer in enumerate(self.layers):
                rate = branch_rate(mrla_drop_path_rate, layer.ffn)
                # A child of its layer, so that what freezes or scales the layer does it to both.
                layer.mrla = self._build_mrla(index, layer, norm_cfg, rate)
        self._free_fresh_norms()
        if self.frozen_stages > 0:
            self._freeze_stages()
        self._freeze_unused_parameters()

    def _build_mrla(self, index: int, layer: Any, norm_cfg: Any, rate: float) -> nn.Module:
        cfg: Any = self.layer_attention
        channels = self.embed_dims
        if self._kind.placement == "after":
            return LayerAttentionOnTokens(cfg, channels, norm_cfg, rate)
        if self._kind.placement == "output":
            return build_layer_attention(cfg, channels, index=index)
        layer.ffn.add_identity = False  # the attention takes the addition's place
        return nn.ModuleDict({
            name: build_layer_attention(cfg, channels, index=2 * index + i)
            for i, name in enumerate(("attn", "ffn"))
        })  # fmt: skip

    def run_layer(
        self, index: int, x: Tensor, grid: tuple[int, int], state: Any
    ) -> tuple[Tensor, Any]:
        """Output of block ``index`` and its layer attention for ``x``, and the state."""
        layer = self.layers[index]
        if self.layer_attention is None or self._kind.placement != "sublayer":
            return self.attend(index, layer(x), x, grid, state)
        x, state = layer.mrla.attn(layer.attn(layer.ln1(x)), x, state)
        return layer.mrla.ffn(layer.ffn(layer.ln2(x)), x, state)

    def attend(
        self, index: int, x: Tensor, shortcut: Tensor, grid: tuple[int, int], state: Any
    ) -> tuple[Tensor, Any]:
        """Output of the layer attention for ``x``, the output of block ``index``, and the state."""
        if self.layer_attention is None:
            return x, None
        if self._kind.placement == "output":
            return self.layers[index].mrla(x, shortcut, state)
        if index % self.mrla_group_size == 0:
            state = None
        return self.layers[index].mrla(x, shortcut, grid, self.num_extra_tokens, state)

    def fit_pos_embed(self, saved: Tensor) -> Tensor:
        """Resize a checkpoint's position embedding to this network's grid of patches.

        Args:
            saved: ``[1, tokens, C]``: extra tokens (class, distillation), then a square grid, or
                this network's own layout.

        Returns:
            ``[1, extra + H*W, C]``, resized by ``interpolate_mode``.

        Raises:
            ValueError: The tokens are not those of this network's extra tokens and a square grid.
        """
        own = self.pos_embed.shape
        if saved.dim() != 3 or saved.shape == own or saved.shape[2] != own[2]:
            return saved
        tokens, extra = saved.shape[1], self.num_extra_tokens
        if extra == 0 and isqrt(tokens - 1) ** 2 == tokens - 1:
            # A class token that this network does without, as in mmpretrain.
            saved, tokens = saved[:, 1:], tokens - 1
        side = isqrt(max(tokens - extra, 0))
        if side == 0 or side * side != tokens - extra:
            height, width = self.patch_resolution
            raise ValueError(
                f"the checkpoint's position embedding has {tokens} tokens; without {extra} extra "
                f"(class, distillation) that leaves {tokens - extra}, which make no square grid "
                "and cannot be resized. "
                f"This network has {own[1]} = {extra} + {height} x {width}"
            )
        return resize_pos_embed(
            saved, (side, side), self.patch_resolution, self.interpolate_mode, extra
        )

    def _prepare_pos_embed(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        name = f"{prefix}pos_embed"
        if name in state_dict:
            state_dict[name] = self.fit_pos_embed(state_dict[name])
