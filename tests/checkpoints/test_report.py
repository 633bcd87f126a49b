from __future__ import annotations

import pytest
import torch
from torch import nn

from mmrla.checkpoints import load_into
from mmrla.checkpoints.files import CheckpointError
from mmrla.registry import MODELS

TINY = dict(
    type="mmrla.MRLAResNet",
    depth=18,
    stem_channels=8,
    base_channels=8,
    layer_attention=dict(type="MRLALight", head_channels=4),
)


def backbone(**kwargs) -> nn.Module:
    return MODELS.build({**TINY, **kwargs})


def classifier(classes: int) -> nn.Module:
    return MODELS.build(
        dict(
            type="mmpretrain.ImageClassifier",
            backbone=TINY,
            neck=dict(type="mmpretrain.GlobalAveragePooling"),
            head=dict(type="mmpretrain.LinearClsHead", num_classes=classes, in_channels=64),
        )
    )


def same(a: dict, b: dict, prefix: str = "") -> bool:
    return all(torch.equal(a[k], b[f"{prefix}{k}"]) for k in a)


def test_with_and_without_prefix():
    whole, bare = classifier(5), backbone()
    report = load_into(bare, whole.state_dict())
    assert report.prefix == "backbone."
    assert same(bare.state_dict(), whole.state_dict(), "backbone.")
    assert report.unexpected == ["head.fc.weight", "head.fc.bias"]
    other = classifier(5)
    report = load_into(other, bare.state_dict())
    assert report.prefix == "+backbone."
    assert report.missing == ["head.fc.weight", "head.fc.bias"]
    assert same(bare.state_dict(), other.state_dict(), "backbone.")
    assert load_into(classifier(5), whole.state_dict()).prefix == ""


def test_head_of_another_size_is_left_alone(caplog):
    source, target = classifier(5), classifier(7)
    before = target.head.fc.weight.clone()
    report = load_into(target, source.state_dict())
    assert report.mismatched == [
        "head.fc.weight: (5, 64) -> (7, 64)",
        "head.fc.bias: (5,) -> (7,)",
    ]
    assert torch.equal(target.head.fc.weight, before)
    assert same(source.backbone.state_dict(), target.state_dict(), "backbone.")
    assert "2 of the wrong shape" in report.summary()


def test_a_detectors_checkpoint_fills_a_backbone():
    state = {f"backbone.{k}": v for k, v in backbone().state_dict().items()}
    state["neck.lateral_convs.0.conv.weight"] = torch.zeros(1)
    target = backbone()
    report = load_into(target, state)
    assert same(target.state_dict(), state, "backbone.")
    assert report.unexpected == ["neck.lateral_convs.0.conv.weight"]


def test_a_typo_in_the_prefix_is_an_error():
    state = {f"bakcbone.{k}": v for k, v in backbone().state_dict().items()}
    target = backbone()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(CheckpointError, match="no key matches the model.*bakcbone.conv1.weight"):
        load_into(target, state)
    assert same(before, target.state_dict())


def test_missing_parts_are_an_error_unless_allowed():
    state = backbone().state_dict()
    partial = {k: v for k, v in state.items() if not k.startswith("layer4")}
    target = backbone()
    before = target.conv1.weight.clone()
    with pytest.raises(CheckpointError, match=r"would stay random: layer4.0.conv1.weight"):
        load_into(target, partial)
    assert torch.equal(target.conv1.weight, before)  # nothing was loaded
    report = load_into(target, partial, allow_missing=["layer4.*"])
    assert all(k.startswith("layer4") for k in report.missing)
    wide = {**state, "layer1.0.conv1.weight": torch.zeros(16, 8, 3, 3)}
    with pytest.raises(CheckpointError, match=r"wrong shape.*\n.*mismatched: layer1.0.conv1"):
        load_into(target, wide)


def test_mrla_weights_without_a_place_are_an_error():
    """A light checkpoint into the plain or the base network: the wrong network, not a detail."""
    light = backbone().state_dict()
    base = backbone(layer_attention=dict(type="MRLABase", head_channels=4))
    for target in (backbone(layer_attention=None), base):
        with pytest.raises(CheckpointError, match="of layer attentions that the model has no"):
            load_into(target, light)
    with pytest.raises(CheckpointError, match="would stay random: layer1.0.mrla.lambda_t"):
        load_into(backbone(), base.state_dict())


def test_a_detectors_neck_may_not_go_missing():
    """Unless the checkpoint is of a backbone or a classifier, which has none."""

    class Detector(nn.Module):
        def __init__(self, neck="neck"):
            super().__init__()
            self.backbone = backbone()
            self.add_module(neck, nn.Linear(2, 2))
            self.rpn_head = nn.Linear(2, 2)

    load_into(Detector(), backbone().state_dict())
    load_into(Detector(), classifier(5).state_dict())
    with pytest.raises(CheckpointError, match="would stay random: neck.weight, neck.bias"):
        load_into(Detector(), Detector(neck="nekc").state_dict())


def test_missing_mrla_weights_are_reported_not_refused():
    plain = backbone(layer_attention=None).state_dict()
    report = load_into(backbone(), plain)
    assert report.missing
    assert all("mrla" in key for key in report.missing)
    assert "missing" in report.summary()
