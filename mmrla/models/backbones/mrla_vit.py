"""Vision transformers with a layer attention after every block.

Paper: Cross-Layer Retrospective Retrieving via Layer Attention, ICLR 2023,
https://openreview.net/forum?id=pvgEL1yS3Ql, Algorithms 2 and 4; DeiT:
https://arxiv.org/abs/2012.12877.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mmpretrain.models.backbones import DistilledVisionTransformer, VisionTransformer
from torch import Tensor, nn

from mmrla.models.transformer_host import LayerAttentionTransformer, add_positions
from mmrla.registry import MODELS


@MODELS.register_module()
class MRLAVisionTransformer(LayerAttentionTransformer, VisionTransformer):
    """mmpretrain's ViT (DeiT) with a layer attention after every block.

    Arguments and state-dict keys of :class:`mmpretrain.models.VisionTransformer` are unchanged;
    the added keys all contain ``mrla``. With ``out_type='featmap'`` it is a detector's backbone.

    Args:
        layer_attention: Config of the layer attention, None for the plain network. A GELU is
            applied to MRLA-light's value (Algorithm 4) unless ``value_act`` is set. Default:
            ``dict(type='MRLALight', head_channels=16)``.
        mrla_group_size: Blocks 0, g, 2g, ... begin a new group. Default 4.
        mrla_drop_path_rate: Stochastic depth of the attention branch, 0 as released; None: the
            block's own rate, as in the paper.
        norm_cfg: Of all norms, including those around the layer attention.
        **kwargs: Arguments of :class:`mmpretrain.models.VisionTransformer`.

    Raises:
        TypeError: A group size that is not an int.
        ValueError: A group size below 1, an unknown layer attention, ``head_channels`` that does
            not divide the width, or a checkpoint whose position embedding is not this network's
            extra tokens followed by a square grid.

    Example:
        >>> import torch
        >>> from mmrla.models import MRLAVisionTransformer
        >>> backbone = MRLAVisionTransformer('deit-tiny', out_type='featmap').eval()
        >>> [tuple(y.shape) for y in backbone(torch.rand(1, 3, 224, 160))]
        [(1, 192, 14, 10)]
    """

    placements = ("after", "output", "sublayer")

    def __init__(
        self,
        *args: Any,
        layer_attention: Mapping[str, Any] | None = dict(type="MRLALight", head_channels=16),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, layer_attention=layer_attention, **kwargs)

    def _extra_tokens(self) -> list[nn.Parameter]:
        return [] if self.cls_token is None else [self.cls_token]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """As the ancestor's: a tuple with one output for each of ``out_indices``."""
        x, grid = self.patch_embed(x)
        extra = [token.expand(len(x), -1, -1) for token in self._extra_tokens()]
        x = torch.cat((*extra, x), dim=1)
        x = self.pre_norm(add_positions(self, x, grid))
        outs, state = [], None
        for i in range(len(self.layers)):
            x, state = self.run_layer(i, x, grid, state)
            if i == len(self.layers) - 1 and self.final_norm:
                x = self.ln1(x)
            if i in self.out_indices:
                outs.append(self._format_output(x, grid))
        return tuple(outs)


@MODELS.register_module()
class MRLADistilledVisionTransformer(MRLAVisionTransformer, DistilledVisionTransformer):
    """mmpretrain's DeiT with a distillation token, and a layer attention after every block.

    Class and distillation tokens bypass the layer attention. State-dict keys of
    :class:`mmpretrain.models.DistilledVisionTransformer` are unchanged.

    Args:
        **kwargs: As in :class:`MRLAVisionTransformer`; there is always a class token.

    Raises:
        TypeError: As :class:`MRLAVisionTransformer`.
        ValueError: As :class:`MRLAVisionTransformer`.
    """

    def __init__(self, arch: str | dict = "deit-base", *args: Any, **kwargs: Any) -> None:
        if not kwargs.pop("with_cls_token", True):
            raise ValueError(
                "a distilled transformer has a class token, got with_cls_token=False; without it "
                "there are no extra tokens: take MRLAVisionTransformer"
            )
        super().__init__(arch, *args, **kwargs)

    def _extra_tokens(self) -> list[nn.Parameter]:
        return [self.cls_token, self.dist_token]

    def _freeze_stages(self) -> None:
        super()._freeze_stages()
        # The ancestor freezes before it has this token.
        token = getattr(self, "dist_token", None)
        if token is not None:
            token.requires_grad = False
