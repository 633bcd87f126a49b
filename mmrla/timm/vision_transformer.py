"""timm's ViT and DeiT with a layer attention after every block.

Paper: Cross-Layer Retrospective Retrieving via Layer Attention, ICLR 2023,
https://openreview.net/forum?id=pvgEL1yS3Ql, Algorithms 2 and 4; DeiT:
https://arxiv.org/abs/2012.12877.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from timm.layers import LayerNorm, get_norm_layer
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mmrla.layers.builder import TOKEN_DEFAULTS, check_added
from mmrla.layers.checks import check_count
from mmrla.layers.layer_attention import LayerAttention, start_as_identity
from mmrla.layers.token_branch import TokenBranch
from mmrla.timm.common import Config, LayerAttentionNetwork, build_attention, drop_path_of


class _LayerAttentionTransformer(LayerAttentionNetwork):
    """A mixin before a ViT of timm: a layer attention after each of its blocks."""

    _placement = "after"

    def __init__(
        self,
        *args: Any,
        layer_attention: Config | None = "MRLALight",
        mrla_group_size: int = 4,
        mrla_drop_path_rate: float | None = 0.0,
        zero_init_mrla: bool = True,
        **kwargs: Any,
    ) -> None:
        check_count("mrla_group_size", mrla_group_size)
        if kwargs.get("patch_drop_rate"):
            raise ValueError(
                f"patch_drop_rate must be 0, got {kwargs['patch_drop_rate']}: the tokens that are "
                "left make no map for the layer attention"
            )
        self.zero_init_mrla = zero_init_mrla
        super().__init__(*args, **kwargs)
        self.mrla_group_size = mrla_group_size
        if layer_attention is None:
            return
        where = {k: kwargs[k] for k in ("device", "dtype") if kwargs.get(k) is not None}
        norm = get_norm_layer(kwargs.get("norm_layer")) or LayerNorm
        sublayers = ("sublayer",) * all(isinstance(block, Block) for block in self.blocks)

        def attention_at(index: int) -> LayerAttention:
            return build_attention(
                layer_attention, self.embed_dim, type(self).__name__, shares=False,
                defaults=TOKEN_DEFAULTS, placements=("after", "output", *sublayers), index=index,
            )  # fmt: skip

        for i, block in enumerate(self.blocks):
            attention = attention_at(i)
            part: nn.Module = attention
            self._placement = attention.placement
            check_added(type(attention), mrla_drop_path_rate)
            rate = drop_path_of(mrla_drop_path_rate, block)
            if self._placement == "after":
                part = TokenBranch(attention, lambda: norm(self.embed_dim), rate)
            elif self._placement == "sublayer":
                part = nn.ModuleDict(dict(attn=attention_at(2 * i), ffn=attention_at(2 * i + 1)))
            # A child of its block, so that what freezes or scales the block does it to both.
            block.mrla = part.to(**where)
        if self.zero_init_mrla:
            start_as_identity(self)

    def _run_block(
        self, block: Any, x: Tensor, state: Any, grid: tuple[int, int], options: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        if self._placement == "sublayer":
            out = block.drop_path1(block.ls1(block.attn(block.norm1(x), **options)))
            x, state = block.mrla.attn(out, x, state)
            out = block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
            return block.mrla.ffn(out, x, state)
        out = block(x, **options)
        if not hasattr(block, "mrla"):
            return out, None
        if self._placement == "output":
            return block.mrla(out, x, state)
        return block.mrla(out, x, grid, self.num_prefix_tokens, state)

    def _run(
        self, images: Tensor, attn_mask: Tensor | None, is_causal: bool,
        take: Collection[int] = (), last: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """Embed images and run the blocks up to index ``last``.

        Returns:
            The last block's output and those of blocks ``take``, each ``[B, tokens, C]``.
        """
        grid = self.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(images))))
        options: dict[str, Any] = {}
        if attn_mask is not None or is_causal:
            options = dict(attn_mask=attn_mask)
            if is_causal:
                options["is_causal"] = True
        taken, state = [], None
        for i, block in enumerate(self.blocks if last is None else self.blocks[: last + 1]):
            if i % self.mrla_group_size == 0 and self._placement == "after":
                state = None
            if self.grad_checkpointing and not options:  # timm does not with a mask
                x, state = checkpoint(self._run_block, block, x, state, grid, options)
            else:
                x, state = self._run_block(block, x, state, grid, options)
            if i in take:
                taken.append(x)
        return x, taken

    def forward_features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """As timm's: map images ``[B, in_chans, H, W]`` to normed tokens ``[B, tokens, C]``."""
        return self.norm(self._run(x, attn_mask, is_causal)[0])

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """As timm's: outputs of blocks, with the layer attention.

        Raises:
            ValueError: ``output_fmt`` is neither ``'NCHW'`` nor ``'NLC'``.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take, most = feature_take_indices(len(self.blocks), indices)
        height, width = x.shape[-2:]
        x, found = self._run(x, attn_mask, is_causal, take, most if stop_early else None)
        found = [self.norm(y) for y in found] if norm else found
        prefixes = [y[:, : self.num_prefix_tokens] for y in found]
        found = [y[:, self.num_prefix_tokens :] for y in found]
        if output_fmt == "NCHW":
            grid = self.patch_embed.dynamic_feat_size((height, width))
            found = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in found]
        has_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result: dict[str, Any] = dict(image_intermediates=found)
            if has_prefix:
                result["image_intermediates_prefix"] = prefixes
            if not intermediates_only:
                result["image_features"] = self.norm(x)
            return result
        outs: Any = list(zip(found, prefixes, strict=True)) if has_prefix else found
        return outs if intermediates_only else (self.norm(x), outs)


class MRLAVisionTransformer(_LayerAttentionTransformer, VisionTransformer):
    """timm's ViT (DeiT) with a layer attention after every block.

    Arguments and state-dict keys of timm's are unchanged; the added keys all contain ``mrla``.
    Class, distillation and register tokens bypass the layer attention.

    Args:
        *args: As of timm's.
        layer_attention: A name of :mod:`mmrla.layers`, or ``dict(type=..., ...)`` with its
            arguments, of a type whose layers share no parts; None for the plain network. By default
            16 channels per head, and a GELU for MRLA-light's value (Algorithm 4). AttnRes needs
            timm's own ``Block`` (``block_fn``).
        mrla_group_size: Blocks 0, g, 2g, ... begin a new group.
        mrla_drop_path_rate: Stochastic depth of the attention branch. Default 0, as released;
            None: the block's own rate.
        zero_init_mrla: Start as exactly the plain network: the norms around the attention output
            zeros. False: the initialisation of the released code, with the full attention.
        **kwargs: As of timm's, without ``patch_drop_rate``.

    Raises:
        TypeError: ``layer_attention`` is of the wrong type, or the group size is not an int.
        ValueError: An unknown or unsupported layer attention, or invalid arguments; a group size
            below 1; a ``patch_drop_rate``.

    Example:
        >>> import timm, torch
        >>> import mmrla.timm
        >>> model = timm.create_model('deit_tiny_patch16_224_mrla_light', img_size=(32, 48)).eval()
        >>> tuple(model(torch.rand(1, 3, 32, 48)).shape)
        (1, 1000)
    """


class MRLAVisionTransformerDistilled(_LayerAttentionTransformer, VisionTransformerDistilled):
    """timm's DeiT with a distillation token, and a layer attention after every block.

    Args:
        *args: As in :class:`MRLAVisionTransformer`.
        **kwargs: As in :class:`MRLAVisionTransformer`.
    """
