"""From a host's ``layer_attention=dict(...)`` to a module."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from mmrla.layers import (
    MLA,
    PLACEMENTS,
    DIAUnit,
    DLABase,
    DLALight,
    DWConv,
    LayerAttention,
    LinearRLA,
    MRLABase,
    MRLALight,
    RecurrentLayerAggregation,
)
from mmrla.registry import LAYER_ATTENTIONS

# Registered here, not by decorators there: the layers' floor knows torch alone.
for _layer_attention in (
    MRLALight,
    MRLABase,
    MLA,
    LinearRLA,
    DWConv,
    DIAUnit,
    RecurrentLayerAggregation,
    DLALight,
    DLABase,
):
    LAYER_ATTENTIONS.register_module(module=_layer_attention)


def layer_attention_class(cfg: Mapping[str, Any]) -> type[LayerAttention]:
    """The class that ``cfg`` names.

    Raises:
        TypeError: ``cfg`` is no mapping with a ``type``, or the type no layer attention.
        ValueError: The type is unknown.
    """
    if not isinstance(cfg, Mapping) or "type" not in cfg:
        raise TypeError(
            "layer_attention must be None or a dict with a type, such as "
            f"dict(type='MRLALight', head_channels=32), got {cfg!r}"
        )
    cls = cfg["type"]
    if isinstance(cls, str):
        # get, not build: build would look in the default scope (mmdet's) instead of here.
        name, cls = cls, LAYER_ATTENTIONS.get(cls.removeprefix("mmrla."))
        if cls is None:
            allowed = ", ".join(sorted(LAYER_ATTENTIONS.module_dict))
            raise ValueError(
                f"layer_attention: unknown layer attention {name!r}; allowed: {allowed}"
            )
    if not isinstance(cls, type) or not issubclass(cls, LayerAttention):
        raise TypeError(
            f"layer_attention: type must be a name or a subclass of LayerAttention, got {cls!r}"
        )
    return cls


def check_host_takes(
    cfg: Mapping[str, Any], host: str, placements: Collection[str], shares: bool
) -> None:
    """Raise ValueError where a host cannot take a layer attention.

    Args:
        cfg: As in :func:`build_layer_attention`.
        host: What the message calls the host.
        placements: Those that it has, of :data:`mmrla.layers.PLACEMENTS`.
        shares: Whether it lets the layers of a group share parts.
    """
    cls = layer_attention_class(cfg)
    placement, shared = getattr(cls, "placement", "after"), getattr(cls, "shared", ())
    if placement not in placements:
        why = f"sits {PLACEMENTS.get(placement, placement)}; there {host} has no place for it"
    elif shared and not shares:
        why = f"shares parts ({', '.join(shared)}) along a group of layers; {host} does not do that"
    else:
        return
    raise ValueError(f"{host} cannot take layer_attention {cls.__name__}: it {why}")


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

    Returns:
        The layer attention, whose maps are ``[B, channels, H, W]``.

    Raises:
        TypeError: ``cfg`` is no mapping with a ``type``, or has arguments the type does not take.
        ValueError: The type is unknown, or refuses its arguments.
    """
    cls = layer_attention_class(cfg)
    kwargs = {key: value for key, value in cfg.items() if key != "type"}
    kwargs = {**(defaults or {}).get(cls.__name__, {}), **kwargs}
    heads = inspect.signature(cls).parameters.get("head_channels") if fit_heads else None
    if heads is not None:
        wanted = kwargs.get("head_channels", heads.default)
        fits = isinstance(wanted, int) and not isinstance(wanted, bool)
        kwargs["head_channels"] = min(wanted, channels) if fits else wanted
    try:
        return cls(channels=channels, **kwargs)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"layer_attention {cls.__name__}: {error}") from error
