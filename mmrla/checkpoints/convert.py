"""Checkpoints of others become mmrla's, and back.

Recognised by their keys: released MRLA ResNets (``layer1.0.mrla.mrla.Wq.weight`` for light,
``stages.0.0.mrla...`` for base), released MRLA vision transformers (``blocks.0.mrla...``), and
plain networks in torchvision's, timm's or mmpretrain's naming. The result is named as mmpretrain's
classifiers are: ``backbone.*`` and ``head.*``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from mmrla.checkpoints.files import CheckpointError, state_dict_of


@dataclass(frozen=True)
class Conversion:
    """What a checkpoint was recognised as."""

    family: str
    """``'resnet'`` or ``'vit'``."""
    layer_attention: str | None
    """``'MRLALight'``, ``'MRLABase'`` or None."""
    style: str
    """Whose key names it has: ``'released'``, ``'torchvision'`` (timm's ResNets too), ``'timm'``
    or ``'mmrla'`` (mmpretrain's too)."""
    description: str
    """For people: depth, width, heads."""


# Released and timm's name -> ours, tried in order on each key (regular expressions).
_ATTENTION = [
    (r"\.mrla\.mrla\.Wq\.", ".mrla.query."),
    (r"\.mrla\.mrla\.Wk\.", ".mrla.key."),
    (r"\.mrla\.mrla\.Wv\.", ".mrla.value."),
]
_RESNET = [
    *_ATTENTION,
    (r"^stages\.(\d+)\.", lambda m: f"layer{int(m[1]) + 1}."),
    (r"^fc\.", "head.fc."),
    (r"^(conv1|[bg]n1|stem|layer\d)\b", r"backbone.\1"),
]
_VIT = [
    *_ATTENTION,
    (r"\.mrla\.(lambda_t|query|key|value)\b", r".mrla.attention.\1"),
    (r"\.mrla\.normx\.", ".mrla.norm."),
    (r"\.mrla\.normo\.", ".mrla.shortcut_norm."),
    (r"^blocks\.", "backbone.layers."),
    (r"\.norm([12])\.", r".ln\1."),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
    (r"\.mlp\.fc2\.", ".ffn.layers.1."),
    (r"^norm\.", "backbone.ln1."),
    (r"^patch_embed\.proj\.", "backbone.patch_embed.projection."),
    (r"^(cls_token|dist_token|pos_embed)$", r"backbone.\1"),
    (r"^head\.", "head.layers.head."),
    (r"^head_dist\.", "head.layers.head_dist."),
]
_BACK_ATTENTION = [
    (r"\.mrla\.query\.", ".mrla.mrla.Wq."),
    (r"\.mrla\.key\.", ".mrla.mrla.Wk."),
    (r"\.mrla\.value\.", ".mrla.mrla.Wv."),
]
_BACK_RESNET = [
    *_BACK_ATTENTION,
    (r"^head\.fc\.", "fc."),
    (r"^backbone\.", ""),
]
_BACK_VIT = [
    (r"\.mrla\.attention\.", ".mrla."),
    *_BACK_ATTENTION,
    (r"\.mrla\.norm\.", ".mrla.normx."),
    (r"\.mrla\.shortcut_norm\.", ".mrla.normo."),
    (r"^backbone\.layers\.", "blocks."),
    (r"^backbone\.ln1\.", "norm."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"^backbone\.patch_embed\.projection\.", "patch_embed.proj."),
    (r"^backbone\.(cls_token|dist_token|pos_embed)$", r"\1"),
    (r"^head\.layers\.head\.", "head."),
    (r"^head\.layers\.head_dist\.", "head_dist."),
]
# What a converted key may look like; anything else was not understood.
_KNOWN = {
    "resnet": (
        r"backbone\.(conv1\.weight|[bg]n1\.\w+|stem\.\d\.(conv|[bg]n)\.\w+|layer[1-4]\.\d+\.("
        r"(conv[123])\.weight|[bg]n(\d|_mrla)\.\w+|downsample\.[0-2]\.\w+"
        r"|mrla\.(lambda_t|(query|key|value)\.weight)))|head\.fc\.(weight|bias)"
    ),
    "vit": (
        r"backbone\.(cls_token|dist_token|pos_embed|patch_embed\.projection\.(weight|bias)"
        r"|ln1\.(weight|bias)|layers\.\d+\.((ln[12]|mrla\.(shortcut_)?norm)\.(weight|bias)"
        r"|attn\.(qkv|proj)\.(weight|bias)|ffn\.layers\.(0\.0|1)\.(weight|bias)"
        r"|mrla\.attention\.(lambda_t|(query|key|value)\.weight)))|head\.layers\.head(_dist)?\.(weight|bias)"
    ),
}
_RESNET_DEPTHS: dict[tuple[int, ...], dict[bool, int]] = {
    (2, 2, 2, 2): {False: 18},
    (3, 4, 6, 3): {False: 34, True: 50},
    (3, 4, 23, 3): {True: 101},
    (3, 8, 36, 3): {True: 152},
}


def _rename(key: str, rules: list[tuple[str, str | Callable[[re.Match], str]]]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _layers(keys: list[str], pattern: str) -> dict[int, int]:
    """Layers a stage (or in all, under 0) from keys that match ``pattern``."""
    found: dict[int, set[int]] = {}
    for key in keys:
        match = re.match(pattern, key)
        if match:
            *stage, layer = map(int, match.groups())
            found.setdefault(stage[0] if stage else 0, set()).add(layer)
    return {stage: len(layers) for stage, layers in sorted(found.items())}


def detect(state: Mapping[str, Tensor]) -> Conversion:
    """Recognise a network from its state dict.

    Args:
        state: Tensors by key, without wrappers (see :func:`mmrla.checkpoints.state_dict_of`).

    Returns:
        What it is.

    Raises:
        CheckpointError: It is none that is known here.
    """
    keys = list(state)
    ours = any(key.startswith("backbone.") for key in keys)
    bare = [key.removeprefix("backbone.") for key in keys]
    light = any(re.search(r"\.mrla\.(attention\.)?lambda_t$", key) for key in bare)
    mrla = any(re.search(r"\.mrla\.", key) for key in bare)
    layer_attention = "MRLALight" if light else "MRLABase" if mrla else None
    released = any(".mrla.mrla.W" in key for key in bare)

    stem = {"conv1.weight", "stem.0.conv.weight"} & set(bare)
    if stem and any(re.match(r"(layer1|stages\.0)\.0\.conv1", k) for k in bare):
        stages = _layers(bare, r"layer(\d)\.(\d+)\.") or _layers(bare, r"stages\.(\d)\.(\d+)\.")
        bottleneck = any(re.search(r"\.conv3\.weight$", key) for key in bare)
        depth = _RESNET_DEPTHS.get(tuple(stages.values()), {}).get(bottleneck)
        if depth is None:
            kind = "bottlenecks" if bottleneck else "basic blocks"
            raise CheckpointError(
                f"a ResNet of {list(stages.values())} {kind} a stage, which is none of "
                "depth 18, 34, 50, 101 and 152"
            )
        name = f"ResNet-{depth}"
        if bottleneck:
            grouped = next(state[k] for k in keys if re.search(r"(layer1|stages\.0)\.0\.conv2", k))
            groups = grouped.shape[0] // grouped.shape[1]
            if groups > 1:
                name = f"ResNeXt-{depth} {groups}x{grouped.shape[1]}d"
        style = "released" if released else "mmrla" if ours or mrla else "torchvision"
        return _described("resnet", layer_attention, style, name)

    if "cls_token" in bare and any(re.match(r"(blocks|layers)\.0\.attn\.qkv", k) for k in bare):
        layers = _layers(bare, r"(?:blocks|layers)\.(\d+)\.")[0]
        width = state[keys[bare.index("cls_token")]].shape[-1]
        name = f"ViT of {layers} blocks, width {width}"
        if "dist_token" in bare:
            name += ", with distillation token"
        ours = ours or "layers.0.attn.qkv.weight" in bare
        style = "released" if released else "mmrla" if ours else "timm"
        return _described("vit", layer_attention, style, name)

    raise CheckpointError(
        "unknown architecture: neither the keys of a ResNet (conv1, layer1 or stages.0) nor of a "
        f"vision transformer (cls_token, blocks.0.attn.qkv); these begin with {', '.join(keys[:4])}"
    )


def _described(family: str, layer_attention: str | None, style: str, name: str) -> Conversion:
    attention = f" + {layer_attention}" if layer_attention else ""
    return Conversion(family, layer_attention, style, f"{name}{attention}, {style} key names")


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a known network to mmrla's names.

    Args:
        state_dict: Tensors by key. Wrappers and ``module.`` prefixes are taken off.

    Returns:
        Tensors under ``backbone.*`` and ``head.*``, as classifiers of mmpretrain have them; the
        values are those given, but for ``lambda_t``, which becomes ``[C]``. What already has these
        names is returned as it is.

    Raises:
        CheckpointError: The network, or one of its keys, is not known.
    """
    state = state_dict_of(state_dict)
    found = detect(state)
    rules = _RESNET if found.family == "resnet" else _VIT
    whole = any(key.startswith("backbone.") for key in state)
    converted, unknown = {}, []
    for key, value in state.items():
        if whole and not key.startswith("backbone."):
            converted[key] = value  # a neck or head, which has its names already
            continue
        name = key.removeprefix("backbone.")
        # In mmpretrain's names the rules would see the final norm, say, as another layer's.
        ours = found.style == "mmrla"
        name = f"backbone.{name}" if ours else _rename(name, rules)  # type: ignore[arg-type]
        if not re.fullmatch(_KNOWN[found.family], name):
            unknown.append(key)
        converted[name] = value.flatten() if name.endswith(".lambda_t") else value
    if unknown:
        raise CheckpointError(
            f"{found.description}: {len(unknown)} keys are not understood: {', '.join(unknown[:6])}"
        )
    return converted


def to_released(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back: mmrla's names become those of the released implementation.

    Args:
        state_dict: Tensors under ``backbone.*`` and ``head.*``.

    Returns:
        Tensors under the released names: ``layer1.*`` for ResNet with MRLA-light or without,
        ``stages.0.*`` with MRLA-base, ``blocks.*`` for vision transformers.

    Raises:
        CheckpointError: The network is not known.
    """
    state = state_dict_of(state_dict)
    found = detect(state)
    if found.style != "mmrla":
        raise CheckpointError(f"these are no mmrla key names: {found.description}")
    rules = _BACK_RESNET if found.family == "resnet" else _BACK_VIT
    released = {}
    for key, value in state.items():
        name = _rename(key, rules)  # type: ignore[arg-type]
        if found.family == "resnet":
            if found.layer_attention == "MRLABase":
                name = re.sub(r"^layer(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.", name)
            if name.endswith("mrla.lambda_t"):
                value = value.reshape(-1, 1, 1)
        released[name] = value
    return released
