"""A layer attention in a backbone that has no host here.

Layer attention: Cross-Layer Retrospective Retrieving via Layer Attention, ICLR 2023,
https://openreview.net/forum?id=pvgEL1yS3Ql.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.func import functional_call

from mmrla.checkpoints.plan import keeps_mrla_trainable
from mmrla.layers.builder import check_added
from mmrla.layers.checks import check_bool, is_count
from mmrla.layers.layer_attention import Carried, LayerAttention
from mmrla.models.arguments import check_config
from mmrla.models.branches import LayerAttentionOnMap, LayerAttentionOnTokens
from mmrla.models.builder import (
    build_layer_attention,
    check_host_takes,
    layer_attention_class,
)
from mmrla.models.host import (
    LayerAttentionHost,
    _simple,
    branch_rate,
    check_drop_path_rate,
    freeze_unused_parameters,
)
from mmrla.models.tracing import (
    PROJECTION,
    Call,
    find_layers,
    groups_of,
    name_of,
    shapes_of,
    trial,
    watching,
)
from mmrla.registry import MODELS


def _restore(mixin: type, base: type) -> Any:
    return object.__new__(_mixed_class(mixin, base))


_MIXED: dict[tuple[type, type], Any] = {}


def _mixed_class(mixin: type, base: type) -> Any:
    """``base`` with a mixin before it: one class per pair, made once."""
    if (mixin, base) not in _MIXED:
        body = {"__module__": __name__, "mixed_from": (mixin, base)}
        name = f"{mixin.__name__}[{base.__name__}]"
        _MIXED[mixin, base] = type(base)(name, (mixin, base), body)
    return _MIXED[mixin, base]


class MixedClass:
    """Base of the mixins; pickles an object whose class was made by :func:`_mixed_class`."""

    mixed_from: tuple[type, type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made at run time, so pickle could not find it by name.
        return _restore, self.mixed_from, self.__dict__


class LayerWithAttention(MixedClass):
    """A mixin before the class of an existing layer: the attention follows its forward."""

    mrla: LayerAttentionOnMap | LayerAttentionOnTokens | LayerAttention
    mrla_last: bool
    """Whether it is the last of its group."""
    mrla_grid: int | str | None
    """Position or name of the argument that is the grid of tokens; None for maps."""
    mrla_projects: bool

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Map the layer's input, or the output and state of the group's previous layer."""
        state = None
        if isinstance(x, Carried):
            x, state = x
        out = super().forward(x, *args, **kwargs)
        if self.mrla_grid is None:
            out, state = self.mrla(out, self._shortcut(x), state)
        else:
            key = self.mrla_grid
            height, width = args[key] if isinstance(key, int) else kwargs[key]
            out, state = self.mrla(out, x, (height, width), 0, state)
        return out if self.mrla_last else Carried(out, state)

    def _shortcut(self, x: Tensor) -> Tensor:
        """The layer's identity branch: its input, after the projection if there is one."""
        attention = getattr(self.mrla, "attention", self.mrla)
        if not (self.mrla_projects and attention.uses_shortcut):
            return x
        projection = getattr(self, PROJECTION)
        # The layer has computed it and keeps it to itself. Once more, on copies of the buffers:
        # statistics of norms count a batch once.
        buffers = {name: buffer.clone() for name, buffer in projection.named_buffers()}
        if not torch.jit.is_tracing():
            return functional_call(projection, buffers, (x,))
        # torch.jit.trace, and whoever counts FLOPs by it, refuses the line above.
        out = projection(x)
        with torch.no_grad():
            for name, buffer in projection.named_buffers():
                buffer.copy_(buffers[name])
        return out


@MODELS.register_module()
class LayerAttentionWrapper(MixedClass, LayerAttentionHost):
    """A backbone of any package with a layer attention after each residual layer.

    The result *is* the backbone, with its class extended: attributes, ``frozen_stages``,
    ``norm_eval``, ``init_cfg`` and outputs are the backbone's, state-dict keys too, and the added
    keys contain ``mrla``: ``layer1.0.mrla.attention.value.weight``. A group of layers is a stage:
    the layers in one container. The attention has norm and stochastic depth as in the hosts for
    maps (``out = x + drop_path(norm(o_t))``) or tokens, as in PVTv2.

    A trial forward in the constructor determines the layers and their widths, and checks that the
    backbone's outputs keep their shapes.

    Args:
        backbone: Config of the backbone, with the prefix of its package: ``mmdet.RegNet``;
            parameters that no output depends on in evaluation mode then need no gradient. Or the
            backbone itself, a module of any library, such as ``torchvision.models.resnet18()``: it
            is extended in place, and keeps its weights and their ``requires_grad``.
        layer_attention: Config of the layer attention; None for the plain backbone.
            Default: MRLA-light with 8 channels per head on maps, 16 on tokens.
        layers: Names of the layers, as ``named_modules`` gives them, or patterns of such names in
            which ``*`` matches within one part (``'stage*.*'``). Default None: the usual names
            (:data:`USUAL_LAYERS`), and layers without a shortcut of their output's shape stay plain
            and end the group.
        norm_cfg: Of the norms around the attention. Default None: the backbone's ``norm_cfg``,
            or BN for maps and LN for tokens if it has none.
        mrla_drop_path_rate: Stochastic depth of the attention branch; None: the layer's own rate.
        zero_init_mrla: See :class:`mmrla.models.host.LayerAttentionHost`; with a module it takes
            effect immediately.
        probe_size: Height and width of the image of the trial forward.

    Raises:
        TypeError: ``backbone`` is neither a config with a type nor a module.
        ValueError: No layers are found, or a named one does not exist, is not residual or cannot
            have a layer attention; the backbone reads features between the layers of a group; an
            unknown layer attention or invalid arguments of one; a backbone that is already wrapped.

    Example:
        >>> import torch
        >>> from mmrla.models import LayerAttentionWrapper
        >>> backbone = LayerAttentionWrapper(
        ...     backbone=dict(type='mmdet.RegNet', arch='regnetx_400mf', out_indices=(2, 3)),
        ...     layer_attention=dict(type='MRLALight', head_channels=16)).eval()
        >>> [tuple(y.shape) for y in backbone(torch.rand(1, 3, 64, 96))]
        [(1, 160, 4, 6), (1, 384, 2, 3)]
    """

    placements = ("after", "output")

    def __new__(cls, backbone: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Build the backbone and extend its class; ``__init__`` adds the parts."""
        if isinstance(backbone, nn.Module):
            built = backbone
        elif isinstance(backbone, Mapping) and "type" in backbone:
            cfg = dict(backbone)
            if "init_cfg" in cfg:
                cfg["init_cfg"] = _simple(cfg["init_cfg"])
            built = MODELS.build(cfg)
        else:
            raise TypeError(
                "backbone must be a config such as dict(type='mmdet.RegNet', ...), or a module, "
                f"got {backbone!r}"
            )
        if isinstance(built, LayerAttentionWrapper):
            raise ValueError(f"{name_of(built)} is wrapped already")
        built.__class__ = _mixed_class(LayerAttentionWrapper, type(built))
        return built

    def __init__(
        self, backbone: Mapping[str, Any] | nn.Module,
        layer_attention: Mapping[str, Any] | None = dict(type="MRLALight"),
        layers: str | Sequence[str] | None = None, *, norm_cfg: Mapping[str, Any] | None = None,
        mrla_drop_path_rate: float | None = 0.0, zero_init_mrla: bool = True,
        probe_size: int | tuple[int, int] = 224,
    ) -> None:  # fmt: skip
        # Not the ancestor's constructor: it has run in __new__.
        check_bool("zero_init_mrla", zero_init_mrla)
        self.zero_init_mrla = zero_init_mrla
        try:
            self._extend(
                backbone if isinstance(backbone, Mapping) else {},
                layer_attention, layers, norm_cfg, mrla_drop_path_rate, probe_size,
            )  # fmt: skip
        except Exception:
            _undo(self)  # a module that was given is its owner's
            raise
        if not isinstance(backbone, Mapping):  # its weights are there already
            self._zero_init_mrla()

    def _extend(
        self, cfg: Mapping[str, Any], layer_attention: Mapping[str, Any] | None,
        layers: str | Sequence[str] | None, norm_cfg: Mapping[str, Any] | None,
        mrla_drop_path_rate: float | None, probe_size: int | tuple[int, int],
    ) -> None:  # fmt: skip
        check_drop_path_rate(mrla_drop_path_rate)
        size = probe_size if isinstance(probe_size, (tuple, list)) else (probe_size, probe_size)
        if len(size) != 2 or not all(map(is_count, size)):
            raise ValueError(f"probe_size must be a positive int or a pair, got {probe_size!r}")
        self.layer_attention = layer_attention
        self.keep_mrla_trainable = keeps_mrla_trainable(cfg.get("init_cfg"))
        if layer_attention is None:
            return
        check_host_takes(layer_attention, type(self).__name__, self.placements)
        check_added(layer_attention_class(layer_attention), mrla_drop_path_rate)
        image_shape = (1, cfg.get("in_channels", _image_channels(self)), *size)
        if norm_cfg is not None:
            check_config("norm_cfg", norm_cfg)
        norm_cfg = norm_cfg or _norm_cfg_of(self, cfg)
        candidates = find_layers(self, layers)
        with watching(candidates):
            before = trial(self, image_shape)
        for group in groups_of(self, candidates, named=layers is not None):
            for i, call in enumerate(group):
                last = call is group[-1]
                _attach(call, i, layer_attention, norm_cfg, mrla_drop_path_rate, last)
        try:
            after = trial(self, image_shape)
        except ValueError as error:
            raise ValueError(f"with layer attention, {error}") from error
        if shapes_of(after) != shapes_of(before):
            raise ValueError(
                f"backbone {name_of(self)} reads features between the layers of a group: its "
                f"outputs are {shapes_of(after)} with layer attention, {shapes_of(before)} without"
            )
        self._free_fresh_norms()
        if hasattr(self.mixed_from[1], "_freeze_stages"):
            self._freeze_stages()
        if cfg:  # what of a given module is trained is its owner's decision
            freeze_unused_parameters(self, image_shape)

    def init_weights(self) -> None:
        """As the backbone's. A backbone that is not mmengine's keeps its weights."""
        if isinstance(self, BaseModule):
            super().init_weights()


def _undo(backbone: Any) -> None:
    """Restore the original classes and parts of a backbone and its layers."""
    added = (
        "mrla_last", "mrla_grid", "mrla_projects", "layer_attention", "zero_init_mrla",
        "keep_mrla_trainable",
    )  # fmt: skip
    for module in list(backbone.modules()):
        if isinstance(module, MixedClass):
            module._modules.pop("mrla", None)
            for name in added:
                module.__dict__.pop(name, None)
            module.__class__ = module.mixed_from[1]


def _image_channels(backbone: Any) -> int:
    """Input channels of a backbone's first convolution."""
    convs = (module for module in backbone.modules() if isinstance(module, nn.Conv2d))
    return next((conv.in_channels for conv in convs), 3)


def _norm_cfg_of(backbone: Any, cfg: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The backbone's ``norm_cfg``: given, stored as an attribute, or its default."""
    default = inspect.signature(backbone.mixed_from[1].__init__).parameters.get("norm_cfg")
    found = (
        cfg.get("norm_cfg"),
        getattr(backbone, "norm_cfg", None),
        default.default if default is not None else None,
    )
    return next((norm for norm in found if isinstance(norm, Mapping)), None)


def _attach(
    call: Call, index: int, layer_attention: Mapping[str, Any], norm_cfg: Mapping[str, Any] | None,
    drop_path_rate: float | None, last: bool,
) -> None:  # fmt: skip
    layer: Any = call.module
    rate = branch_rate(drop_path_rate, layer)
    part: nn.Module
    with_grid = call.out.dim() == 3
    if layer_attention_class(layer_attention).placement == "output":
        with_grid = False
        channels = call.out.shape[1 if call.out.dim() == 4 else 2]
        part = build_layer_attention(layer_attention, channels, index=index)
    elif call.out.dim() == 4:
        part = LayerAttentionOnMap(
            layer_attention, call.out.shape[1], norm_cfg or dict(type="BN"), rate,
            with_cp=getattr(layer, "with_cp", False) is True,
        )  # fmt: skip
    else:
        part = LayerAttentionOnTokens(
            layer_attention, call.out.shape[2], norm_cfg or dict(type="LN", eps=1e-6), rate
        )
    # A child of its layer, so that what freezes or scales the layer does it to both.
    layer.mrla = part.to(call.out.device).train(layer.training)
    layer.mrla_last = last
    layer.mrla_grid = call.grid() if with_grid else None
    layer.mrla_projects = call.projects
    layer.__class__ = _mixed_class(LayerWithAttention, type(layer))
