"""Released checkpoints through the converter: recognised, renamed, computing the same, and back."""

from __future__ import annotations

import json
import re
import zlib

import pytest
import torch
import torchvision
from mmengine.registry import DefaultScope

from mmrla.checkpoints import convert_state_dict, detect, load_into, to_released
from mmrla.checkpoints.efficientnet import _from_torchvision
from mmrla.checkpoints.files import CheckpointError
from mmrla.registry import MODELS
from tests.conftest import generated, golden, relative_error

SOURCES = ["fixture", "shared"]
ATTENTION = {
    "light": dict(type="MRLALight", head_channels=32),
    "base": dict(type="MRLABase", head_channels=16),
}


def released_resnet(name: str, source: str) -> tuple[dict[str, torch.Tensor], dict]:
    g = golden(name, source)
    keys = list(map(str, g.names["keys"]))
    shapes = map(json.loads, map(str, g.names["shapes"]))
    return {k: generated(k, tuple(s)) for k, s in zip(keys, shapes, strict=True)}, g


def classifier(depth: int, layer_attention, kind: str = "MRLAResNet", **kwargs):
    backbone = dict(type=f"mmrla.{kind}", depth=depth, layer_attention=layer_attention, **kwargs)
    return MODELS.build(
        dict(
            type="mmpretrain.ImageClassifier",
            backbone=backbone,
            neck=dict(type="mmpretrain.GlobalAveragePooling"),
            head=dict(
                type="mmpretrain.LinearClsHead",
                num_classes=1000,
                in_channels=512 if depth < 50 else 2048,
            ),
        )
    ).eval()


@pytest.mark.parametrize(
    ("layer_attention", "called"),
    [
        (dict(type="MLA", head_channels=8), "MRLABase"),
        (dict(type="LinearRLA", head_channels=1), "MRLABase"),
        (dict(type="DWConv"), "DWConv"),
        (dict(type="MRLALight", projection="fc", fixed_lambda=1), "MRLABase"),
        (dict(type="MRLALight", value_conv=False), "MRLALight"),
        (dict(type="DIAUnit"), "DIAUnit"),
        (dict(type="RecurrentLayerAggregation"), "RecurrentLayerAggregation"),
        (dict(type="DLALight"), "DLALight"),
        (dict(type="KCLA"), "KCLA"),
        (dict(type="DLABase"), "DLABase"),
    ],
)
def test_own_names_of_the_other_attentions_stay(layer_attention, called):
    """With and without the prefix of a classifier; nothing is lost or renamed."""
    state = classifier(18, layer_attention).state_dict()
    backbone = {k.removeprefix("backbone."): v for k, v in state.items() if "backbone." in k}
    for given in (state, backbone):
        assert detect(given).layer_attention == called
        converted = convert_state_dict(given)
        expected = given if given is state else {f"backbone.{k}": v for k, v in given.items()}
        assert converted.keys() == expected.keys()
        assert all(torch.equal(converted[k], v) for k, v in expected.items())
    if not called.startswith("MRLA"):
        with pytest.raises(CheckpointError, match=f"no released names for this: .*{called}"):
            to_released(state)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", ["light", "base"])
def test_golden_resnet50(kind, source):
    state, g = released_resnet(f"resnet50_{kind}", source)
    found = detect(state)
    assert (found.family, found.style) == ("resnet", "released")
    assert found.layer_attention == ATTENTION[kind]["type"]
    assert "ResNet-50" in found.description
    wrapped = {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 99}
    converted = convert_state_dict(wrapped)
    model = classifier(50, ATTENTION[kind])
    report = load_into(model, converted)
    assert not report.missing
    assert not report.unexpected
    seed = zlib.crc32(f"resnet50_{kind}.x".encode())
    x = torch.randn(tuple(g["input_shape"]), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        logits = model.head.fc(model.backbone(x)[-1].mean((2, 3)))
    assert relative_error(logits, g["logits"]) < 1e-4
    back = to_released(converted)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)
    assert convert_state_dict(back).keys() == converted.keys()


@pytest.mark.parametrize("kind", ["light", "base"])
def test_golden_vit(kind):
    g = golden(f"vit_{kind}", "shared")
    state = {k.removeprefix("param:"): v for k, v in g.items() if k.startswith("param:")}
    assert detect(state).family == "vit"
    assert detect(state).layer_attention == ATTENTION[kind]["type"]
    converted = convert_state_dict({"model": state})
    model = MODELS.build(
        dict(
            type="mmpretrain.ImageClassifier",
            backbone=dict(
                type="mmrla.MRLAVisionTransformer",
                arch=dict(embed_dims=64, num_layers=6, num_heads=2, feedforward_channels=128),
                img_size=32,
                patch_size=8,
                layer_attention=dict(ATTENTION[kind], head_channels=16),
            ),
            head=dict(type="mmpretrain.VisionTransformerClsHead", num_classes=10, in_channels=64),
        )
    )
    report = load_into(model, converted)
    assert not report.missing
    assert not report.unexpected
    x = g["x"].clone().requires_grad_()
    out = model.head(model.backbone(x))
    assert relative_error(out, g["out"]) < 1e-4
    out.backward(g["grad_out"])
    assert relative_error(x.grad, g["grad_x"]) < 1e-4
    back = to_released(converted)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("ResNet-101", dict(depth=101)),
        ("ResNet-18", dict(depth=18)),
        ("ResNeXt-50 32x4d", dict(depth=50, kind="MRLAResNeXt")),
        ("ResNet-34", dict(depth=34)),
    ],
)
@pytest.mark.parametrize("kind", ["light", "base", None])
def test_others_of_the_family(name, kwargs, kind):
    """There and back for networks that no golden shows."""
    state = classifier(layer_attention=ATTENTION.get(kind), **kwargs).state_dict()
    released = to_released(state)
    found = detect(released)
    assert name in found.description
    assert found.layer_attention == (ATTENTION[kind]["type"] if kind else None)
    assert any(key.startswith("stages.") for key in released) == (kind == "base")
    assert any(".mrla.mrla.Wq." in key for key in released) == (kind is not None)
    converted = convert_state_dict(released)
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[k], state[k]) for k in state)


@pytest.mark.parametrize("kind", ["light", "base", None])
def test_deit_tiny(kind):
    attention = dict(ATTENTION[kind], head_channels=16) if kind else None
    model = MODELS.build(
        dict(type="MRLAVisionTransformer", arch="deit-tiny", layer_attention=attention)
    )
    state = {f"backbone.{k}": v for k, v in model.state_dict().items()}
    released = to_released(state)
    assert "ViT of 12 blocks, width 192" in detect(released).description
    assert "blocks.11.mlp.fc2.weight" in released
    assert ("blocks.11.mrla.normx.weight" in released) == (kind is not None)
    assert ("blocks.11.mrla.normo.weight" in released) == (kind == "light")
    converted = convert_state_dict(released)
    assert all(torch.equal(converted[k], state[k]) for k in state)


@pytest.mark.parametrize("source", ["torchvision", "timm"])
def test_efficientnet_computes_what_torchvisions_computes(source):
    """torchvision pads evenly and has the usual eps, so the same is asked of ours."""
    theirs = torchvision.models.efficientnet_b1().eval()
    state = {k: generated(k, tuple(v.shape)) for k, v in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    if source == "timm":
        state = _from_torchvision(state)
        assert {"conv_stem.weight", "blocks.6.0.se.conv_reduce.weight"} <= set(state)
        assert {"blocks.0.0.conv_pw.weight", "blocks.1.0.conv_pwl.weight"} <= set(state)
    found = detect(state)
    assert (found.family, found.style) == ("efficientnet", source)
    assert "EfficientNet of 23 layers" in found.description
    head = dict(type="LinearClsHead", num_classes=1000, in_channels=1280)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        model = MODELS.build(
            dict(
                type="ImageClassifier",
                backbone=dict(
                    type="mmrla.MRLAEfficientNet",
                    arch="b1",
                    layer_attention=None,
                    conv_cfg=None,
                    norm_cfg=dict(type="BN", eps=1e-5),
                ),
                neck=dict(type="GlobalAveragePooling"),
                head=head,
            )
        )
    report = load_into(model, convert_state_dict(state))
    assert not report.missing
    assert not report.unexpected
    model.eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert relative_error(model(x), theirs(x)) < 1e-4


@pytest.mark.parametrize("arch", ["b0", "b1", "b4", "lite0"])
@pytest.mark.parametrize("kind", ["light", "base", None])
def test_efficientnet_there_and_back(kind, arch):
    attention = dict(ATTENTION[kind], head_channels=8) if kind else None
    model = MODELS.build(dict(type="MRLAEfficientNet", arch=arch, layer_attention=attention))
    state = {f"backbone.{k}": v for k, v in model.state_dict().items()}
    released = to_released(state)
    assert "blocks.6.0.conv_pwl.weight" in released
    assert ("blocks.4.1.mrla.mla.Wq.weight" in released) == (kind is not None)
    assert ("blocks.4.1.bn_mrla.running_var" in released) == (kind is not None)
    assert ("blocks.4.1.mrla.lambda_t" in released) == (kind == "light")
    converted = convert_state_dict(released)
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[k], state[k]) for k in state)


def test_ceit_in_its_authors_names():
    model = MODELS.build(dict(type="CeiT", arch="tiny"))
    state = model.state_dict()
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
    assert converted.keys() == {f"backbone.{k}" for k in state}
    assert all(torch.equal(converted[f"backbone.{k}"], state[k]) for k in state)
    bn_v = {"blocks.0.mrla.mla.bn_v.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="released CeiT with MRLA: .* cannot be converted"):
        convert_state_dict({**theirs, **bn_v})
    mrla = MODELS.build(dict(type="MRLACeiT", arch="tiny"))
    with pytest.raises(CheckpointError, match="no released names for this: CeiT of 12 blocks"):
        to_released({f"backbone.{k}": v for k, v in mrla.state_dict().items()})


@pytest.mark.parametrize("source", ["original", "timm"])
def test_pvtv2_in_others_names(source):
    model = MODELS.build(
        dict(type="MRLAPyramidVisionTransformerV2", arch="b0", layer_attention=None)
    )
    state = model.state_dict()
    theirs = {}
    for key, value in state.items():
        _, stage, part, *rest = key.split(".")
        stage, name = int(stage), ".".join(rest)
        if part == "0":
            theirs[f"patch_embed{stage + 1}.{name.replace('projection', 'proj')}"] = value
        elif part == "2":
            theirs[f"norm{stage + 1}.{name}"] = value
        elif "in_proj" in name:
            leaf = name.rpartition("_")[2]
            q, kv = value.split([len(value) // 3, 2 * len(value) // 3])
            prefix = f"block{stage + 1}.{rest[0]}.attn"
            theirs |= {f"{prefix}.q.{leaf}": q, f"{prefix}.kv.{leaf}": kv}
        else:
            for ours, original in (("attn.attn.out_proj", "attn.proj"),
                                   ("ffn.layers.0", "mlp.fc1"), ("ffn.layers.4", "mlp.fc2"),
                                   ("ffn.layers.1", "mlp.dwconv.dwconv")):  # fmt: skip
                if ours in name:
                    name = name.replace(ours, original)
                    if value.dim() == 4 and ours != "ffn.layers.1":
                        value = value[:, :, 0, 0]
            theirs[f"block{stage + 1}.{name}"] = value
    theirs["head.weight"] = torch.zeros(10, 256)
    if source == "timm":
        timm = {}
        for key, value in theirs.items():
            key = re.sub(r"^patch_embed1\.", "patch_embed.", key)
            key = re.sub(r"^patch_embed(\d)", lambda m: f"stages.{int(m[1]) - 1}.downsample", key)
            key = re.sub(r"^block(\d)", lambda m: f"stages.{int(m[1]) - 1}.blocks", key)
            key = re.sub(r"^norm(\d)", lambda m: f"stages.{int(m[1]) - 1}.norm", key)
            timm[key.replace("dwconv.dwconv", "dwconv")] = value
        theirs = timm
    found = detect(theirs)
    assert (found.family, found.style) == ("pvtv2", source)
    assert "PVTv2 of [2, 2, 2, 2] blocks, width 32" in found.description
    converted = convert_state_dict(theirs)
    assert converted.pop("head.fc.weight") is theirs["head.weight"]
    assert converted.keys() == {f"backbone.{k}" for k in state}
    assert all(torch.equal(converted[f"backbone.{k}"], state[k]) for k in state)


def test_released_names_inside_a_detector_and_bare_backbones():
    state = classifier(50, ATTENTION["base"]).state_dict()
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
        bare = MODELS.build(cfg).state_dict()
        assert convert_state_dict(bare).keys() == {f"backbone.{k}" for k in bare}


def test_what_is_not_known_is_refused():
    with pytest.raises(CheckpointError, match="unknown architecture.*these begin with features.0"):
        convert_state_dict({"features.0.weight": torch.zeros(1)})
    state, _ = released_resnet("resnet50_light", "fixture")
    with pytest.raises(CheckpointError, match="keys are not understood: .*layer1.0.se.fc.w"):
        convert_state_dict({**state, "layer1.0.se.fc.weight": torch.zeros(1)})
    cut = {k: v for k, v in state.items() if not k.startswith("layer3.5.")}
    with pytest.raises(CheckpointError, match=r"\[3, 4, 5, 3\] bottlenecks per stage"):
        convert_state_dict(cut)
    with pytest.raises(CheckpointError, match="not mmrla key names"):
        to_released(state)
