"""Released checkpoints through the converter: recognised, renamed, computing the same, and back."""

from __future__ import annotations

import json
import re
import zlib

import pytest
import torch
import torchvision

from mmrla.checkpoints import convert_state_dict, detect, load_into, to_released
from mmrla.checkpoints.efficientnet import _from_torchvision
from mmrla.checkpoints.files import CheckpointError
from mmrla.registry import MODELS
from tests.conftest import generated, golden, relative_error
from tests.helpers import assert_equal, classifier, filled

ATTENTION = {
    "light": dict(type="MRLALight", head_channels=32),
    "base": dict(type="MRLABase", head_channels=16),
}
KINDS = pytest.mark.parametrize("kind", ["light", "base", None])


def released_resnet(name: str, source: str) -> tuple[dict[str, torch.Tensor], dict]:
    g = golden(name, source)
    keys = list(map(str, g.names["keys"]))
    shapes = map(json.loads, map(str, g.names["shapes"]))
    return {k: generated(k, tuple(s)) for k, s in zip(keys, shapes, strict=True)}, g


def resnet(depth: int, attention: dict | None, kind: str = "MRLAResNet"):
    backbone = dict(type=f"mmrla.{kind}", depth=depth, layer_attention=attention)
    return classifier(backbone, 512 if depth < 50 else 2048)


def state_of(cfg: dict, prefix: str = "backbone.") -> dict[str, torch.Tensor]:
    return {f"{prefix}{k}": v for k, v in MODELS.build(cfg).state_dict().items()}


def there_and_back(state: dict) -> tuple[dict, str]:
    """Released names, and what they are recognised as; converted they are what they were."""
    released = to_released(state)
    assert_equal(convert_state_dict(released), state)
    return released, detect(released)


def filled_by(model, converted: dict):
    report = load_into(model, converted)
    assert not report.missing
    assert not report.unexpected
    return model.eval()


@pytest.mark.parametrize(
    ("layer_attention", "called"),
    [
        (dict(type="MLA", head_channels=8), "MRLABase"),
        (dict(type="LinearRLA", head_channels=1), "MRLABase"),
        (dict(type="MRLALight", projection="fc", fixed_lambda=1), "MRLABase"),
        (dict(type="MRLALight", value_conv=False), "MRLALight"),
        *((dict(type=name), name) for name in
          ("DWConv", "DIAUnit", "RecurrentLayerAggregation", "DLALight", "KCLA", "DLABase")),
    ],
)  # fmt: skip
def test_own_names_of_the_other_attentions_stay(layer_attention, called):
    """With and without the prefix of a classifier; nothing is lost or renamed."""
    state = resnet(18, layer_attention).state_dict()
    backbone = {k.removeprefix("backbone."): v for k, v in state.items() if "backbone." in k}
    for given, prefix in ((state, ""), (backbone, "backbone.")):
        assert detect(given).layer_attention == called
        assert_equal(convert_state_dict(given), given, prefix)
    if not called.startswith("MRLA"):
        with pytest.raises(CheckpointError, match=f"no released names for this: .*{called}"):
            to_released(state)


@pytest.mark.parametrize("source", ["fixture", "shared"])
@pytest.mark.parametrize("kind", ["light", "base"])
def test_golden_resnet50(kind, source):
    state, g = released_resnet(f"resnet50_{kind}", source)
    found = detect(state)
    assert (found.family, found.style) == ("resnet", "released")
    assert found.layer_attention == ATTENTION[kind]["type"]
    assert "ResNet-50" in found.description
    converted = convert_state_dict(
        {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 99}
    )
    model = filled_by(resnet(50, ATTENTION[kind]), converted)
    seed = zlib.crc32(f"resnet50_{kind}.x".encode())
    x = torch.randn(tuple(g["input_shape"]), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        logits = model.head.fc(model.backbone(x)[-1].mean((2, 3)))
    assert relative_error(logits, g["logits"]) < 1e-4
    back, _ = there_and_back(converted)
    assert_equal(back, state)


@pytest.mark.parametrize("kind", ["light", "base"])
def test_golden_vit(kind):
    g = golden(f"vit_{kind}", "shared")
    state = {k.removeprefix("param:"): v for k, v in g.items() if k.startswith("param:")}
    assert detect(state).family == "vit"
    assert detect(state).layer_attention == ATTENTION[kind]["type"]
    converted = convert_state_dict({"model": state})
    backbone = dict(
        type="mmrla.MRLAVisionTransformer", img_size=32, patch_size=8,
        arch=dict(embed_dims=64, num_layers=6, num_heads=2, feedforward_channels=128),
        layer_attention=dict(ATTENTION[kind], head_channels=16),
    )  # fmt: skip
    model = filled_by(classifier(backbone, 64, "VisionTransformerClsHead", 10), converted)
    x = g["x"].clone().requires_grad_()
    out = model.head(model.train().backbone(x))
    assert relative_error(out, g["out"]) < 1e-4
    out.backward(g["grad_out"])
    assert relative_error(x.grad, g["grad_x"]) < 1e-4
    assert_equal(to_released(converted), state)


@pytest.mark.parametrize(
    ("name", "network"),
    [("ResNet-101", (101,)), ("ResNet-18", (18,)), ("ResNet-34", (34,)),
     ("ResNeXt-50 32x4d", (50, "MRLAResNeXt"))],
)  # fmt: skip
@KINDS
def test_others_of_the_family(name, network, kind):
    """There and back for networks that no golden shows."""
    depth, *more = network
    released, found = there_and_back(resnet(depth, ATTENTION.get(kind), *more).state_dict())
    assert name in found.description
    assert found.layer_attention == (ATTENTION[kind]["type"] if kind else None)
    assert any(key.startswith("stages.") for key in released) == (kind == "base")
    assert any(".mrla.mrla.Wq." in key for key in released) == (kind is not None)


@KINDS
def test_deit_tiny(kind):
    attention = dict(ATTENTION[kind], head_channels=16) if kind else None
    cfg = dict(type="MRLAVisionTransformer", arch="deit-tiny", layer_attention=attention)
    released, found = there_and_back(state_of(cfg))
    assert "ViT of 12 blocks, width 192" in found.description
    assert "blocks.11.mlp.fc2.weight" in released
    assert ("blocks.11.mrla.normx.weight" in released) == (kind is not None)
    assert ("blocks.11.mrla.normo.weight" in released) == (kind == "light")


@pytest.mark.parametrize("source", ["torchvision", "timm"])
def test_efficientnet_computes_what_torchvisions_computes(source):
    """torchvision pads evenly and has the usual eps, so the same is asked of ours."""
    theirs = filled(torchvision.models.efficientnet_b1()).eval()
    state = theirs.state_dict()
    if source == "timm":
        state = _from_torchvision(state)
        assert {"conv_stem.weight", "blocks.6.0.se.conv_reduce.weight"} <= set(state)
        assert {"blocks.0.0.conv_pw.weight", "blocks.1.0.conv_pwl.weight"} <= set(state)
    found = detect(state)
    assert (found.family, found.style) == ("efficientnet", source)
    assert "EfficientNet of 23 layers" in found.description
    backbone = dict(type="mmrla.MRLAEfficientNet", arch="b1", layer_attention=None, conv_cfg=None,
                    norm_cfg=dict(type="BN", eps=1e-5))  # fmt: skip
    model = filled_by(classifier(backbone, 1280), convert_state_dict(state))
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert relative_error(model(x), theirs(x)) < 1e-4


@pytest.mark.parametrize("arch", ["b0", "b1", "b4", "lite0"])
@KINDS
def test_efficientnet_there_and_back(kind, arch):
    attention = dict(ATTENTION[kind], head_channels=8) if kind else None
    cfg = dict(type="MRLAEfficientNet", arch=arch, layer_attention=attention)
    released, _ = there_and_back(state_of(cfg))
    assert "blocks.6.0.conv_pwl.weight" in released
    assert ("blocks.4.1.mrla.mla.Wq.weight" in released) == (kind is not None)
    assert ("blocks.4.1.bn_mrla.running_var" in released) == (kind is not None)
    assert ("blocks.4.1.mrla.lambda_t" in released) == (kind == "light")


def test_ceit_in_its_authors_names():
    state = state_of(dict(type="CeiT", arch="tiny"), prefix="")
    theirs = {}
    for key, value in state.items():
        for ours, original in (
            ("stem.", "i2t.backbone."), ("patch_embed.projection.", "i2t.proj."),
            ("lca.pos_embed", "pos_layer_embed"), ("lca.ffn.layers.0.0.", "lca.feedforward.fc1."),
            ("lca.ffn.layers.1.", "lca.feedforward.fc2."), ("layers.", "blocks."),
            ("ln1.", "norm."),
        ):  # fmt: skip
            if key.startswith(ours):
                key = original + key[len(ours) :]
                break
        key = key.replace(".ln1.", ".norm1.").replace(".ln2.", ".norm2.").replace(".ffn.", ".leff.")
        theirs[key] = value
    theirs["head.weight"] = torch.zeros(10, 192)
    found = detect(theirs)
    assert (found.family, found.style) == ("ceit", "original")
    converted = convert_state_dict(theirs)
    assert converted.pop("head.layers.head.weight") is theirs["head.weight"]
    assert_equal(converted, state, "backbone.")
    bn_v = {"blocks.0.mrla.mla.bn_v.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="released CeiT with MRLA: .* cannot be converted"):
        convert_state_dict({**theirs, **bn_v})
    with pytest.raises(CheckpointError, match="no released names for this: CeiT of 12 blocks"):
        to_released(state_of(dict(type="MRLACeiT", arch="tiny")))


@pytest.mark.parametrize("source", ["original", "timm"])
def test_pvtv2_in_others_names(source):
    cfg = dict(type="MRLAPyramidVisionTransformerV2", arch="b0", layer_attention=None)
    state = state_of(cfg, prefix="")
    theirs = {}
    for key, value in state.items():
        _, stage, part, *rest = key.split(".")
        stage, name = int(stage) + 1, ".".join(rest)
        if part == "0":
            theirs[f"patch_embed{stage}.{name.replace('projection', 'proj')}"] = value
        elif part == "2":
            theirs[f"norm{stage}.{name}"] = value
        elif "in_proj" in name:
            leaf = name.rpartition("_")[2]
            q, kv = value.split([len(value) // 3, 2 * len(value) // 3])
            prefix = f"block{stage}.{rest[0]}.attn"
            theirs |= {f"{prefix}.q.{leaf}": q, f"{prefix}.kv.{leaf}": kv}
        else:
            for ours, original in (("attn.attn.out_proj", "attn.proj"),
                                   ("ffn.layers.0", "mlp.fc1"), ("ffn.layers.4", "mlp.fc2"),
                                   ("ffn.layers.1", "mlp.dwconv.dwconv")):  # fmt: skip
                if ours in name:
                    name = name.replace(ours, original)
                    if value.dim() == 4 and ours != "ffn.layers.1":
                        value = value[:, :, 0, 0]
            theirs[f"block{stage}.{name}"] = value
    theirs["head.weight"] = torch.zeros(10, 256)
    if source == "timm":
        timm = {}
        for key, value in theirs.items():
            key = re.sub(r"^patch_embed1\.", "patch_embed.", key)
            for ours, original in (("patch_embed", "downsample"), ("block", "blocks"),
                                   ("norm", "norm")):  # fmt: skip
                stage = lambda m, to=original: f"stages.{int(m[1]) - 1}.{to}"  # noqa: E731
                key = re.sub(rf"^{ours}(\d)", stage, key)
            timm[key.replace("dwconv.dwconv", "dwconv")] = value
        theirs = timm
    found = detect(theirs)
    assert (found.family, found.style) == ("pvtv2", source)
    assert "PVTv2 of [2, 2, 2, 2] blocks, width 32" in found.description
    converted = convert_state_dict(theirs)
    assert converted.pop("head.fc.weight") is theirs["head.weight"]
    assert_equal(converted, state, "backbone.")


def test_released_names_inside_a_detector_and_bare_backbones():
    state = resnet(50, ATTENTION["base"]).state_dict()
    inside = {f"backbone.{k}": v for k, v in to_released(state).items() if not k.startswith("fc.")}
    neck = torch.zeros(1)
    converted = convert_state_dict({**inside, "neck.fpn_convs.0.conv.bias": neck})
    assert converted.pop("neck.fpn_convs.0.conv.bias") is neck
    assert converted.keys() == {k for k in state if k.startswith("backbone.")}
    for cfg in (
        dict(type="MRLAResNet", depth=18, layer_attention=ATTENTION["light"]),
        dict(type="MRLAResNet", depth=18, layer_attention=None, deep_stem=True),
        dict(type="MRLAVisionTransformer", arch="deit-tiny"),
        dict(type="MRLADistilledVisionTransformer", arch="deit-tiny"),
        dict(type="MRLACeiT"),
        dict(type="MRLAEfficientNet"),
        dict(type="MRLAPyramidVisionTransformerV2", arch="b1"),
        dict(type="MRLAResNetCIFAR", depth=56),
        dict(type="MRLAResNetCIFAR", depth=110, block="bottleneck"),
    ):
        bare = state_of(cfg, prefix="")
        assert convert_state_dict(bare).keys() == {f"backbone.{k}" for k in bare}


def test_what_is_not_known_is_refused():
    state, _ = released_resnet("resnet50_light", "fixture")
    cut = {k: v for k, v in state.items() if not k.startswith("layer3.5.")}
    for given, message in (
        ({"features.0.weight": torch.zeros(1)}, "unknown architecture.*these begin with features."),
        ({**state, "layer1.0.se.fc.weight": torch.zeros(1)},
         "keys are not understood: .*layer1.0.se.fc.w"),
        (cut, r"\[3, 4, 5, 3\] bottlenecks per stage"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            convert_state_dict(given)
    with pytest.raises(CheckpointError, match="not mmrla key names"):
        to_released(state)
