"""Released checkpoints through the converter: recognised, renamed, computing the same, and back."""

from __future__ import annotations

import json
import zlib

import pytest
import torch

from mmrla.checkpoints import convert_state_dict, detect, load_into, to_released
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
    with pytest.raises(CheckpointError, match=r"\[3, 4, 5, 3\] bottlenecks a stage"):
        convert_state_dict(cut)
    with pytest.raises(CheckpointError, match="no mmrla key names"):
        to_released(state)
