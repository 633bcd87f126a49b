"""Converts key names between timm's networks and mmrla's hosts."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from mmrla.checkpoints.families import PLAIN_VIT_BACK, RESNET, VIT, rename_all
from mmrla.checkpoints.family import Family
from mmrla.checkpoints.files import CheckpointError, state_dict_of
from mmrla.checkpoints.report import is_mrla_key

# Deep stems: timm's conv1 is three convolutions with two norms between, mmpretrain's stem three
# pairs of convolution and norm, whose last norm is timm's bn1.
_STEM = {"conv1.0": "stem.0.conv", "conv1.1": "stem.0.bn", "conv1.3": "stem.1.conv",
         "conv1.4": "stem.1.bn", "conv1.6": "stem.2.conv", "bn1": "stem.2.bn"}  # fmt: skip


def to_mmrla(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a ResNet or ViT of :mod:`mmrla.timm` under the names of mmrla's hosts.

    Args:
        state_dict: Tensors by timm's names, of the plain network or with a layer attention.

    Returns:
        Tensors by ``backbone.*`` and ``head.*``, as mmpretrain's classifiers have them.

    Raises:
        CheckpointError: These are not the names of timm's ResNet or ViT, or no host has some of
            them, such as the layer scale of DeiT III.
    """
    state = state_dict_of(state_dict)
    if _is_vit(state, "blocks."):
        return _checked(VIT.to_ours(state), VIT)
    if "layer1.0.conv1.weight" not in state:
        raise CheckpointError(
            "no weights of timm's ResNet (layer1.0.conv1) or ViT (blocks.0.attn.qkv); these begin "
            f"with {', '.join(list(state)[:4])}"
        )
    renamed = {}
    deep, shift = "conv1.0.weight" in state, _pool_comes_first(state)
    for key, value in state.items():
        if key.startswith("fc."):
            renamed[f"head.{key}"] = value
            continue
        part, _, leaf = key.rpartition(".")
        if deep and part in _STEM:
            key = f"{_STEM[part]}.{leaf}"
        renamed[f"backbone.{_shifted(key, -1) if shift else key}"] = value
    return _checked(renamed, RESNET)


def from_mmrla(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of mmrla's ResNet, ResNeXt or ViT under the names of :mod:`mmrla.timm`.

    Args:
        state_dict: Tensors by the names of the host, or of a classifier of mmpretrain or a detector
            of mmdet around it; for a detector, only the backbone is kept.

    Returns:
        Tensors by timm's names.

    Raises:
        CheckpointError: These are not the names of such a host.
    """
    state = state_dict_of(state_dict)
    if any(key.startswith("backbone.") for key in state):
        state = {
            key.removeprefix("backbone."): value
            for key, value in state.items()
            if re.match(r"backbone\.|head\.(fc|layers\.head(_dist)?)\.", key)
        }
    if _is_vit(state, "layers."):
        return rename_all(state, PLAIN_VIT_BACK)
    if "layer1.0.conv1.weight" not in state:
        raise CheckpointError(
            "no weights of mmrla's ResNet (layer1.0.conv1) or ViT (layers.0.attn.qkv); these begin "
            f"with {', '.join(list(state)[:4])}"
        )
    stem = {ours: theirs for theirs, ours in _STEM.items()}
    # With a pool before each projection that has a stride, timm counts one in the first stage too.
    shift = "layer2.0.downsample.2.weight" in state
    renamed = {}
    for key, value in state.items():
        key = key.removeprefix("head.")
        part, _, leaf = key.rpartition(".")
        key = f"{stem[part]}.{leaf}" if part in stem else key
        renamed[_shifted(key, 1) if shift else key] = value
    return renamed


def _checked(renamed: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Weights by names of mmrla's hosts, if all names are."""
    unknown = [k for k in renamed if not (is_mrla_key(k) or re.fullmatch(family.known, k))]
    if unknown:
        raise CheckpointError(
            f"no host of mmrla has {', '.join(unknown[:4])} ({len(unknown)} such keys), so these "
            "weights cannot be converted; use the network with timm"
        )
    return renamed


def _is_vit(state: Mapping[str, Tensor], blocks: str) -> bool:
    return f"{blocks}0.attn.qkv.weight" in state and "pos_embed" in state


def _pool_comes_first(state: Mapping[str, Tensor]) -> bool:
    """Whether the first stage's projection has something without weights before it."""
    return "layer1.0.downsample.2.weight" in state


def _shifted(key: str, by: int) -> str:
    pattern = r"^layer1\.0\.downsample\.(\d+)"
    return re.sub(pattern, lambda m: f"layer1.0.downsample.{int(m[1]) + by}", key)
