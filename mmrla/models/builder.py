"""From a host's ``layer_attention=dict(...)`` to a module."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from mmrla.layers import MLA, DWConv, LayerAttention, LinearRLA, MRLABase, MRLALight
from mmrla.registry import LAYER_ATTENTIONS

# Registered here, not by decorators there: the layers' floor knows torch alone.
for _layer_attention in (MRLALight, MRLABase, MLA, LinearRLA, DWConv):
    LAYER_ATTENTIONS.register_module(module=_layer_attention)


def build_layer_attention(
    cfg: Mapping[str, Any],
    channels: int,
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
    fit_heads: bool = False,
) -> LayerAttention:
    """Build the layer attention that sits after a layer of ``channels`` channels.

    Args:
        cfg: ``type``, a name in :data:`mmrla.registry.LAYER_ATTENTIONS` or a class, and the
            arguments of its constructor except ``channels``.
        channels: C of the layer.
        defaults: What a host prefers where ``cfg`` is silent: arguments by name of the class.
        fit_heads: Take ``head_channels = C`` where C is smaller than what ``cfg`` (or the type's
            default) says, as narrow networks need.

    Raises:
        TypeError: ``cfg`` is no mapping with a ``type``, or has arguments the type does not take.
        ValueError: The type is unknown, or refuses its arguments.
    """
    if not isinstance(cfg, Mapping) or "type" not in cfg:
        raise TypeError(
            "layer_attention must be None or a dict with a type, such as "
            f"dict(type='MRLALight', head_channels=32), got {cfg!r}"
        )
    kwargs = dict(cfg)
    cls = kwargs.pop("type")
    if isinstance(cls, str):
        # get, not build: build would look in the default scope (mmdet's) instead of here.
        name, cls = cls, LAYER_ATTENTIONS.get(cls.removeprefix("mmrla."))
        if cls is None:
            allowed = ", ".join(sorted(LAYER_ATTENTIONS.module_dict))
            raise ValueError(f"unknown layer attention {name!r}; allowed: {allowed}")
    kwargs = {**(defaults or {}).get(cls.__name__, {}), **kwargs}
    heads = inspect.signature(cls).parameters.get("head_channels") if fit_heads else None
    if heads is not None:
        wanted = kwargs.get("head_channels", heads.default)
        kwargs["head_channels"] = min(wanted, channels) if isinstance(wanted, int) else wanted
    try:
        return cls(channels=channels, **kwargs)
    except TypeError as error:
        raise TypeError(f"layer_attention {cls.__name__}: {error}") from error
