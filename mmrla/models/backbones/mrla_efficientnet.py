"""EfficientNet with a layer attention after every MBConv layer that has a shortcut.

Network: EfficientNet, ICML 2019, https://arxiv.org/abs/1905.11946; Lite0:
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite. Layer attention:
Cross-Layer Retrospective Retrieving via Layer Attention, ICLR 2023,
https://openreview.net/forum?id=pvgEL1yS3Ql.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mmpretrain.models.backbones import EfficientNet
from mmpretrain.models.utils import InvertedResidual
from torch import Tensor, nn

from mmrla.models.arguments import check_arguments
from mmrla.models.branches import LayerAttentionOnMap
from mmrla.models.host import LayerAttentionHost, branch_rate, check_drop_path_rate
from mmrla.registry import MODELS


@MODELS.register_module()
class MRLAEfficientNet(LayerAttentionHost, EfficientNet):
    """mmpretrain's EfficientNet with a layer attention after every MBConv layer with a shortcut.

    Arguments and state-dict keys of :class:`mmpretrain.models.EfficientNet` are unchanged; the
    added keys all contain ``mrla``. A group of layers is a stage: each layer without a shortcut,
    which changes size or width, begins a new one.

    ``arch='lite0'`` is EfficientNet-Lite0, which the ancestor lacks: B0 without
    squeeze-and-excitation, and with ReLU6 where ``act_cfg`` is not given. Like the others it pads
    by SAME and has norms of eps 1e-3. Its images are normalised by ``(x - 127) / 128``.

    Args:
        arch: ``'b0'``, ``'b1'`` or any other of the ancestor's, or ``'lite0'``.
        layer_attention: Config of the layer attention, None for the plain network.
            Default: ``dict(type='MRLALight', head_channels=8)``.
        mrla_drop_path_rate: Stochastic depth of the attention branch. None: the layer's own rate,
            as in the paper.
        **kwargs: Arguments of :class:`mmpretrain.models.EfficientNet`.

    Raises:
        ValueError: A rate outside [0, 1), an unknown layer attention, or ``head_channels`` that
            does not divide a stage's width.

    Example:
        >>> import torch
        >>> from mmrla.models import MRLAEfficientNet
        >>> backbone = MRLAEfficientNet('b0', out_indices=(2, 3, 4, 5)).eval()
        >>> [tuple(y.shape) for y in backbone(torch.rand(1, 3, 64, 96))]
        [(1, 24, 16, 24), (1, 40, 8, 12), (1, 112, 4, 6), (1, 320, 2, 3)]
    """

    # The ancestor looks layers up by the first letter of the architecture.
    layer_settings = {
        **EfficientNet.layer_settings,
        "l": [
            [
                [kernel, width, 0, stride, expansion, kind]
                for kernel, width, _, stride, expansion, kind in stage
            ]
            for stage in EfficientNet.layer_settings["b"]
        ],
    }
    arch_settings = {**EfficientNet.arch_settings, "lite0": (1.0, 1.0, 224)}

    def __init__(
        self,
        *args: Any,
        layer_attention: Mapping[str, Any] | None = dict(type="MRLALight", head_channels=8),
        mrla_drop_path_rate: float | None = 0.0,
        **kwargs: Any,
    ) -> None:
        check_drop_path_rate(mrla_drop_path_rate)
        given = {**dict(zip(("arch", "drop_path_rate"), args, strict=False)), **kwargs}
        arch = given.get("arch", "b0")
        if not isinstance(arch, str) or arch not in self.arch_settings:
            raise ValueError(f"arch must be one of {sorted(self.arch_settings)}, got {arch!r}")
        check_arguments(EfficientNet, given, outputs=7, frozen=6)
        if arch == "lite0":
            kwargs.setdefault("act_cfg", dict(type="ReLU6"))
        super().__init__(*args, layer_attention=layer_attention, **kwargs)
        for block in self._blocks():
            if layer_attention is not None and _has_shortcut(block):
                block.mrla = LayerAttentionOnMap(
                    layer_attention, _out_channels(block), self.norm_cfg,
                    branch_rate(mrla_drop_path_rate, block), self.with_cp,
                )  # fmt: skip
        self._free_fresh_norms()
        self._freeze_unused_parameters()

    def _blocks(self) -> Iterator[nn.Module]:
        for stage in self.layers[1:-1]:
            yield from stage

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map ``[B, 3, H, W]`` to one feature map for each of ``out_indices``."""
        outs = []
        for i, layer in enumerate(self.layers):
            if 0 < i < len(self.layers) - 1:
                state = None
                for block in layer:
                    shortcut, x = x, block(x)
                    if hasattr(block, "mrla"):
                        x, state = block.mrla(x, shortcut, state)
                    else:
                        state = None
            else:
                x = layer(x)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)


def _has_shortcut(block: Any) -> bool:
    # Edge blocks, of the variants for the EdgeTPU, have another name for it.
    return block.with_res_shortcut if isinstance(block, InvertedResidual) else block.with_residual


def _out_channels(block: Any) -> int:
    return (block.linear_conv if isinstance(block, InvertedResidual) else block.conv2).out_channels
