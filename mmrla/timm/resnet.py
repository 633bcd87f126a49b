"""timm's ResNets with a layer attention after every residual layer.

Paper: Cross-Layer Retrospective Retrieving via Layer Attention, ICLR 2023,
https://openreview.net/forum?id=pvgEL1yS3Ql, section 4, Figure 2a and Figure 4.
"""

from __future__ import annotations

from typing import Any

from timm.layers import get_norm_layer
from timm.models import register_notrace_module
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from mmrla.layers.layer_attention import Carried
from mmrla.layers.norm import drop_path_scale, is_plain
from mmrla.timm.common import Config, LayerAttentionNetwork, build_attention, drop_path_of


class _LayerAttentionBlock:
    """A mixin before a residual block of timm: the layer attention comes after it.

    ``y = act(residual(x) + shortcut)``, then ``out = y + drop_path(bn_mrla(o_t))`` with
    ``(o_t, state) = mrla(y, shortcut, state)``. The last block of a stage gives ``out``, the others
    ``(out, state)``.
    """

    _last: int
    """Number of the last convolution, norm and activation."""

    def __init__(
        self, *args: Any, layer_attention: Config | None = None,
        mrla_drop_path_rate: float | None = None, device: Any = None, dtype: Any = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        where = {k: v for k, v in dict(device=device, dtype=dtype).items() if v is not None}
        super().__init__(*args, **where, **kwargs)
        self.mrla: Any = None
        self.mrla_last = False
        if layer_attention is None:
            return
        channels = getattr(self, f"conv{self._last}").out_channels
        norm = get_norm_layer(kwargs.get("norm_layer")) or nn.BatchNorm2d
        attention = build_attention(layer_attention, channels, "MRLAResNet", shares=True)
        self.mrla_drop_path = drop_path_of(mrla_drop_path_rate, self)
        self.mrla = attention.to(**where)
        self.bn_mrla = norm(channels, **where)

    def forward(self, x: Any) -> Any:
        """Map ``[B, C_in, H, W]``, or output and state of the stage's previous block."""
        state = None
        if isinstance(x, Carried):
            x, state = x
        z = self._before_last_norm(x)
        norm, act = getattr(self, f"bn{self._last}"), getattr(self, f"act{self._last}")
        shortcut = x if self.downsample is None else self.downsample(x)
        if self._fuses_tail(z, shortcut, norm, act):
            scale = drop_path_scale(self.mrla_drop_path, z)
            out, state = self.mrla.tail(z, shortcut, state, norm, self.bn_mrla, scale)
        else:
            out = norm(z)
            out = out if self.se is None else self.se(out)
            out = out if self.drop_path is None else self.drop_path(out)
            out += shortcut
            out = act(out)
            if self.mrla is not None:
                o, state = self.mrla(out, shortcut, state)
                out = out + self.mrla_drop_path(self.bn_mrla(o))
        return out if self.mrla is None or self.mrla_last else Carried(out, state)

    def start_as_identity(self) -> None:
        """Make the layer attention add zero; the norm's gamma has a gradient."""
        for parameter in self.bn_mrla.parameters() if self.mrla is not None else ():
            nn.init.zeros_(parameter)

    def _fuses_tail(self, z: Tensor, shortcut: Tensor, norm: nn.Module, act: nn.Module) -> bool:
        """Whether the block's end can run as one operation of the layer attention."""
        return (
            self.mrla is not None
            and self.se is None
            and self.drop_path is None
            and type(act) is nn.ReLU
            and is_plain(act, self.mrla_drop_path)
            and z.dtype == shortcut.dtype
            and self.mrla.fuses_tail(z, norm, self.bn_mrla)
        )


@register_notrace_module
class MRLABasicBlock(_LayerAttentionBlock, BasicBlock):
    """timm's basic block with a layer attention after it."""

    _last = 2

    def _before_last_norm(self, x: Tensor) -> Tensor:
        return self.conv2(self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x))))))


@register_notrace_module
class MRLABottleneck(_LayerAttentionBlock, Bottleneck):
    """timm's bottleneck with a layer attention after it."""

    _last = 3

    def _before_last_norm(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        return self.conv3(self.aa(self.act2(self.drop_block(self.bn2(self.conv2(x))))))


_BLOCKS = {BasicBlock: MRLABasicBlock, Bottleneck: MRLABottleneck}


class MRLAResNet(LayerAttentionNetwork, ResNet):
    """timm's ResNet with a layer attention after every residual layer.

    All timm arguments keep their meaning and also apply to the attention: ``norm_layer`` defines
    its norm, ``drop_path_rate`` drops it. The plain network's state-dict keys are unchanged; the
    added keys all contain ``mrla``, and are those of :class:`mmrla.models.MRLAResNet`.

    Args:
        block: timm's ``BasicBlock`` or ``Bottleneck``, or the classes here.
        layers: Blocks per stage. A stage is one group of layers.
        *args: As of timm's.
        layer_attention: A name of :mod:`mmrla.layers`, or ``dict(type=..., ...)`` with its
            arguments; None for the plain network.
        mrla_drop_path_rate: Stochastic depth of the attention branch, the same in all layers.
            Default None: the rate that ``drop_path_rate`` gives the layer.
        zero_init_mrla: Start as exactly the plain network: the norm after the attention outputs
            zeros. False: the initialisation of the released code, with the full attention.
        block_args: Of the blocks, as of timm's.
        **kwargs: As of timm's.

    Raises:
        TypeError: ``layer_attention`` is of the wrong type.
        ValueError: An unknown layer attention, one with another placement than after a layer, or
            invalid arguments; a block of another kind.

    Example:
        >>> import timm, torch
        >>> import mmrla.timm
        >>> backbone = timm.create_model('resnet18_mrla_light', features_only=True).eval()
        >>> [tuple(y.shape) for y in backbone(torch.rand(1, 3, 64, 96))]
        [(1, 64, 32, 48), (1, 64, 16, 24), (1, 128, 8, 12), (1, 256, 4, 6), (1, 512, 2, 3)]
    """

    def __init__(
        self, block: Any, layers: Any, *args: Any, layer_attention: Config | None = "MRLALight",
        mrla_drop_path_rate: float | None = None, zero_init_mrla: bool = True,
        block_args: dict[str, Any] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.zero_init_mrla = zero_init_mrla
        several = isinstance(block, (tuple, list))
        blocks = tuple(_BLOCKS.get(b, b) for b in (block if several else (block,)))
        for found in blocks:
            if not issubclass(found, _LayerAttentionBlock):
                raise ValueError(
                    f"block must be timm's BasicBlock or Bottleneck, got {found.__name__}, which "
                    "has no place for a layer attention"
                )
        block_args = {
            **(block_args or {}),
            "layer_attention": layer_attention,
            "mrla_drop_path_rate": mrla_drop_path_rate,
        }
        chosen: Any = blocks if several else blocks[0]
        super().__init__(chosen, layers, *args, block_args=block_args, **kwargs)
        for name, stage in self.named_children():
            if layer_attention is None or not name.startswith("layer"):
                continue
            blocks_of_stage: list[Any] = list(stage.children())
            for other in blocks_of_stage[1:]:
                other.mrla.share(blocks_of_stage[0].mrla)
            blocks_of_stage[-1].mrla_last = True
