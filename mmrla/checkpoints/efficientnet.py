"""Key names of EfficientNets."""

from __future__ import annotations

import re

from torch import Tensor

from mmrla.checkpoints.family import (
    ATTENTION,
    INTO_BRANCH,
    OUT_OF_BRANCH,
    Family,
    State,
    any_key,
    count_layers,
    rename,
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
    stems = {"conv_stem.weight", "features.0.0.weight", "layers.0.conv.weight", "_conv_stem.weight"}
    stems &= set(state)
    squeezes = any_key(
        state, r"(se|block\.[12])\.(conv_reduce|fc1|conv1\.conv)\.weight|_se_reduce\."
    )
    if not stems or ("features.0.0.weight" in stems and not squeezes):
        return None
    names = _to_timm(state)
    # Lite0 squeezes nothing. Nor does MobileNetV2, which timm names alike, with kernels of 3 x 3.
    first = [f"{name}.weight" for name in ("blocks.2.0.conv_dw", "layers.3.0.depthwise_conv.conv")]
    if not squeezes and not any(key in names and names[key].shape[-1] == 5 for key in first):
        return None
    pattern = r"blocks\.(\d)\.(\d+)\." if "conv_stem.weight" in names else r"layers\.([1-5])\.(\d+)"
    count = sum(count_layers(names, pattern).values())
    lite = "" if squeezes else "-Lite"
    return f"EfficientNet{lite} of {count} layers, stem {state[stems.pop()].shape[0]}"


def _to_timm(state: State) -> State:
    """Others' names to timm's; those of timm and ours stay."""
    if "features.0.0.weight" in state:
        return _from_torchvision(state)
    return _from_efficientnet_pytorch(state) if "_conv_stem.weight" in state else state


# Of the package efficientnet-pytorch, and of those after it. Layers are numbered through.
_NUMBERED_PARTS = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw",
                   "_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3",
                   "_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}  # fmt: skip
_NARROW_NUMBERED = {**_NUMBERED_PARTS, "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_NUMBERED_WHOLE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head",
                   "_bn1": "bn2", "_fc": "classifier"}  # fmt: skip


def _from_efficientnet_pytorch(state: State) -> dict[str, Tensor]:
    """To timm's names. A layer of another width than the one before it begins a stage."""
    widths = {
        int(m[1]): value.shape[0]
        for key, value in state.items()
        if (m := re.match(r"_blocks\.(\d+)\._project_conv\.weight$", key))
    }
    places: dict[int, tuple[int, int]] = {}
    stage, layer, width = -1, 0, None
    for number in sorted(widths):
        new = widths[number] != width
        stage, layer, width = stage + new, 0 if new else layer + 1, widths[number]
        places[number] = stage, layer
    renamed = {}
    for key, value in state.items():
        match = re.match(r"_blocks\.(\d+)\.(\w+)\.(\w+)$", key)
        if match and int(match[1]) in places:
            wide = f"_blocks.{match[1]}._expand_conv.weight" in state
            parts = _NUMBERED_PARTS if wide else _NARROW_NUMBERED
            place = ".".join(map(str, places[int(match[1])]))
            key = f"blocks.{place}.{parts.get(match[2], match[2])}.{match[3]}"
        else:
            head, _, leaf = key.rpartition(".")
            key = f"{_NUMBERED_WHOLE.get(head, head)}.{leaf}"
        renamed[key] = value
    return renamed


def _from_torchvision(state: State) -> dict[str, Tensor]:
    """Torchvision's names to timm's."""
    renamed = {}
    for key, value in state.items():
        match = re.match(r"features\.([1-7])\.(\d+)\.block\.(\d)\.(\S+)$", key)
        if match:
            stage, layer, part, rest = match.groups()
            prefix = f"features.{stage}.{layer}.block."
            wide = any_key(state, rf"^{re.escape(prefix)}3\.")
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
    state = _to_timm(state)
    counts = count_layers(state, r"blocks\.(\d)\.(\d+)\.")
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
                part = rename(f".{part}.{leaf}", INTO_BRANCH)[1:]
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
                tail = rename(tail, OUT_OF_BRANCH).replace(".mrla.norm", ".bn_mrla")
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
        else "efficientnet-pytorch"
        if "_conv_stem.weight" in state
        else "timm"
    ),
    to_ours=_efficientnet_to_ours,
    known=(
        r"backbone\.layers\.([06]\.(conv|bn)\.\w+|[1-5]\.\d+\.("
        r"(expand|depthwise|linear)_conv\.(conv|bn)\.\w+|se\.conv[12]\.conv\.(weight|bias)"
        rf"|mrla\.(norm\.\w+|attention\.{ATTENTION})))|head\.fc\.(weight|bias)"
    ),
    to_released=_released_efficientnet,
)
