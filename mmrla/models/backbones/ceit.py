"""CeiT: a vision transformer with convolutional stem and feed-forward, plain and with MRLA.

Network: Incorporating Convolution Designs into Visual Transformers, ICCV 2021,
https://arxiv.org/abs/2103.11816. Layer attention: Cross-Layer Retrospective Retrieving via Layer
Attention, ICLR 2023, https://openreview.net/forum?id=pvgEL1yS3Ql.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.model import BaseModule, ModuleList
from mmengine.model.weight_init import trunc_normal_
from mmpretrain.models.backbones import VisionTransformer
from mmpretrain.models.backbones.vision_transformer import TransformerEncoderLayer
from mmpretrain.models.utils import to_2tuple
from torch import Tensor, nn

from mmrla.layers.token_branch import to_map
from mmrla.models.branches import build_drop_path
from mmrla.models.transformer_host import LayerAttentionTransformer, add_positions
from mmrla.models.warm_start import init_weights_warm
from mmrla.registry import MODELS


class ImageToTokensStem(BaseModule):
    """The convolutional half of Image-to-Tokens (Eq. 3): ``MaxPool(BN(Conv7x7(x)))``, stride 4."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_channels, H, W]`` to ``[B, channels, ceil(H/4), ceil(W/4)]``."""
        return self.pool(self.bn(self.conv(x)))


class LocallyEnhancedFeedForward(BaseModule):
    """LeFF (section 3.3): the feed-forward on the map of patches, with a depthwise convolution.

    ``Conv1x1, BN, GELU, DWConv3x3, BN, GELU, Conv1x1, BN``; extra tokens pass through.
    """

    def __init__(self, embed_dims: int, hidden_channels: int, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(embed_dims, hidden_channels, 1)
        self.bn1 = nn.BatchNorm2d(hidden_channels)
        self.conv2 = nn.Conv2d(
            hidden_channels, hidden_channels, 3, padding=1, groups=hidden_channels
        )
        self.bn2 = nn.BatchNorm2d(hidden_channels)
        self.conv3 = nn.Conv2d(hidden_channels, embed_dims, 1)
        self.bn3 = nn.BatchNorm2d(embed_dims)
        self.act = nn.GELU()
        self.drop_path = build_drop_path(drop_path_rate)

    def forward(self, x: Tensor, grid: tuple[int, int], extra: int, identity: Tensor) -> Tensor:
        """Map tokens ``[B, extra + H*W, C]`` and add ``identity``, which has their shape."""
        patches = to_map(x, grid, extra)
        patches = self.act(self.bn1(self.conv1(patches)))
        patches = self.act(self.bn2(self.conv2(patches)))
        patches = self.bn3(self.conv3(patches))
        # In this order: after flatten(2).transpose(1, 2) the gradient of a batch of one would have
        # strides that torch on the CPU misreads in the backward of a batch norm in evaluation.
        tokens = torch.cat([x[:, :extra], patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
        return identity + self.drop_path(tokens)


class CeiTEncoderLayer(TransformerEncoderLayer):
    """mmpretrain's encoder layer with a locally enhanced feed-forward."""

    def __init__(
        self, embed_dims: int, num_heads: int, feedforward_channels: int,
        drop_path_rate: float = 0.0, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            embed_dims, num_heads, feedforward_channels, drop_path_rate=drop_path_rate, **kwargs
        )
        self.ffn = LocallyEnhancedFeedForward(embed_dims, feedforward_channels, drop_path_rate)

    def forward(self, x: Tensor, grid: tuple[int, int], extra: int) -> Tensor:
        """Map tokens ``[B, extra + H*W, C]``."""
        x = x + self.attn(self.ln1(x))
        return self.ffn(self.ln2(x), grid, extra, identity=x)


class LayerwiseClassTokenAttention(TransformerEncoderLayer):
    """LCA (section 3.4): the last layer's class token attends to the class tokens of all layers."""

    def __init__(self, num_layers: int, embed_dims: int, **kwargs: Any) -> None:
        super().__init__(embed_dims=embed_dims, **kwargs)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_layers, embed_dims))

    def forward(self, class_tokens: Tensor) -> Tensor:
        """Map ``[B, L, C]`` to ``[B, 1, C]``."""
        x = class_tokens + self.pos_embed
        # Each query is independent of the others, so all of them are as good as the last one.
        last = x[:, -1:] + self.attn(self.ln1(x))[:, -1:]
        return self.ffn(self.ln2(last), identity=last)


@MODELS.register_module()
class CeiT(VisionTransformer):
    """CeiT, based on mmpretrain's VisionTransformer, whose arguments keep their meaning.

    Image-to-tokens stem, locally enhanced feed-forward, layer-wise class-token attention.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, or a dict as in the ancestor.
        img_size: The usual size of images; other sizes work too.
        patch_size: Of the patches on the stem's map, whose stride is 4.
        in_channels: Channels of the image.
        stem_channels: Channels of the stem's map.
        out_type: As in the ancestor. ``'cls_token'``: the result of the layer-wise class-token
            attention at the last layer, the class token at earlier layers. Any other type disables
            the layer-wise attention.
        norm_cfg: Of the LayerNorms.
        **kwargs: Arguments of :class:`mmpretrain.models.VisionTransformer`, except
            ``with_cls_token``, ``pre_norm``, ``layer_scale_init_value``, ``patch_cfg`` and
            ``layer_cfgs``.

    Raises:
        ValueError: An unknown ``arch``, or an argument that CeiT does not support.

    Example:
        >>> import torch
        >>> from mmrla.models import CeiT
        >>> [tuple(y.shape) for y in CeiT('tiny').eval()(torch.rand(1, 3, 224, 160))]
        [(1, 192)]
    """

    arch_zoo = {
        name: dict(
            embed_dims=width, num_layers=12, num_heads=width // 64, feedforward_channels=4 * width
        )
        for name, width in (("tiny", 192), ("small", 384), ("base", 768))
    }

    # Arguments of the ancestor with the values that CeiT can have, if any.
    _FIXED: dict[str, tuple] = {
        "with_cls_token": (True,), "pre_norm": (False,), "layer_scale_init_value": (0,),
        "patch_cfg": (), "layer_cfgs": (),
    }  # fmt: skip

    def __init__(
        self, arch: str | dict = "tiny", img_size: int | tuple[int, int] = 224, patch_size: int = 4,
        in_channels: int = 3, stem_channels: int = 64, drop_rate: float = 0.0,
        drop_path_rate: float = 0.0, qkv_bias: bool = True, out_type: str = "cls_token",
        norm_cfg: Mapping[str, Any] = dict(type="LN", eps=1e-6), **kwargs: Any,
    ) -> None:  # fmt: skip
        for name, allowed in self._FIXED.items():
            if name in kwargs and (got := kwargs.pop(name)) not in allowed:
                raise ValueError(f"CeiT has no {name}, got {name}={got!r}")
        if isinstance(arch, str) and arch not in self.arch_zoo:
            raise ValueError(f"arch must be one of {sorted(self.arch_zoo)}, got {arch!r}")
        # Of convolution and pooling, both of stride 2.
        size = tuple(-(-side // 4) for side in to_2tuple(img_size))
        super().__init__(
            arch=arch, img_size=img_size, patch_size=patch_size, drop_rate=drop_rate,
            drop_path_rate=drop_path_rate, qkv_bias=qkv_bias, out_type=out_type, norm_cfg=norm_cfg,
            patch_cfg=dict(in_channels=stem_channels, input_size=size), **kwargs,
        )  # fmt: skip
        self.stem = ImageToTokensStem(in_channels, stem_channels)
        common = dict(
            embed_dims=self.embed_dims, num_heads=self.arch_settings["num_heads"],
            feedforward_channels=self.arch_settings["feedforward_channels"], drop_rate=drop_rate,
            qkv_bias=qkv_bias, norm_cfg=norm_cfg,
        )  # fmt: skip
        rates = torch.linspace(0, drop_path_rate, self.num_layers).tolist()
        self.layers = ModuleList(CeiTEncoderLayer(drop_path_rate=rate, **common) for rate in rates)
        self.lca = None
        if out_type == "cls_token":
            self.lca = LayerwiseClassTokenAttention(self.num_layers, **common)
        if self.frozen_stages > 0:
            self._freeze_stages()

    def init_weights(self) -> None:
        """As the ancestor's, or a warm start; the layers' position embedding starts at zero."""
        if init_weights_warm(self):
            return
        super().init_weights()
        cfg = self.init_cfg
        if not (isinstance(cfg, Mapping) and cfg.get("type") == "Pretrained"):
            trunc_normal_(self.cls_token, std=0.02)

    def train(self, mode: bool = True) -> CeiT:
        """Frozen stages stay in evaluation mode, so their batch norms do not change."""
        super().train(mode)
        if mode and self.frozen_stages > 0:
            self._freeze_stages()
        return self

    def attend(
        self, index: int, x: Tensor, shortcut: Tensor, grid: tuple[int, int], state: Any
    ) -> tuple[Tensor, Any]:
        """Apply what follows a layer; nothing in the plain network."""
        return x, state

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map images ``[B, in_channels, H, W]`` to one output for each of ``out_indices``."""
        x, grid = self.patch_embed(self.stem(x))
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = add_positions(self, x, grid)
        outs, class_tokens, state = [], [], None
        for i, layer in enumerate(self.layers):
            x, state = self.attend(i, layer(x, grid, self.num_extra_tokens), x, grid, state)
            class_tokens.append(x[:, :1])
            if i == len(self.layers) - 1:
                if self.lca is not None:
                    x = self.lca(torch.cat(class_tokens, dim=1))
                if self.final_norm:
                    x = self.ln1(x)
            if i in self.out_indices:
                outs.append(self._format_output(x, grid))
        return tuple(outs)

    def _freeze_stages(self) -> None:
        super()._freeze_stages()
        # The ancestor's constructor comes before these; the last belongs to the final norm.
        parts = [getattr(self, "stem", None)]
        if self.frozen_stages == self.num_layers:
            parts.append(getattr(self, "lca", None))
        for part in parts:
            if part is not None:
                part.eval()
                for parameter in part.parameters():
                    parameter.requires_grad = False


@MODELS.register_module()
class MRLACeiT(LayerAttentionTransformer, CeiT):
    """CeiT with a layer attention after every block.

    State-dict keys of :class:`CeiT` are unchanged; the added keys all contain ``mrla``.

    Args:
        layer_attention: As in :class:`MRLAVisionTransformer`.
        mrla_group_size: Blocks 0, g, 2g, ... begin a new group. Default 4.
        mrla_drop_path_rate: Stochastic depth of the attention branch; None: the block's own rate.
        **kwargs: Arguments of :class:`CeiT`.

    Raises:
        TypeError: As :class:`MRLAVisionTransformer`.
        ValueError: As :class:`MRLAVisionTransformer` and :class:`CeiT`.
    """

    def __init__(
        self,
        *args: Any,
        layer_attention: Mapping[str, Any] | None = dict(type="MRLALight", head_channels=16),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, layer_attention=layer_attention, **kwargs)
