"""Key names of the networks that can be converted, a family at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mmrla.checkpoints.files import CheckpointError

Rule = tuple[str, str | Callable[[re.Match], str]]
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Family:
    """How the keys of one kind of network are recognised and renamed.

    Args:
        name: What :class:`mmrla.checkpoints.convert.Conversion` calls it.
        describe: From keys without ``backbone.`` and their tensors to a name with depth and width;
            None where they are of another family.
        style: Whose names the keys are: ``'torchvision'``, ``'timm'``, ``'original'`` (the
            network's authors') or ``'mmrla'`` (mmpretrain's, mmdet's).
        to_ours: Others' names to ours, under ``backbone.`` and ``head.``.
        known: Regular expression that each converted key matches whole.
        to_released: Ours to the released implementation's; None where it has none.
    """

    name: str
    describe: Callable[[State], str | None]
    style: Callable[[State], str]
    to_ours: Callable[[State], dict[str, Tensor]]
    known: str
    to_released: Callable[[State], dict[str, Tensor]] | None = None


def rename(key: str, rules: Sequence[Rule]) -> str:
    """Apply regular expressions to a key, in order."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _renamed(state: State, rules: Sequence[Rule]) -> dict[str, Tensor]:
    return {rename(key, rules): value for key, value in state.items()}


def _layers(keys: State, pattern: str) -> dict[int, int]:
    """Layers a stage (or in all, under 0) from keys that match ``pattern``."""
    found: dict[int, set[int]] = {}
    for key in keys:
        match = re.match(pattern, key)
        if match:
            *stage, layer = map(int, match.groups())
            found.setdefault(stage[0] if stage else 0, set()).add(layer)
    return {stage: len(layers) for stage, layers in sorted(found.items())}


def _any(state: State, pattern: str) -> bool:
    return any(re.search(pattern, key) for key in state)


# What may stand behind a host's name for its layer attention.
_ATTENTION = r"(lambda_t|(query|key|value)\.weight)"
_RELEASED_ATTENTION: list[Rule] = [
    (r"\.mrla\.m[rl]+a\.Wq\.", ".mrla.query."),
    (r"\.mrla\.m[rl]+a\.Wk\.", ".mrla.key."),
    (r"\.mrla\.m[rl]+a\.Wv\.", ".mrla.value."),
]
_BACK_ATTENTION: list[Rule] = [
    (r"\.mrla\.query\.", ".mrla.mrla.Wq."),
    (r"\.mrla\.key\.", ".mrla.mrla.Wk."),
    (r"\.mrla\.value\.", ".mrla.mrla.Wv."),
]
_INTO_BRANCH: Rule = (r"\.mrla\.(lambda_t|query|key|value)\b", r".mrla.attention.\1")
_OUT_OF_BRANCH: Rule = (r"\.mrla\.attention\.", ".mrla.")


# ResNet and ResNeXt, for ImageNet and CIFAR.

_RESNET: list[Rule] = [
    *_RELEASED_ATTENTION,
    (r"^stages\.(\d+)\.", lambda m: f"layer{int(m[1]) + 1}."),
    (r"^fc\.", "head.fc."),
    (r"^(conv1|[bg]n1|stem|layer\d)\b", r"backbone.\1"),
]
_BACK_RESNET: list[Rule] = [*_BACK_ATTENTION, (r"^head\.fc\.", "fc."), (r"^backbone\.", "")]
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
    if not _any(state, r"^(layer1|stages\.0)\.0\.conv1"):
        return None
    stages = _layers(state, r"layer(\d)\.(\d+)\.") or _layers(state, r"stages\.(\d)\.(\d+)\.")
    bottleneck = _any(state, r"\.conv3\.weight$")
    depth = _RESNET_DEPTHS.get(tuple(stages.values()), {}).get(bottleneck)
    if depth is None:
        kind = "bottlenecks" if bottleneck else "basic blocks"
        raise CheckpointError(
            f"a ResNet of {list(stages.values())} {kind} a stage, which is none of "
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
    light = _any(state, r"\.mrla\.lambda_t$")
    base = not light and _any(state, r"\.mrla\.")
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
    style=lambda state: "mmrla" if _any(state, r"\.mrla\.(?!m[rl]+a\.)") else "torchvision",
    to_ours=lambda state: _renamed(state, _RESNET),
    known=(
        r"backbone\.(conv1\.weight|[bg]n1\.\w+|stem\.\d\.(conv|[bg]n)\.\w+|layer[1-4]\.\d+\.("
        r"(conv[123])\.weight|[bg]n(\d|_mrla)\.\w+|downsample\.[0-2]\.\w+"
        rf"|mrla\.{_ATTENTION}))|head\.fc\.(weight|bias)"
    ),
    to_released=_released_resnet,
)


# Vision transformers: ViT and DeiT.

_TOKENS: list[Rule] = [(r"^(cls_token|dist_token|pos_embed)$", r"backbone.\1")]
_VIT: list[Rule] = [
    *_RELEASED_ATTENTION,
    _INTO_BRANCH,
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
    _OUT_OF_BRANCH,
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
_VIT_BRANCH = rf"mrla\.((shortcut_)?norm\.(weight|bias)|attention\.{_ATTENTION})"


def _describe_vit(state: State) -> str | None:
    if "pos_embed" not in state or not _any(state, r"^(blocks|layers)\.0\.attn\.qkv"):
        return None
    layers = _layers(state, r"(?:blocks|layers)\.(\d+)\.")[0]
    name = f"ViT of {layers} blocks, width {state['pos_embed'].shape[-1]}"
    return name + (", with distillation token" if "dist_token" in state else "")


VIT = Family(
    "vit",
    _describe_vit,
    style=lambda state: "mmrla" if "layers.0.attn.qkv.weight" in state else "timm",
    to_ours=lambda state: _renamed(state, _VIT),
    known=(
        r"backbone\.(cls_token|dist_token|pos_embed|patch_embed\.projection\.(weight|bias)"
        r"|ln1\.(weight|bias)|layers\.\d+\.(ln[12]\.(weight|bias)"
        r"|attn\.(qkv|proj)\.(weight|bias)|ffn\.layers\.(0\.0|1)\.(weight|bias)"
        rf"|{_VIT_BRANCH}))|head\.layers\.head(_dist)?\.(weight|bias)"
    ),
    to_released=lambda state: _renamed(state, _BACK_VIT),
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
    if _any(state, r"\.bn_v\."):
        raise CheckpointError(
            "a released CeiT with MRLA: it normalises the value and the residual path otherwise "
            "than the paper's Algorithm 4, which mmrla.MRLACeiT follows; it cannot be converted"
        )
    layers = _layers(state, r"(?:blocks|layers)\.(\d+)\.")[0]
    return f"CeiT of {layers} blocks, width {state['cls_token'].shape[-1]}"


CEIT = Family(
    "ceit",
    _describe_ceit,
    style=lambda state: "mmrla" if "stem.conv.weight" in state else "original",
    to_ours=lambda state: _renamed(state, _CEIT),
    known=(
        r"backbone\.(cls_token|pos_embed|lca\.pos_embed|stem\.(conv|bn)\.\w+"
        r"|patch_embed\.projection\.(weight|bias)|ln1\.(weight|bias)"
        r"|(layers\.\d+|lca)\.(ln[12]\.(weight|bias)|attn\.(qkv|proj)\.(weight|bias)"
        r"|ffn\.(conv|bn)[123]\.\w+|ffn\.layers\.(0\.0|1)\.(weight|bias)"
        rf"|{_VIT_BRANCH}))|head\.layers\.head\.(weight|bias)"
    ),
)


# EfficientNet. mmpretrain joins the stages of stride 1 to those before them.

_TIMM_STAGE = {0: (1, None), 1: (2, None), 2: (3, None), 3: (4, None), 4: (4, 3), 5: (5, None),
               6: (5, 5)}  # fmt: skip
_OUR_STAGE = {1: (0,), 2: (1,), 3: (2,), 4: (3, 4), 5: (5, 6)}
_PARTS = {"conv_pw": "expand_conv.conv", "bn1": "expand_conv.bn", "conv_dw": "depthwise_conv.conv",
          "bn2": "depthwise_conv.bn", "conv_pwl": "linear_conv.conv", "bn3": "linear_conv.bn",
          "se.conv_reduce": "se.conv1.conv", "se.conv_expand": "se.conv2.conv"}  # fmt: skip
# Of layers without an expansion.
_NARROW_PARTS = {**_PARTS, "bn1": "depthwise_conv.bn", "conv_pw": "linear_conv.conv",
                 "bn2": "linear_conv.bn"}  # fmt: skip
_WHOLE = {"conv_stem": "layers.0.conv", "bn1": "layers.0.bn", "conv_head": "layers.6.conv",
          "bn2": "layers.6.bn"}  # fmt: skip


def _describe_efficientnet(state: State) -> str | None:
    stems = {"conv_stem.weight", "features.0.0.weight", "layers.0.conv.weight"} & set(state)
    if not stems or not _any(state, r"(se|block\.[12])\.(conv_reduce|fc1|conv1\.conv)\.weight"):
        return None
    width = state[stems.pop()].shape[0]
    names = _from_torchvision(state) if "features.0.0.weight" in state else state
    pattern = r"blocks\.(\d)\.(\d+)\." if "conv_stem.weight" in names else r"layers\.([1-5])\.(\d+)"
    return f"EfficientNet of {sum(_layers(names, pattern).values())} layers, stem {width}"


def _from_torchvision(state: State) -> dict[str, Tensor]:
    """Torchvision's names to timm's."""
    renamed = {}
    for key, value in state.items():
        match = re.match(r"features\.([1-7])\.(\d+)\.block\.(\d)\.(\S+)$", key)
        if match:
            stage, layer, part, rest = match.groups()
            prefix = f"features.{stage}.{layer}.block."
            wide = _any(state, rf"^{re.escape(prefix)}3\.")
            role = ("expand", "dw", "se", "project")[int(part) + (0 if wide else 1)]
            if role == "se":
                rest = rest.replace("fc1", "se.conv_reduce").replace("fc2", "se.conv_expand")
            else:
                names = {
                    "expand": ("conv_pw", "bn1"),
                    "dw": ("conv_dw", "bn2" if wide else "bn1"),
                    "project": ("conv_pwl", "bn3") if wide else ("conv_pw", "bn2"),
                }
                number, _, leaf = rest.partition(".")
                rest = f"{names[role][int(number)]}.{leaf}"
            key = f"blocks.{int(stage) - 1}.{layer}.{rest}"
        for old, new in (("features.0.0.", "conv_stem."), ("features.0.1.", "bn1."),
                         ("features.8.0.", "conv_head."), ("features.8.1.", "bn2."),
                         ("classifier.1.", "classifier.")):  # fmt: skip
            if key.startswith(old):
                key = new + key[len(old) :]
        renamed[key] = value
    return renamed


def _efficientnet_to_ours(state: State) -> dict[str, Tensor]:
    if "features.0.0.weight" in state:
        state = _from_torchvision(state)
    counts = _layers(state, r"blocks\.(\d)\.(\d+)\.")
    wide = {m[1] for key in state if (m := re.match(r"(blocks\.\d\.\d+)\.conv_pwl\.", key))}
    renamed = {}
    for key, value in state.items():
        match = re.match(r"(blocks\.(\d)\.(\d+))\.(\S+)\.(\w+)$", key)
        if match:
            block, part, leaf = match[1], match[4], match[5]
            ours, follows = _TIMM_STAGE[int(match[2])]
            # The stages before those that mmpretrain joins to them.
            layer = int(match[3]) + (counts[follows] if follows is not None else 0)
            if part.startswith(("mrla", "bn_mrla")):
                part = rename(f".{part}.{leaf}", [*_RELEASED_ATTENTION, _INTO_BRANCH])[1:]
                part = part.replace("bn_mrla", "mrla.norm")
            else:
                parts = _PARTS if block in wide else _NARROW_PARTS
                part = f"{parts.get(part, part)}.{leaf}"
            key = f"backbone.layers.{ours}.{layer}.{part}"
        else:
            head, _, leaf = key.rpartition(".")
            key = f"head.fc.{leaf}" if head == "classifier" else key
            key = f"backbone.{_WHOLE[head]}.{leaf}" if head in _WHOLE else key
        renamed[key] = value
    return renamed


def _released_efficientnet(state: State) -> dict[str, Tensor]:
    """Timm's names, with the released code's for the layer attention."""
    wide = {m[1] for k in state if (m := re.match(r"backbone\.(layers\.\d\.\d+)\.expand_conv", k))}
    widths: dict[int, list[int]] = {}
    for key, value in state.items():
        match = re.match(r"backbone\.layers\.(\d)\.(\d+)\.linear_conv\.conv\.weight", key)
        if match:
            widths.setdefault(int(match[1]), []).append(value.shape[0])
    renamed = {}
    for key, value in state.items():
        name = key.removeprefix("backbone.")
        match = re.match(r"(layers\.([1-5])\.(\d+))\.(\S+)\.(\w+)$", name)
        if match:
            stage, layer, part, leaf = int(match[2]), int(match[3]), match[4], match[5]
            stages = _OUR_STAGE[stage]
            before = widths[stage].index(widths[stage][-1]) if len(stages) == 2 else 0
            second = len(stages) == 2 and layer >= before
            if part.startswith("mrla"):
                tail = f".{part}.{leaf}"
                tail = rename(tail, [_OUT_OF_BRANCH, *_BACK_ATTENTION]).replace(
                    ".mrla.norm", ".bn_mrla"
                )
                tail = tail.replace(".mrla.mrla.", ".mrla.mla.")
                if leaf == "lambda_t":
                    value = value.reshape(-1, 1, 1)
            else:
                parts = _PARTS if match[1] in wide else _NARROW_PARTS
                names = {ours: theirs for theirs, ours in parts.items() if theirs != "conv_pwl"
                         or match[1] in wide}  # fmt: skip
                tail = f".{names[part]}.{leaf}"
            name = f"blocks.{stages[second]}.{layer - before * second}{tail}"
        else:
            head, _, leaf = name.rpartition(".")
            whole = {ours: theirs for theirs, ours in _WHOLE.items()}
            name = f"{whole[head]}.{leaf}" if head in whole else name
            name = name.replace("head.fc.", "classifier.")
        renamed[name] = value
    return renamed


EFFICIENTNET = Family(
    "efficientnet",
    _describe_efficientnet,
    style=lambda state: (
        "mmrla"
        if "layers.0.conv.weight" in state
        else "torchvision"
        if "features.0.0.weight" in state
        else "timm"
    ),
    to_ours=_efficientnet_to_ours,
    known=(
        r"backbone\.layers\.([06]\.(conv|bn)\.\w+|[1-5]\.\d+\.("
        r"(expand|depthwise|linear)_conv\.(conv|bn)\.\w+|se\.conv[12]\.conv\.(weight|bias)"
        rf"|mrla\.(norm\.\w+|attention\.{_ATTENTION})))|head\.fc\.(weight|bias)"
    ),
    to_released=_released_efficientnet,
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
    if not first or not _any(state, r"\.(mlp\.dwconv|ffn\.layers\.1)\."):
        return None
    if "cls_token" in state:
        return None
    for pattern in (r"block(\d)\.(\d+)\.", r"stages\.(\d)\.blocks\.(\d+)\.",
                    r"layers\.(\d)\.1\.(\d+)\."):  # fmt: skip
        stages = _layers(state, pattern)
        if stages:
            break
    return f"PVTv2 of {list(stages.values())} blocks, width {state[first.pop()].shape[0]}"


def _pvt_to_ours(state: State) -> dict[str, Tensor]:
    # The authors' q and kv make one matrix in mmdet; its own converter does that.
    from mmdet.models.backbones.pvt import pvt_convert

    original = _renamed(state, _TIMM_PVT)
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
