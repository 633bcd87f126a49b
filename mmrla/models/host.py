"""Behaviour common to all hosts of layer attentions: freezing, warm start, train mode."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_flatten

from mmrla.checkpoints.files import safe_loading
from mmrla.checkpoints.plan import keeps_mrla_trainable
from mmrla.checkpoints.report import is_mrla_key
from mmrla.layers.checks import check_bool
from mmrla.layers.layer_attention import start_as_identity
from mmrla.models.arguments import check_rate, name_arguments_in_errors
from mmrla.models.builder import check_host_takes
from mmrla.models.plugins.builder import is_plugin_key, plugin_name
from mmrla.models.warm_start import init_weights_warm

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
# Leaves of a backbone's outputs; others, such as a dataclass, may hide tensors.
_SEARCHABLE = (torch.Tensor, int, float, str, type(None))


class LayerAttentionHost:
    """A mixin before a backbone of mmpretrain or mmdet; names of all added parts contain ``mrla``.

    Everything after the last of ``out_indices`` does not require a gradient, so that DDP works
    without ``find_unused_parameters``.

    A host with plugins sets ``plugins`` (checked) before this constructor; in a warm start they are
    treated as new parts, like layer attentions.

    Args:
        layer_attention: Config of the layer attention, None for the plain network.
        zero_init_mrla: Whether ``init_weights`` starts each layer attention as the identity, so
            that the network starts as the plain one: the norm around the attention starts at zero,
            as with ``zero_init_residual`` (not possible for DIANet's unit). False: as released, at
            full strength. A checkpoint with these weights overrides it.
        init_cfg: Of the backbone. With ``dict(type='mmrla.WarmStart', ...)`` from a plain
            checkpoint, ``frozen_stages``, ``norm_eval`` and ``norm_cfg=dict(requires_grad=False)``
            do not apply to the new parts.
        **kwargs: The backbone's.

    Raises:
        TypeError: ``zero_init_mrla`` is not a bool.
        ValueError: The network has no place for such a layer attention.
    """

    placements: tuple[str, ...] = ("after",)
    """Placements of layer attentions supported here, of :data:`mmrla.layers.PLACEMENTS`."""

    shares_in_groups: bool = False
    """Whether layer attentions of a group may share parts here."""

    spans_stages: bool = False
    """Whether the state may pass from stage to stage here."""

    plugins: tuple[dict[str, Any], ...] = ()
    keep_plugins_trainable: bool = False
    # Names of parameters that no output depends on.
    _unused: frozenset[str] = frozenset()

    def __init__(
        self, *args: Any, layer_attention: Mapping[str, Any] | None = None,
        zero_init_mrla: bool = True, **kwargs: Any,
    ) -> None:  # fmt: skip
        check_bool("zero_init_mrla", zero_init_mrla)
        if layer_attention is not None:
            name = type(self).__name__
            check_host_takes(
                layer_attention, name, self.placements, self.shares_in_groups, self.spans_stages
            )
        # Plain values, so they may be set before nn.Module's constructor. Known from the start:
        # DDP and optimizers look at what is trainable before weights load.
        self.layer_attention = layer_attention
        self.zero_init_mrla = zero_init_mrla
        if "init_cfg" in kwargs:
            kwargs["init_cfg"] = _simple(kwargs["init_cfg"])
        self._image_channels = kwargs.get("in_channels", 3)
        self.keep_mrla_trainable = keeps_mrla_trainable(kwargs.get("init_cfg"))
        names = {plugin_name(plugin) for plugin in self.plugins}
        self.keep_plugins_trainable = bool(names) and keeps_mrla_trainable(
            kwargs.get("init_cfg"), lambda key: is_plugin_key(key, names)
        )
        with name_arguments_in_errors(type(self).__name__, kwargs):
            super().__init__(*args, **kwargs)
        self._free_fresh_norms()

    def _free_fresh_norms(self) -> None:
        """Keep new norms trainable if ``norm_cfg`` freezes norms, as DETR's recipes do.

        Their gamma starts at zero, so frozen norms would disable the layer attention permanently. A
        host that adds layer attentions after this constructor calls it again.
        """
        for part in self._mrla_parts() if self.keep_mrla_trainable else ():
            for module in part.modules():
                if isinstance(module, NORMS):
                    module.requires_grad_(True)

    def _freeze_unused_parameters(self) -> None:
        """Called at the end of constructors: see :func:`freeze_unused_parameters`."""
        stages = getattr(self, "res_layers", None) or self.layers
        if max(self.out_indices) < len(stages) - 1:
            freeze_unused_parameters(self, (1, self._image_channels, 64, 64))

    def train(self, mode: bool = True) -> Any:
        """As the ancestor's, and returns the network as ``nn.Module.train`` does."""
        super().train(mode)
        if mode:
            for part in self._trainable_parts():
                part.train()
        return self

    def init_weights(self) -> None:
        """As the ancestor's, or a warm start; then apply ``zero_init_mrla``."""
        if not init_weights_warm(self):
            self._init_weights_cold()
        self._warn_if_off()

    def _init_weights_cold(self) -> None:
        pretrained = _is_pretrained(self.init_cfg)
        if pretrained:  # what the checkpoint holds comes after
            self._zero_init_mrla()
        with safe_loading():
            super().init_weights()
        if not pretrained:
            self._zero_init_mrla()
            # The ancestor initialises every convolution alike, also what starts at zero.
            for plugin in self._plugin_parts():
                start_plugin(plugin, zero_residual=getattr(self, "zero_init_residual", False))

    def _warn_if_off(self) -> None:
        """Log layer attentions that add zero and never learn: their norm is zero and frozen."""
        off = [
            name
            for name, module in self.named_modules()
            if is_mrla_key(name) and isinstance(module, NORMS) and _stuck_at_zero(module.weight)
            if f"{name}.weight" not in self._unused
        ]
        if off:
            print_log(
                f"norms of layer attentions are zero and frozen ({len(off)}: {off[0]}, ...): these "
                "layer attentions have no effect and learn nothing, unless their weights are loaded"
                " later. From a plain checkpoint, init_cfg=dict(type='mmrla.WarmStart', ...) keeps "
                "them trainable; zero_init_mrla=False starts them at full strength",
                logger="current",
                level=logging.WARNING,
            )

    def _zero_init_mrla(self) -> None:
        if self.zero_init_mrla:
            start_as_identity(self)

    def _freeze_stages(self) -> None:
        parts = self._trainable_parts()
        before = [(p, p.requires_grad) for part in parts for p in part.parameters()]
        super()._freeze_stages()
        for parameter, requires_grad in before:
            parameter.requires_grad = requires_grad

    def _trainable_parts(self) -> Iterator[nn.Module]:
        """Parts that freezing does not apply to."""
        if self.keep_mrla_trainable:
            yield from self._mrla_parts()
        if self.keep_plugins_trainable:
            yield from self._plugin_parts()

    def _plugin_parts(self) -> Iterator[nn.Module]:
        for module in self.modules():
            for name in getattr(module, "plugin_names", ()):
                yield getattr(module, name)

    def _mrla_parts(self) -> Iterator[nn.Module]:
        """The layer attentions with the norms and drop paths around them."""
        for name, module in self.named_modules():
            if is_mrla_key(name.rpartition(".")[2]):
                yield module


def freeze_unused_parameters(backbone: Any, image_shape: tuple[int, ...]) -> None:
    """Set ``requires_grad=False`` on parameters that no output depends on, in place.

    Parameters after the last of ``out_indices`` never get a gradient, and DDP, without
    ``find_unused_parameters``, would wait for it and fail. They are found by a small forward and
    backward in evaluation mode. Outputs that cannot be searched for tensors, such as an object,
    leave everything as it is.
    """
    asking = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    if any(p.is_meta for p in asking.values()) or torch.is_inference_mode_enabled():
        return
    if not asking:
        return
    some = next(iter(asking.values()))
    modes = [(module, module.training) for module in backbone.modules()]
    try:
        for module, _ in modes:
            module.training = False  # not eval(), which backbones override
        with torch.enable_grad():
            outs, _ = tree_flatten(backbone(some.new_zeros(image_shape)))
            sums = [t.sum() for t in outs if isinstance(t, torch.Tensor) and t.requires_grad]
            if not sums or not all(isinstance(t, _SEARCHABLE) for t in outs):
                return
            # Not torch.autograd.grad, which mmcv's checkpointing (with_cp) refuses.
            torch.stack(sums).sum().backward()
    finally:
        for module, mode in modes:
            module.training = mode
    backbone._unused = frozenset(name for name, p in asking.items() if p.grad is None)
    for parameter in asking.values():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def _stuck_at_zero(weight: nn.Parameter | None) -> bool:
    """Whether a weight is zero, and frozen."""
    return weight is not None and not (weight.requires_grad or weight.is_meta or weight.any())


def _is_pretrained(init_cfg: Any) -> bool:
    """Whether one of the initialisations is ``Pretrained``."""
    entries = init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]
    kinds = [entry.get("type") for entry in entries if isinstance(entry, Mapping)]
    return any(str(kind).rpartition(".")[2] == "Pretrained" for kind in kinds)


def _simple(init_cfg: Any) -> Any:
    """``Pretrained`` in the form the ancestors recognise: not in a list of one, without a scope.

    They avoid overwriting the weights it loads, but recognise only this form.
    """
    only = init_cfg[0] if isinstance(init_cfg, (list, tuple)) and len(init_cfg) == 1 else init_cfg
    if isinstance(only, Mapping) and str(only.get("type")).rpartition(".")[2] == "Pretrained":
        return ConfigDict(only, type="Pretrained")
    return init_cfg


def start_plugin(plugin: nn.Module, zero_residual: bool) -> None:
    """Give a plugin of mmrla or mmcv the initialisation of its paper, if it has one."""
    for name in ("reset_parameters", "init_weights"):
        if hasattr(type(plugin), name) and not isinstance(plugin, BaseModule):
            getattr(plugin, name)()
            break
    last_norms = getattr(plugin, "last_norms", None)
    if zero_residual and last_norms is not None:
        for norm in last_norms():
            nn.init.zeros_(norm.weight)


def check_drop_path_rate(rate: float | None) -> None:
    """Raise TypeError or ValueError unless a stochastic depth rate is None or in [0, 1)."""
    if rate is not None:
        check_rate("mrla_drop_path_rate", rate)


def branch_rate(asked: float | None, block: nn.Module) -> float:
    """Stochastic depth of an attention branch: ``rate`` or, if None, the block's."""
    if asked is not None:
        return asked
    # Of mmcv and timm, and of torchvision.
    names = {"DropPath": "drop_prob", "StochasticDepth": "p"}
    kinds = ((m, names.get(type(m).__name__)) for m in block.modules())
    return max((float(getattr(m, name)) for m, name in kinds if name), default=0.0)
