"""Converts checkpoints of other projects to mmrla's, and back.

Recognised by their keys: released MRLA ResNets (``layer1.0.mrla.mrla.Wq.weight`` for light,
``stages.0.0.mrla...`` for base), vision transformers (``blocks.0.mrla...``) and EfficientNets
(``blocks.1.1.mrla.mla.Wq.weight``), and plain networks in torchvision's, timm's, their authors' or
mmpretrain's and mmdet's naming. The result is named as mmpretrain's classifiers are:
``backbone.*`` and ``head.*``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from mmrla.checkpoints.families import FAMILIES
from mmrla.checkpoints.family import Family
from mmrla.checkpoints.files import CheckpointError, state_dict_of


@dataclass(frozen=True)
class Conversion:
    """The network that a checkpoint was recognised as."""

    family: str
    """``'resnet'``, ``'vit'``, ``'ceit'``, ``'efficientnet'`` or ``'pvtv2'``."""
    layer_attention: str | None
    """``'MRLALight'`` (there is a lambda), ``'MRLABase'`` (query and key without one), ``'DWConv'``
    (only a value) or None. By its keys MRLABase cannot be distinguished from MLA, LinearRLA and
    MRLALight without a learned lambda."""
    style: str
    """Whose key names it has: ``'released'`` (with MRLA), ``'torchvision'``, ``'timm'``,
    ``'efficientnet-pytorch'`` (the package of that name), ``'original'`` (of the network's authors)
    or ``'mmrla'`` (mmpretrain's and mmdet's too)."""
    description: str
    """For people: depth, width, heads."""


def detect(state: Mapping[str, Tensor]) -> Conversion:
    """Recognise a network from its state dict.

    Args:
        state: Tensors by key, without wrappers (see :func:`mmrla.checkpoints.state_dict_of`).

    Returns:
        What it is.

    Raises:
        CheckpointError: It is unknown.
    """
    return _recognise(state)[1]


def _layer_attention(keys: Iterable[str]) -> str | None:
    """The class of a network's layer attention, by the parts that its layers have."""
    parts: set[str] = set()
    for key in keys:
        parts.update(re.sub(r".*?\.mrla\.", "", key).split(".") if ".mrla." in key else ())
    attends = any(re.fullmatch(r"query|W_?q", part) for part in parts)
    if not parts:
        return None
    if "recur" in parts:
        return "RecurrentLayerAggregation"
    if "cell" in parts and not attends:
        return "DIAUnit"
    if "gate" in parts:
        return "KCLA"
    family = "DLA" if "cell" in parts else "MRLA"
    if "lambda_t" in parts:
        return f"{family}Light"
    return f"{family}Base" if attends else "DWConv"


def _recognise(state: Mapping[str, Tensor]) -> tuple[Family, Conversion]:
    whole = any(key.startswith("backbone.") for key in state)
    bare = {key.removeprefix("backbone."): value for key, value in state.items()}
    layer_attention = _layer_attention(bare)
    released = any(re.search(r"\.mrla\.m(r)?la\.W", key) for key in bare)
    for family in FAMILIES:
        name = family.describe(bare)
        if name is not None:
            style = "released" if released else "mmrla" if whole else family.style(bare)
            attention = f" + {layer_attention}" if layer_attention else ""
            description = f"{name}{attention}, {style} key names"
            return family, Conversion(family.name, layer_attention, style, description)
    raise CheckpointError(
        "unknown architecture: neither the keys of a ResNet (conv1, layer1 or stages.0), a vision "
        "transformer (cls_token, blocks.0.attn.qkv), CeiT, EfficientNet nor PVTv2; these begin "
        f"with {', '.join(list(state)[:4])}"
    )


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a known network to mmrla's names.

    Args:
        state_dict: Tensors by key. Wrappers and ``module.`` prefixes are removed.

    Returns:
        Tensors under ``backbone.*`` and ``head.*``, as classifiers of mmpretrain have them; values
        are unchanged except ``lambda_t``, which becomes ``[C]``. Keys that already have these names
        are unchanged.

    Raises:
        CheckpointError: The network, or one of its keys, is not known.
    """
    state = state_dict_of(state_dict)
    family, found = _recognise(state)
    whole = any(key.startswith("backbone.") for key in state)
    # A neck or head beside a backbone has its names already.
    converted = {k: v for k, v in state.items() if whole and not k.startswith("backbone.")}
    own = {k.removeprefix("backbone."): v for k, v in state.items() if k not in converted}
    if found.style == "mmrla":
        # In these names the rules would see the final norm, say, as another layer's.
        renamed = {f"backbone.{key}": value for key, value in own.items()}
    else:
        renamed = family.to_ours(own)
    # Names that are ours already are left to whoever loads them.
    foreign = renamed if found.style != "mmrla" else ()
    unknown = [key for key in foreign if not re.fullmatch(family.known, key)]
    if unknown:
        raise CheckpointError(
            f"{found.description}: {len(unknown)} keys are not understood: {', '.join(unknown[:6])}"
        )
    for key, value in renamed.items():
        converted[key] = value.flatten() if key.endswith(".lambda_t") else value
    return converted


def to_released(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse: convert mmrla's names to those of the released implementation.

    Args:
        state_dict: Tensors under ``backbone.*`` and ``head.*``.

    Returns:
        Tensors under the released names: ``layer1.*`` for ResNet with MRLA-light or without,
        ``stages.0.*`` with MRLA-base, ``blocks.*`` for vision transformers and EfficientNets.

    Raises:
        CheckpointError: The network is not known, or no such network was released.
    """
    state = state_dict_of(state_dict)
    family, found = _recognise(state)
    if found.style != "mmrla":
        raise CheckpointError(f"these are not mmrla key names: {found.description}")
    if family.to_released is None or found.layer_attention not in (None, "MRLALight", "MRLABase"):
        raise CheckpointError(f"there are no released names for this: {found.description}")
    return family.to_released(state)
