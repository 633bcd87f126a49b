"""From a host's ``layer_attention=dict(...)`` to a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmrla.layers import LayerAttention
from mmrla.layers.builder import build, check_placement, layer_attentions
from mmrla.layers.builder import layer_attention_class as class_of
from mmrla.registry import LAYER_ATTENTIONS

# Registered here, not by decorators there: the layers' floor knows torch alone.
for _layer_attention in layer_attentions().values():
    LAYER_ATTENTIONS.register_module(module=_layer_attention)


def layer_attention_class(cfg: Mapping[str, Any]) -> type[LayerAttention]:
    """The class that ``cfg`` names.

    Raises:
        TypeError: ``cfg`` is not a mapping with a ``type``, or the type is not a layer attention.
        ValueError: The type is unknown.
    """
    # get, not build: build would look in the default scope (mmdet's) instead of here.
    return class_of(cfg, LAYER_ATTENTIONS.get, lambda: LAYER_ATTENTIONS.module_dict)


def check_host_takes(cfg: Mapping[str, Any], *host: Any) -> None:
    """:func:`mmrla.layers.builder.check_placement` of the class that ``cfg`` names."""
    check_placement(layer_attention_class(cfg), cfg, *host)


def build_layer_attention(
    cfg: Mapping[str, Any],
    channels: int,
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
    fit_heads: bool = False,
    index: int | None = None,
) -> LayerAttention:
    """Build the layer attention that sits after a layer of ``channels`` channels.

    Args:
        cfg: ``type``, a name in :data:`mmrla.registry.LAYER_ATTENTIONS` or a class, and the
            arguments of its constructor except ``channels``.
        channels: C of the layer.
        defaults: The host's defaults for arguments that ``cfg`` does not set, by class name.
        fit_heads: Use ``head_channels = C`` if C is smaller than the ``head_channels`` of ``cfg``
            (or the type's default), as narrow networks need.
        index: Its number within the group, for types with another placement than after a layer.

    Returns:
        The layer attention, whose maps are ``[B, channels, H, W]``.

    Raises:
        TypeError: ``cfg`` is not a mapping with a ``type``, or has arguments the type does not
            take.
        ValueError: The type is unknown, or refuses its arguments.
    """
    return build(layer_attention_class(cfg), cfg, channels, defaults, fit_heads, index)
