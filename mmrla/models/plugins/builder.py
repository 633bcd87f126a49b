"""Builds modules from a host's ``plugins=[dict(cfg=..., stages=..., position=...)]``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mmcv.cnn.bricks.plugin import infer_abbr
from torch import nn

from mmrla.models.plugins.contract import BranchPlugin, ConvPlugin
from mmrla.registry import MODELS

_KEYS = {"cfg", "position", "stages", "blocks"}
_FORM = "dict(cfg=dict(type='mmrla.ECA'), stages=(True, True, True, True), position='after_conv3')"


def plugin_class(cfg: Mapping[str, Any]) -> type[nn.Module]:
    """The class that a plugin's ``cfg`` names: mmrla's, mmcv's or any mm package's.

    Raises:
        TypeError: ``cfg`` is not a mapping with a ``type``.
        ValueError: The type is unknown.
    """
    if not isinstance(cfg, Mapping) or "type" not in cfg:
        raise TypeError(f"plugins: a plugin's cfg must be a dict with a type, got {cfg!r}")
    kind = cfg["type"]
    if isinstance(kind, type):
        return kind
    # mmrla's first, whatever the default scope; its registry asks its parent, mmengine's, then.
    found = MODELS.get(kind)
    if found is None:
        names = sorted(
            n for n, c in MODELS.module_dict.items() if ".models.plugins." in c.__module__
        )
        raise ValueError(
            f"plugins: unknown plugin {kind!r}; allowed: {', '.join(names)}, mmcv's ContextBlock "
            "and NonLocal2d, or another registered module"
        )
    return found


def plugin_name(plugin: Mapping[str, Any]) -> str:
    """The attribute name of a checked plugin in a block: its abbreviation and ``postfix``.

    A plugin that replaces a convolution has that convolution's name.
    """
    cls = plugin_class(plugin["cfg"])
    if issubclass(cls, ConvPlugin):
        return plugin["position"]
    return f"{infer_abbr(cls)}{plugin['cfg'].get('postfix', '')}"


def is_plugin_key(key: str, names: Collection[str]) -> bool:
    """Whether a state-dict key belongs to a plugin of one of ``names`` (:func:`plugin_name`).

    A convolution's own ``conv2.weight`` does not; a plugin that replaces it adds one level.
    """
    parts = key.split(".")
    return any(
        part in names and (not part.startswith("conv") or len(parts) > i + 2)
        for i, part in enumerate(parts)
    )


def check_plugins(
    plugins: Sequence[Mapping[str, Any]] | None, stages: int, convs: int
) -> tuple[dict[str, Any], ...]:
    """Check ``plugins`` of a host and return them with their positions.

    The default position is after the last convolution or, for a plugin that replaces a convolution,
    that of the 3x3 convolution, which is the second.

    Args:
        plugins: The host's argument.
        stages: Number of stages of the host.
        convs: Number of convolutions per block.

    Raises:
        TypeError: ``plugins`` is not a sequence of such mappings.
        ValueError: A key, a type, a position or the length of ``stages`` is not allowed.
    """
    if plugins is None:
        return ()
    if isinstance(plugins, (str, Mapping)) or not isinstance(plugins, Sequence):
        raise TypeError(f"plugins must be a list of {_FORM}, got {plugins!r}")
    checked = []
    for plugin in plugins:
        if not isinstance(plugin, Mapping) or "cfg" not in plugin:
            raise TypeError(f"plugins must be a list of {_FORM}, got {plugin!r} in it")
        if unknown := plugin.keys() - _KEYS:
            raise ValueError(f"plugins: unknown key {min(unknown)!r}; allowed: {sorted(_KEYS)}")
        checked.append({**plugin, "position": _position(plugin, convs)})
        chosen = plugin.get("stages")
        if chosen is not None and (
            isinstance(chosen, str) or not isinstance(chosen, Sequence) or len(chosen) != stages
        ):
            raise ValueError(
                f"plugins: stages must have one entry for each of {stages} stages, got {chosen!r}"
            )
        blocks = plugin.get("blocks")
        if blocks is not None and (
            not isinstance(blocks, Sequence) or not all(type(index) is int for index in blocks)
        ):
            raise ValueError(f"plugins: blocks must be indices of blocks, got {blocks!r}")
    return tuple(checked)


def _position(plugin: Mapping[str, Any], convs: int) -> str:
    cls = plugin_class(plugin["cfg"])
    default = "conv2" if issubclass(cls, ConvPlugin) else f"after_conv{convs}"
    position = plugin.get("position", default)
    allowed = [f"after_conv{i + 1}" for i in range(convs)]
    if issubclass(cls, ConvPlugin):
        allowed = [f"conv{i + 1}" for i in range(convs)]
    elif issubclass(cls, BranchPlugin):
        allowed = allowed[-1:]
    else:
        allowed.append("after_block")
    if position not in allowed:
        raise ValueError(
            f"plugins: position of {cls.__name__} must be one of {allowed} in a block of {convs} "
            f"convolutions, got {position!r}"
        )
    return position


def plugins_of_stage(plugins: Sequence[dict[str, Any]], stage: int) -> list[dict[str, Any]]:
    """Those of checked ``plugins`` that are in stage number ``stage``, from 0."""
    return [p for p in plugins if p.get("stages") is None or p["stages"][stage]]


def plugins_of_block(
    plugins: Sequence[dict[str, Any]], block: int, count: int
) -> list[dict[str, Any]]:
    """Those of a stage's ``plugins`` that are in block number ``block`` of ``count``.

    Raises:
        ValueError: An index in ``blocks`` is out of range.
    """
    found = []
    for plugin in plugins:
        blocks = plugin.get("blocks")
        if blocks is not None and not all(-count <= index < count for index in blocks):
            raise ValueError(
                f"plugins: blocks must be from {-count} to {count - 1} in a stage of {count} "
                f"blocks, got {tuple(blocks)}"
            )
        if blocks is None or block in [index % count for index in blocks]:
            found.append(plugin)
    return found
