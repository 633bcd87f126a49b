"""Builds a module from ``layer_attention=dict(type=..., ...)``, for all hosts."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from mmrla.layers.layer_attention import PLACEMENTS, LayerAttention

# d_k of the paper; and Algorithm 4: in a transformer the value of MRLA-light passes a GELU.
TOKEN_DEFAULTS: dict[str, dict[str, Any]] = {
    "QueryKeyValue": dict(head_channels=16),
    "MRLALight": dict(value_act="gelu"),
}
"""Defaults of hosts made of tokens, for arguments that a config does not set."""


def layer_attentions() -> dict[str, type[LayerAttention]]:
    """All layer attentions defined in this package, by class name."""
    found = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        for name, cls in vars(import_module(f"mmrla.layers.{module.name}")).items():
            is_type = isinstance(cls, type) and issubclass(cls, LayerAttention)
            if is_type and cls.__name__ == name and not inspect.isabstract(cls):
                found[name] = cls
    return found


def layer_attention_class(
    cfg: Mapping[str, Any],
    find: Callable[[str], type | None],
    names: Callable[[], Collection[str]],
) -> type[LayerAttention]:
    """The class that ``cfg`` names.

    Raises:
        TypeError: ``cfg`` is not a mapping with a ``type``, or the type is not a layer attention.
        ValueError: The type is unknown.
    """
    if not isinstance(cfg, Mapping) or "type" not in cfg:
        raise TypeError(
            "layer_attention must be None or a dict with a type, such as "
            f"dict(type='MRLALight', head_channels=32), got {cfg!r}"
        )
    cls = cfg["type"]
    if isinstance(cls, str):
        name, cls = cls, find(cls.removeprefix("mmrla."))
        if cls is None:
            allowed = ", ".join(sorted(names()))
            raise ValueError(
                f"layer_attention: unknown layer attention {name!r}; allowed: {allowed}"
            )
    if not isinstance(cls, type) or not issubclass(cls, LayerAttention):
        raise TypeError(
            f"layer_attention: type must be a name or a subclass of LayerAttention, got {cls!r}"
        )
    return cls


def check_placement(
    cls: type[LayerAttention], cfg: Mapping[str, Any], host: str,
    placements: Collection[str] = ("after",), shares: bool = False, spans: bool = False,
) -> None:  # fmt: skip
    """Raise ValueError if a host does not support a layer attention."""
    placement, shared = getattr(cls, "placement", "after"), getattr(cls, "shared", ())
    if placement not in placements:
        why = f"sits {PLACEMENTS.get(placement, placement)}; there {host} has no place for it"
    elif shared and not shares:
        why = f"shares parts ({', '.join(shared)}) along a group of layers; {host} does not do that"
    elif cfg.get("spans_stages", getattr(cls, "spans_stages", False)) and not spans:
        why = (
            f"spans stages: its state goes on from each to the next, which {host} does not do; "
            "spans_stages=False makes each stage a group"
        )
    else:
        return
    raise ValueError(f"{host} cannot take layer_attention {cls.__name__}: it {why}")


def check_added(cls: type[LayerAttention], drop_path_rate: float | None) -> None:
    """Raise ValueError on stochastic depth around a type that adds nothing to a layer's output."""
    if cls.placement in ("output", "sublayer") and drop_path_rate:
        raise ValueError(
            "mrla_drop_path_rate is for what a layer attention adds after a layer, and "
            f"{cls.__name__} adds nothing there: must be 0, got {drop_path_rate!r}"
        )


def build(
    cls: type[LayerAttention], cfg: Mapping[str, Any], channels: int,
    defaults: Mapping[str, Mapping[str, Any]] | None = None, fit_heads: bool = False,
    index: int | None = None,
) -> LayerAttention:  # fmt: skip
    """Build a layer attention; as :func:`mmrla.models.build_layer_attention` for a class.

    ``defaults`` are by name of the class or of a base class; ``index`` is for classes that take it.

    Raises:
        TypeError: An argument that the class does not take.
        ValueError: An invalid argument.
    """
    kwargs = {key: value for key, value in cfg.items() if key != "type"}
    for base in cls.__mro__:
        kwargs = {**(defaults or {}).get(base.__name__, {}), **kwargs}
    parameters = inspect.signature(cls).parameters
    heads = parameters.get("head_channels") if fit_heads else None
    if heads is not None:
        wanted = kwargs.get("head_channels", heads.default)
        fits = isinstance(wanted, int) and not isinstance(wanted, bool)
        kwargs["head_channels"] = min(wanted, channels) if fits else wanted
    place = {} if index is None or "index" not in parameters else {"index": index}
    try:
        return cls(channels=channels, **place, **kwargs)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"layer_attention {cls.__name__}: {error}") from error
