"""Key names of the networks that can be converted, by family."""

from __future__ import annotations

import re

from torch import Tensor

from mmrla.checkpoints.efficientnet import EFFICIENTNET
from mmrla.checkpoints.family import (
    ATTENTION,
    BACK_ATTENTION,
    INTO_BRANCH,
    OUT_OF_BRANCH,
    RELEASED_ATTENTION,
    Family,
    Rule,
    State,
    any_key,
    count_layers,
    rename,
    rename_all,
)
from mmrla.checkpoints.files import CheckpointError

# ResNet and ResNeXt, for ImageNet and CIFAR.

_RESNET: list[Rule] = [
    *RELEASED_ATTENTION,
    (r"^stages\.(\d+)\.", lambda m: f"layer{int(m[1]) + 1}."),
    (r"^fc\.", "head.fc."),
    (r"^(conv1|[bg]n1|stem|layer\d)\b", r"backbone.\1"),
]
_BACK_RESNET: list[Rule] = [*BACK_ATTENTION, (r"^head\.fc\.", "fc."), (r"^backbone\.", "")]
_RESNET_DEPTHS: dict[tuple[int, ...], dict[bool, str]] = {
    (2, 2, 2, 2): {False: "18"},
    (3, 4, 6, 3): {False: "34", True: "50"},
    (3, 4, 23, 3): {True: "101"},
    (3, 8, 36, 3): {True: "152"},
    (3, 3, 3): {False: "20 (CIFAR)"},
    (9, 9, 9): {False: "56 (CIFAR)"},
    (18, 18, 18): {False: "110 (CIFAR)"},
    (2, 2, 2): {True: "20 (CIFAR, bottlenecks)"},
    (6, 6, 6): {True: "56 (CIFAR, bottlenecks)"},
    (12, 12, 12): {True: "110 (CIFAR, bottlenecks)"},
}


def _describe_resnet(state: State) -> str | None:
    if not {"conv1.weight", "stem.0.conv.weight"} & set(state):
        return None
    if not any_key(state, r"^(layer1|stages\.0)\.0\.conv1"):
        return None
    stages = count_layers(state, r"layer(\d)\.(\d+)\.") or count_layers(
        state, r"stages\.(\d)\.(\d+)\."
    )
    bottleneck = any_key(state, r"\.conv3\.weight$")
    depth = _RESNET_DEPTHS.get(tuple(stages.values()), {}).get(bottleneck)
    if depth is None:
        kind = "bottlenecks" if bottleneck else "basic blocks"
        raise CheckpointError(
            f"a ResNet of {list(stages.values())} {kind} per stage, which is none of "
            "depth 18, 34, 50, 101 and 152, nor 20, 56 and 110 for CIFAR"
        )
    if bottleneck:
        grouped = next(v for k, v in state.items() if re.match(r"(layer1|stages\.0)\.0\.conv2", k))
        groups = grouped.shape[0] // grouped.shape[1]
        if groups > 1:
            return f"ResNeXt-{depth} {groups}x{grouped.shape[1]}d"
    return f"ResNet-{depth}"


def _released_resnet(state: State) -> dict[str, Tensor]:
    released = {}
    light = any_key(state, r"\.mrla\.lambda_t$")
    base = not light and any_key(state, r"\.mrla\.")
    for key, value in state.items():
        name = rename(key, _BACK_RESNET)
        if base:
            name = re.sub(r"^layer(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.", name)
        released[name] = value.reshape(-1, 1, 1) if name.endswith("mrla.lambda_t") else value
    return released


RESNET = Family(
    "resnet",
    _describe_resnet,
    # In the released names everything of a layer attention is in a module of its own.
    style=lambda state: "mmrla" if any_key(state, r"\.mrla\.(?!m[rl]+a\.)") else "torchvision",
    to_ours=lambda state: rename_all(state, _RESNET),
    known=(
        r"backbone\.(conv1\.weight|[bg]n1\.\w+|stem\.\d\.(conv|[bg]n)\.\w+|layer[1-4]\.\d+\.("
        r"(conv[123])\.weight|[bg]n(\d|_mrla)\.\w+|downsample\.[0-2]\.\w+"
        rf"|mrla\.{ATTENTION}))|head\.fc\.(weight|bias)"
    ),
    to_released=_released_resnet,
)


# Vision transformers: ViT and DeiT.

_TOKENS: list[Rule] = [(r"^(cls_token|dist_token|pos_embed)$", r"backbone.\1")]
_VIT: list[Rule] = [
    *INTO_BRANCH,
    (r"\.mrla\.normx\.", ".mrla.norm."),
    (r"\.mrla\.normo\.", ".mrla.shortcut_norm."),
    (r"^blocks\.", "backbone.layers."),
    (r"\.norm([12])\.", r".ln\1."),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
    (r"\.mlp\.fc2\.", ".ffn.layers.1."),
    (r"^norm\.", "backbone.ln1."),
    (r"^patch_embed\.proj\.", "backbone.patch_embed.projection."),
    *_TOKENS,
    (r"^head\.", "head.layers.head."),
    (r"^head_dist\.", "head.layers.head_dist."),
]
_BACK_VIT: list[Rule] = [
    *OUT_OF_BRANCH,
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
_VIT_BRANCH = rf"mrla\.((shortcut_)?norm\.(weight|bias)|attention\.{ATTENTION})"


def _describe_vit(state: State) -> str | None:
    if "pos_embed" not in state or not any_key(state, r"^(blocks|layers)\.0\.attn\.qkv"):
        return None
    return _transformer("ViT", state) + ", with distillation token" * ("dist_token" in state)


def _transformer(kind: str, state: State) -> str:
    layers = count_layers(state, r"(?:blocks|layers)\.(\d+)\.")[0]
    token = state["pos_embed" if "pos_embed" in state else "cls_token"]
    return f"{kind} of {layers} blocks, width {token.shape[-1]}"


VIT = Family(
    "vit",
    _describe_vit,
    style=lambda state: "mmrla" if "layers.0.attn.qkv.weight" in state else "timm",
    to_ours=lambda state: rename_all(state, _VIT),
    to_released=lambda state: rename_all(state, _BACK_VIT),
    known=(
        r"backbone\.(cls_token|dist_token|pos_embed|patch_embed\.projection\.(weight|bias)"
        r"|ln1\.(weight|bias)|layers\.\d+\.(ln[12]\.(weight|bias)"
        r"|attn\.(qkv|proj)\.(weight|bias)|ffn\.layers\.(0\.0|1)\.(weight|bias)"
        rf"|{_VIT_BRANCH}))|head\.layers\.head(_dist)?\.(weight|bias)"
    ),
)


# CeiT.

_CEIT: list[Rule] = [
    (r"^i2t\.backbone\.", "backbone.stem."),
    (r"^i2t\.proj\.", "backbone.patch_embed.projection."),
    (r"^pos_layer_embed$", "backbone.lca.pos_embed"),
    (r"^blocks\.", "backbone.layers."),
    (r"^lca\.", "backbone.lca."),
    (r"\.norm([12])\.", r".ln\1."),
    (r"\.leff\.", ".ffn."),
    (r"\.feedforward\.fc1\.", ".ffn.layers.0.0."),
    (r"\.feedforward\.fc2\.", ".ffn.layers.1."),
    (r"^norm\.", "backbone.ln1."),
    *_TOKENS,
    (r"^head\.", "head.layers.head."),
]


def _describe_ceit(state: State) -> str | None:
    if not {"i2t.backbone.conv.weight", "stem.conv.weight"} & set(state):
        return None
    if "cls_token" not in state:
        return None
    if any_key(state, r"\.bn_v\."):
        raise CheckpointError(
            "a released CeiT with MRLA: it normalises the value and the residual path otherwise "
            "than the paper's Algorithm 4, which mmrla.MRLACeiT follows; it cannot be converted"
        )
    return _transformer("CeiT", state)


CEIT = Family(
    "ceit",
    _describe_ceit,
    style=lambda state: "mmrla" if "stem.conv.weight" in state else "original",
    to_ours=lambda state: rename_all(state, _CEIT),
    known=(
        r"backbone\.(cls_token|pos_embed|lca\.pos_embed|stem\.(conv|bn)\.\w+"
        r"|patch_embed\.projection\.(weight|bias)|ln1\.(weight|bias)"
        r"|(layers\.\d+|lca)\.(ln[12]\.(weight|bias)|attn\.(qkv|proj)\.(weight|bias)"
        r"|ffn\.(conv|bn)[123]\.\w+|ffn\.layers\.(0\.0|1)\.(weight|bias)"
        rf"|{_VIT_BRANCH}))|head\.layers\.head\.(weight|bias)"
    ),
)


# PVTv2.

_TIMM_PVT: list[Rule] = [
    (r"^patch_embed\.", "patch_embed1."),
    (r"^stages\.(\d)\.downsample\.", lambda m: f"patch_embed{int(m[1]) + 1}."),
    (r"^stages\.(\d)\.blocks\.", lambda m: f"block{int(m[1]) + 1}."),
    (r"^stages\.(\d)\.norm\.", lambda m: f"norm{int(m[1]) + 1}."),
    (r"\.mlp\.dwconv\.(weight|bias)$", r".mlp.dwconv.dwconv.\1"),
]


def _describe_pvt(state: State) -> str | None:
    first = {"patch_embed1.proj.weight", "patch_embed.proj.weight", "layers.0.0.projection.weight"}
    first &= set(state)
    if not first or not any_key(state, r"\.(mlp\.dwconv|ffn\.layers\.1)\."):
        return None
    if "cls_token" in state:
        return None
    for pattern in (r"block(\d)\.(\d+)\.", r"stages\.(\d)\.blocks\.(\d+)\.",
                    r"layers\.(\d)\.1\.(\d+)\."):  # fmt: skip
        stages = count_layers(state, pattern)
        if stages:
            break
    return f"PVTv2 of {list(stages.values())} blocks, width {state[first.pop()].shape[0]}"


def _pvt_to_ours(state: State) -> dict[str, Tensor]:
    # The authors' q and kv make one matrix in mmdet; its own converter does that.
    from mmdet.models.backbones.pvt import pvt_convert

    original = rename_all(state, _TIMM_PVT)
    ours = {f"backbone.{key}": value for key, value in pvt_convert(original).items()}
    head = {f"head.fc.{k[5:]}": v for k, v in original.items() if k.startswith("head.")}
    return {**ours, **head}


PVT = Family(
    "pvtv2",
    _describe_pvt,
    style=lambda state: (
        "mmrla"
        if "layers.0.0.projection.weight" in state
        else "timm"
        if "patch_embed.proj.weight" in state
        else "original"
    ),
    to_ours=_pvt_to_ours,
    known=(
        r"backbone\.layers\.\d\.(0\.(projection|norm)\.(weight|bias)|2\.(weight|bias)|1\.\d+\.("
        r"norm[12]\.(weight|bias)|attn\.(attn\.(in_proj_|out_proj\.)|sr\.|norm\.)(weight|bias)"
        rf"|ffn\.layers\.[014]\.(weight|bias)|{_VIT_BRANCH}))|head\.fc\.(weight|bias)"
    ),
)

FAMILIES = (RESNET, CEIT, VIT, EFFICIENTNET, PVT)
