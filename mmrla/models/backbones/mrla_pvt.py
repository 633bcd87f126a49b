"""PVTv2 with a layer attention after every block.

Network: PVTv2, https://arxiv.org/abs/2106.13797. Layer attention: Cross-Layer Retrospective
Retrieving via Layer Attention, ICLR 2023, https://openreview.net/forum?id=pvgEL1yS3Ql.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdet.models.backbones import PyramidVisionTransformer, PyramidVisionTransformerV2
from mmdet.models.layers import nlc_to_nchw
from mmengine.model import BaseModule
from torch import Tensor

from mmrla.layers.checks import check_count
from mmrla.models.arguments import check_arguments, check_token_norm
from mmrla.models.branches import LayerAttentionOnTokens
from mmrla.models.host import LayerAttentionHost, branch_rate, check_drop_path_rate
from mmrla.models.warm_start import load_backbone
from mmrla.registry import MODELS


@MODELS.register_module()
class MRLAPyramidVisionTransformerV2(LayerAttentionHost, PyramidVisionTransformerV2):
    """mmdet's PVTv2 with a layer attention after every block.

    State-dict keys of :class:`mmdet.models.PyramidVisionTransformerV2` are unchanged; the added
    keys all contain ``mrla``. There is no class token; a stage is one group of layers.

    Args:
        arch: ``'b0'``, ``'b1'``, ``'b2'``: sets ``embed_dims`` and ``num_layers``. Default None:
            both are given, or the ancestor's defaults.
        layer_attention: Config of the layer attention, None for the plain network. A GELU is
            applied to MRLA-light's value (Algorithm 4) unless ``value_act`` is set. Default:
            ``dict(type='MRLALight', head_channels=16)``.
        mrla_drop_path_rate: Stochastic depth of the attention branch. None: the block's own rate,
            as in the paper.
        norm_cfg: Of all norms, including those around the layer attention.
        **kwargs: Arguments of :class:`mmdet.models.PyramidVisionTransformerV2`.

    Raises:
        ValueError: An unknown ``arch``, a rate outside [0, 1), an unknown layer attention, or
            ``head_channels`` that does not divide a stage's width.

    Example:
        >>> import torch
        >>> from mmrla.models import MRLAPyramidVisionTransformerV2
        >>> backbone = MRLAPyramidVisionTransformerV2('b0').eval()
        >>> [tuple(y.shape) for y in backbone(torch.rand(1, 3, 64, 96))]
        [(1, 32, 16, 24), (1, 64, 8, 12), (1, 160, 4, 6), (1, 256, 2, 3)]
    """

    arch_settings = {
        "b0": dict(embed_dims=32, num_layers=(2, 2, 2, 2)),
        "b1": dict(embed_dims=64, num_layers=(2, 2, 2, 2)),
        "b2": dict(embed_dims=64, num_layers=(3, 4, 6, 3)),
    }

    def __init__(
        self, arch: str | None = None, *,
        layer_attention: Mapping[str, Any] | None = dict(type="MRLALight", head_channels=16),
        mrla_drop_path_rate: float | None = 0.0,
        norm_cfg: Mapping[str, Any] = dict(type="LN", eps=1e-6), **kwargs: Any,
    ) -> None:  # fmt: skip
        check_drop_path_rate(mrla_drop_path_rate)
        if arch is not None:
            if not isinstance(arch, str) or arch not in self.arch_settings:
                raise ValueError(f"arch must be one of {sorted(self.arch_settings)}, got {arch!r}")
            kwargs = {**self.arch_settings[arch], **kwargs}
        check_count("num_stages", stages := kwargs.get("num_stages", 4))
        check_token_norm(norm_cfg)
        check_arguments(PyramidVisionTransformer, kwargs, stages=stages, outputs=stages)
        super().__init__(
            layer_attention=layer_attention,
            norm_cfg=norm_cfg,
            **kwargs,
        )
        for (_, blocks, _), heads in zip(self.layers, self.num_heads, strict=True):
            for block in blocks:
                if layer_attention is None:
                    continue
                block.mrla = LayerAttentionOnTokens(
                    layer_attention,
                    self.embed_dims * heads,
                    norm_cfg,
                    branch_rate(mrla_drop_path_rate, block.ffn),
                )
        self._free_fresh_norms()
        self._freeze_unused_parameters()

    def _init_weights_cold(self) -> None:
        # The ancestor's reads only the authors' key names, and silently ignores all others; here
        # Pretrained takes any checkpoint that the converter knows.
        cfg = self.init_cfg
        if isinstance(cfg, Mapping) and cfg.get("type", "Pretrained") == "Pretrained":
            self._zero_init_mrla()
            load_backbone(self, cfg["checkpoint"])
            self.is_init = True
        elif cfg is None:
            super()._init_weights_cold()
        else:
            BaseModule.init_weights(self)
            self._zero_init_mrla()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map ``[B, 3, H, W]`` to one feature map for each of ``out_indices``."""
        outs = []
        for i, (patch_embed, blocks, norm) in enumerate(self.layers):
            x, grid = patch_embed(x)
            state = None
            for block in blocks:
                shortcut, x = x, block(x, grid)
                if self.layer_attention is not None:
                    x, state = block.mrla(x, shortcut, grid, 0, state)
            x = nlc_to_nchw(norm(x), grid)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)
