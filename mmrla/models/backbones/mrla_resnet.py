"""ResNet with a layer attention after every residual layer.

Paper: Cross-Layer Retrospective Retrieving via Layer Attention, ICLR 2023,
https://openreview.net/forum?id=pvgEL1yS3Ql, section 4, Figure 2a and Figure 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint as cp
from mmcv.cnn import build_activation_layer, build_norm_layer
from mmpretrain.models.backbones import ResNet
from mmpretrain.models.backbones.resnet import BasicBlock, Bottleneck, ResLayer
from torch import Tensor, nn

from mmrla.layers.checks import check_count
from mmrla.layers.layer_attention import OpenReLU
from mmrla.layers.norm import drop_path_scale, is_plain
from mmrla.models.arguments import check_arguments, name_arguments_in_errors
from mmrla.models.branches import build_drop_path
from mmrla.models.builder import build_layer_attention
from mmrla.models.host import LayerAttentionHost, check_drop_path_rate
from mmrla.models.plugins import PluginBlock, check_plugins, plugins_of_block, plugins_of_stage
from mmrla.registry import MODELS


class LayerAttentionBlock(PluginBlock):
    """Adds a layer attention after a residual block of mmpretrain; a mixin before that class.

    ``y = ReLU(residual(x) + shortcut)``, then ``out = y + drop_path(norm(o_t))`` with
    ``(o_t, state) = layer_attention(y, shortcut, state)``. A layer attention on the residual branch
    replaces its output: ``y = ReLU(drop_path(o_t) + shortcut)`` with
    ``(o_t, state) = layer_attention(residual(x), shortcut, state)``.

    Args:
        layer_attention: Config of the layer attention, or None for the plain block.
        mrla_drop_path_rate: Stochastic depth of the attention branch; None: the block's own rate.
        mrla_act_cfg: Activation between the norm and drop path, None for none.
        mrla_fit_heads: See :func:`mmrla.models.build_layer_attention`.
    """

    def __init__(
        self, *args: Any, layer_attention: Mapping[str, Any] | None = None,
        mrla_drop_path_rate: float | None = None, mrla_act_cfg: dict | None = None,
        mrla_fit_heads: bool = False, drop_path_rate: float = 0.0, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, drop_path_rate=drop_path_rate, **kwargs)  # type: ignore[call-arg]
        self.mrla = None
        if layer_attention is None:
            return
        self.mrla = build_layer_attention(
            layer_attention, self.out_channels, fit_heads=mrla_fit_heads
        )
        if self.mrla.placement != "after":
            self._place_on_branch(mrla_drop_path_rate, mrla_act_cfg)
            return
        self.mrla_norm_name, norm = build_norm_layer(
            self.norm_cfg, self.out_channels, postfix="_mrla"
        )
        self.add_module(self.mrla_norm_name, norm)
        self.mrla_act = build_activation_layer(mrla_act_cfg) if mrla_act_cfg else nn.Identity()
        if type(self.mrla_act) is nn.ReLU:
            self.mrla_act = OpenReLU()
        rate = drop_path_rate if mrla_drop_path_rate is None else mrla_drop_path_rate
        self.mrla_drop_path = build_drop_path(rate)

    def _place_on_branch(self, drop_path_rate: float | None, act_cfg: dict | None) -> None:
        given = dict(mrla_drop_path_rate=drop_path_rate, mrla_act_cfg=act_cfg)
        for name, value in given.items():
            if value:
                raise ValueError(
                    f"{name} is for what a layer attention adds after a layer, and "
                    f"{type(self.mrla).__name__} adds nothing there: must be None, got {value!r}"
                )
        assert self.mrla is not None
        if self.mrla.placement == "input":
            self.mrla.join(self.conv1, self.stride, partial(make_norm, self.norm_cfg))

    @property
    def mrla_norm(self) -> Any:
        """The norm after the layer attention: ``bn_mrla``, or ``gn_mrla`` with group norm."""
        return getattr(self, self.mrla_norm_name)

    def start_as_identity(self) -> None:
        """Make the layer attention add zero at first, without blocking its gradients."""
        if self.mrla is not None and self.mrla.placement != "after":
            self.mrla.start_as_identity()
        elif self.mrla is not None:
            for parameter in self.mrla_norm.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Map the layer's input and the group's state to the layer's output and the new state."""
        if self.with_cp and x.requires_grad:
            # Told to the recomputation, so that it goes the same way when the hook is gone by then.
            watched = self.mrla is not None and not is_plain(self.mrla)
            return cp.checkpoint(self._forward, x, state, watched, use_reentrant=False)
        return self._forward(x, state)

    def _forward(self, x: Tensor, state: Any, watched: bool = False) -> tuple[Tensor, Any]:
        # In the ancestor's order, so that gradients too are summed in its order, bit for bit.
        first = self.conv1(x)
        if self.mrla is not None and self.mrla.placement == "input":
            addend, state = self.mrla.at_input(x, state)
            first = first + addend
        features: Sequence[Tensor] = ()
        if self.plugin_names:
            z, features = self._residual_with_plugins(x, first)
        else:
            z = self.residual(first)
        shortcut = x if self.downsample is None else self.downsample(x)
        out, state = self._tail(z, shortcut, state, features, watched)
        if self.plugin_names:
            out = self._run_plugins(out, "after_block")
        return out, state

    def _tail(
        self, z: Tensor, shortcut: Tensor, state: Any, features: Sequence[Tensor], watched: bool,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        if self.mrla is not None and self.mrla.placement != "after":
            branch, state = self.mrla(self._branch(z, features), shortcut, state)
            # Not in place: the layer attention may need the branch in its backward pass.
            return self.relu(self.drop_path(branch) + shortcut), state
        if not watched and self._fuses_tail(z, shortcut):
            scale = drop_path_scale(self.mrla_drop_path, z)
            assert self.mrla is not None
            return self.mrla.tail(z, shortcut, state, self.last_norm, self.mrla_norm, scale)
        out = self.drop_path(self._branch(z, features))
        # A plugin may need its output in its backward pass.
        out = out + shortcut if self._ends_with_plugins() else out.add_(shortcut)
        out = self.relu(out)
        if self.mrla is None:
            return out, state
        retrieved, state = self.mrla(out, shortcut, state)
        retrieved = self.mrla_act(self.mrla_norm(retrieved))
        return out + self.mrla_drop_path(retrieved), state

    def _branch(self, z: Tensor, features: Sequence[Tensor]) -> Tensor:
        """The residual branch before the addition, after its last norm and the plugins there."""
        out = self.last_norm(z)
        if self._ends_with_plugins():
            out = self._run_plugins(out, f"after_conv{self.convs}", features)
        return out

    def _fuses_tail(self, z: Tensor, shortcut: Tensor) -> bool:
        """Whether the whole block end can run as one operation of the layer attention."""
        return (
            self.mrla is not None
            and not self._ends_with_plugins()
            and type(self.relu) is nn.ReLU
            and isinstance(self.drop_path, nn.Identity)
            and is_plain(self.relu, self.drop_path, self.mrla_act, self.mrla_drop_path)
            and z.dtype == shortcut.dtype
            and self.mrla.fuses_tail(z, self.last_norm, self.mrla_norm, type(self.mrla_act))
        )


class MRLABasicBlock(LayerAttentionBlock, BasicBlock):
    """mmpretrain's basic block with a layer attention after it."""

    convs = 2

    def residual(self, first: Tensor) -> Tensor:
        """The branch from the output of its first convolution to its last norm."""
        return self.conv2(self.relu(self.norm1(first)))

    @property
    def last_norm(self) -> Any:
        """The norm before the residual addition."""
        return self.norm2


class MRLABottleneck(LayerAttentionBlock, Bottleneck):
    """mmpretrain's bottleneck with a layer attention after it."""

    convs = 3

    def residual(self, first: Tensor) -> Tensor:
        """The branch from the output of its first convolution to its last norm."""
        out = self.relu(self.norm1(first))
        out = self.relu(self.norm2(self.conv2(out)))
        return self.conv3(out)

    @property
    def last_norm(self) -> Any:
        """The norm before the residual addition."""
        return self.norm3


class LayerAttentionStage(ResLayer):
    """A stage of blocks: the group of layers that pass on the state of a layer attention.

    Args:
        *args: As of mmpretrain's.
        plugins: Checked plugins of this stage, see :func:`mmrla.models.plugins.check_plugins`.
        follows: Whether there is an earlier stage whose state may arrive here.
        **kwargs: As of mmpretrain's, and the arguments of the blocks.
    """

    def __init__(
        self, *args: Any, plugins: Sequence[dict[str, Any]] = (), follows: bool = False,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        for i, block in enumerate(self):
            if chosen := plugins_of_block(plugins, i, len(self)):
                block.add_plugins(chosen)
        first, *others = self
        for block in others if first.mrla is not None else ():
            block.mrla.share(first.mrla)
        if follows and first.mrla is not None and first.mrla.spans_stages:
            norm = partial(make_norm, first.norm_cfg)
            first.mrla.cross(first.in_channels, first.stride, norm)

    def forward(self, x: Tensor, carried: list[Any] | None = None) -> Tensor:
        """Map ``[B, C, H, W]`` to the output of the stage's last block.

        Args:
            x: The stage's input.
            carried: For a layer attention whose state spans stages, a list with the state of the
                previous layer; on return it contains the state of the last block. None: no state
                arrives.
        """
        state = carried[0] if carried else None
        for block in self:
            x, state = block(x, state)
        if carried:
            carried[0] = state
        return x


def make_norm(norm_cfg: Mapping[str, Any], channels: int) -> nn.Module:
    """A norm of the host's kind."""
    return build_norm_layer(norm_cfg, channels)[1]


@MODELS.register_module()
class MRLAResNet(LayerAttentionHost, ResNet):
    """mmpretrain's ResNet with a layer attention after every residual layer.

    Every argument of :class:`mmpretrain.models.ResNet` keeps its meaning and also applies to the
    parts of the layer attention: ``frozen_stages`` and ``norm_eval`` freeze them, ``norm_cfg``
    defines their norm (``bn_mrla``, ``gn_mrla``), ``with_cp`` recomputes them. The plain network's
    state-dict keys are unchanged; the added keys all contain ``mrla``.

    Args:
        depth: 18, 34, 50, 101 or 152.
        layer_attention: Config of the layer attention, built for each residual layer; None for the
            plain network. Each stage is one group of layers. Default:
            ``dict(type='MRLALight', head_channels=32)``.
        mrla_drop_path_rate: Stochastic depth of the attention branch, the same in all layers (0.2
            in the paper's ImageNet recipe, 0 for short schedules). None: the rate that
            ``drop_path_rate`` gives the layer.
        mrla_act_cfg: Activation between the attention's norm and its addition to the layer's
            output. Default None: no activation, as in the released network with a 7x7 stem.
        plugins: Within-layer attentions of the residual blocks, in the style of mmdet's ResNet:
            ``dict(cfg=dict(type='mmrla.ECA'), stages=(False, True, True, True),
            position='after_conv3')`` each. ``position`` is ``after_conv1`` to ``after_conv3``
            (``after_conv2`` in basic blocks; the default is the last, before the residual
            addition), ``after_block``, or ``conv1`` to ``conv3`` for a plugin that replaces a
            convolution. ``stages``, and ``blocks``, indices of blocks within a stage, are all by
            default. Plugins work with and without a layer attention.
        **kwargs: Arguments of :class:`mmpretrain.models.ResNet`. ``init_cfg=None`` means its
            default, Kaiming normal and zero gamma in the last norm of each residual branch;
            ``init_cfg=dict(type='mmrla.WarmStart', checkpoint=...)`` starts from a plain or an MRLA
            checkpoint; see :class:`mmrla.models.WarmStart` for the parts that are frozen then.

    Raises:
        ValueError: A depth that is not allowed, an unknown layer attention or plugin, or invalid
            arguments of one, such as ``head_channels`` that does not divide a stage's channels.

    Example:
        >>> import torch
        >>> from mmrla.models import MRLAResNet
        >>> backbone = MRLAResNet(50, out_indices=(0, 1, 2, 3)).eval()
        >>> [tuple(y.shape) for y in backbone(torch.rand(1, 3, 64, 96))]
        [(1, 256, 16, 24), (1, 512, 8, 12), (1, 1024, 4, 6), (1, 2048, 2, 3)]
    """

    arch_settings = {
        18: (MRLABasicBlock, (2, 2, 2, 2)),
        34: (MRLABasicBlock, (3, 4, 6, 3)),
        50: (MRLABottleneck, (3, 4, 6, 3)),
        101: (MRLABottleneck, (3, 4, 23, 3)),
        152: (MRLABottleneck, (3, 8, 36, 3)),
    }
    fit_heads = False
    placements = ("after", "branch", "input")
    shares_in_groups = True
    spans_stages = True

    def __init__(
        self, depth: int, *,
        layer_attention: Mapping[str, Any] | None = dict(type="MRLALight", head_channels=32),
        mrla_drop_path_rate: float | None = 0.0, mrla_act_cfg: dict | None = None,
        plugins: Sequence[Mapping[str, Any]] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if isinstance(depth, bool) or not isinstance(depth, int) or depth not in self.arch_settings:
            raise ValueError(f"depth must be one of {sorted(self.arch_settings)}, got {depth!r}")
        check_drop_path_rate(mrla_drop_path_rate)
        check_count("num_stages", stages := kwargs.get("num_stages", 4))
        if stages > len(self.arch_settings[depth][1]):
            most = len(self.arch_settings[depth][1])
            raise ValueError(f"num_stages must be from 1 to {most}, got num_stages={stages}")
        given = {**kwargs, "mrla_act_cfg": mrla_act_cfg}
        check_arguments(ResNet, given, stages=stages, outputs=stages, frozen=stages)
        if mrla_act_cfg is not None:
            with name_arguments_in_errors(type(self).__name__, dict(mrla_act_cfg=mrla_act_cfg)):
                build_activation_layer(mrla_act_cfg)
        self.plugins = check_plugins(plugins, stages, self.arch_settings[depth][0].convs)
        # Before the ancestor's constructor, which calls make_res_layer.
        self._block_kwargs = dict(
            layer_attention=layer_attention,
            mrla_drop_path_rate=mrla_drop_path_rate,
            mrla_act_cfg=mrla_act_cfg,
            mrla_fit_heads=self.fit_heads,
        )
        if kwargs.get("init_cfg", ...) is None:
            # As in mmdet's ResNet; mmpretrain's would keep torch's initialisation.
            kwargs.pop("init_cfg", None)
        super().__init__(depth, layer_attention=layer_attention, **kwargs)
        last = self._last_attention()
        self.mrla_output = None
        if last is not None:
            self.mrla_output = last.output(partial(make_norm, self.norm_cfg))
        self._concatenates = self.mrla_output is not None and last.concat_output
        if self._concatenates:
            self.feat_dim += last.hidden_channels
        self._freeze_unused_parameters()

    def _last_attention(self) -> Any:
        return getattr(self, self.res_layers[-1])[-1].mrla

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map ``[B, in_channels, H, W]`` to one feature map for each of ``out_indices``."""
        last = self._last_attention()
        if last is None or not last.spans_stages:
            return super().forward(x)
        x = self._stem(x)
        outs, carried = [], [None]
        for i, name in enumerate(self.res_layers):
            x = getattr(self, name)(x, carried)
            if i in self.out_indices:
                outs.append(x)
        if self._concatenates and self.num_stages - 1 in self.out_indices:
            outs[-1] = torch.cat([x, self.mrla_output(carried[0])], dim=1)
        return tuple(outs)

    def _stem(self, x: Tensor) -> Tensor:
        stem = self.stem(x) if self.deep_stem else self.relu(self.norm1(self.conv1(x)))
        return self.maxpool(stem)

    def make_res_layer(self, **kwargs: Any) -> LayerAttentionStage:
        """Build one stage; called by the ancestor's constructor."""
        # The ancestor lists a stage after this call.
        index = len(self.res_layers)
        plugins = plugins_of_stage(self.plugins, index)
        return LayerAttentionStage(
            plugins=plugins, follows=index > 0, **self._block_kwargs, **kwargs
        )
