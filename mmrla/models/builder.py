"""From a host's ``layer_attention=dict(...)`` to a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmrla.layers import LayerAttention, MRLABase, MRLALight
from mmrla.registry import LAYER_ATTENTIONS

# Registered here, not by decorators there: the layers' floor knows torch alone.
for _layer_attention in (MRLALight, MRLABase):
    LAYER_ATTENTIONS.register_module(module=_layer_attention)


def build_layer_attention(
    cfg: Mapping[str, Any],
    channels: int,
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> LayerAttention:
    """Build the layer attention that sits after a layer of ``channels`` channels.

    Args:
        cfg: ``type``, a name in :data:`mmrla.registry.LAYER_ATTENTIONS` or a class, and the
            arguments of its constructor except ``channels``.
        channels: C of the layer.
        defaults: What a host prefers where ``cfg`` is silent: arguments by name of the class.

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
    try:
        return cls(channels=channels, **kwargs)
    except TypeError as error:
        raise TypeError(f"layer_attention {cls.__name__}: {error}") from error
