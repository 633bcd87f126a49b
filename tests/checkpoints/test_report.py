from __future__ import annotations

import pytest
import torch
from torch import nn

from mmrla.checkpoints import load_into
from mmrla.checkpoints.files import CheckpointError
from mmrla.models import MRLAResNet
from tests import helpers
from tests.helpers import same
from tests.networks import LIGHT, TINY, Detector


def backbone(attention: dict | None = LIGHT) -> nn.Module:
    return MRLAResNet(**TINY, layer_attention=attention)


def classifier(classes: int) -> nn.Module:
    host = dict(type="mmrla.MRLAResNet", layer_attention=LIGHT, **TINY)
    return helpers.classifier(host, 64, classes=classes)


def test_with_and_without_prefix():
    whole, bare = classifier(5), backbone()
    report = load_into(bare, whole.state_dict())
    assert report.prefix == "backbone."
    assert same(bare, whole, "backbone.")
    assert report.unexpected == ["head.fc.weight", "head.fc.bias"]
    other = classifier(5)
    report = load_into(other, bare.state_dict())
    assert report.prefix == "+backbone."
    assert report.missing == ["head.fc.weight", "head.fc.bias"]
    assert same(bare, other, "backbone.")
    assert load_into(classifier(5), whole.state_dict()).prefix == ""
    # A detector's checkpoint.
    neck = "neck.lateral_convs.0.conv.weight"
    state = {f"backbone.{k}": v for k, v in backbone().state_dict().items()}
    state[neck] = torch.zeros(1)
    report = load_into(bare, state)
    assert same(bare, state, "backbone.")
    assert report.unexpected == [neck]


def test_head_of_another_size_is_left_alone():
    source, target = classifier(5), classifier(7)
    before = target.head.fc.weight.clone()
    report = load_into(target, source.state_dict())
    heads = ["head.fc.weight: (5, 64) -> (7, 64)", "head.fc.bias: (5,) -> (7,)"]
    assert report.mismatched == heads
    assert torch.equal(target.head.fc.weight, before)
    assert same(source.backbone, target, "backbone.")
    assert "2 of the wrong shape" in report.summary()


def test_a_typo_or_a_missing_part_is_an_error_unless_allowed():
    state, target = backbone().state_dict(), backbone()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    typo = {f"bakcbone.{k}": v for k, v in state.items()}
    partial = {k: v for k, v in state.items() if not k.startswith("layer4")}
    wide = {**state, "layer1.0.conv1.weight": torch.zeros(16, 8, 3, 3)}
    for wrong, message in (
        (typo, "no key matches the model.*bakcbone.conv1.weight"),
        (partial, r"would stay random: layer4.0.conv1.weight"),
        (wide, r"wrong shape.*\n.*mismatched: layer1.0.conv1"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_into(target, wrong)
        assert same(before, target)  # nothing was loaded
    report = load_into(target, partial, allow_missing=["layer4.*"])
    assert all(k.startswith("layer4") for k in report.missing)


def test_mrla_weights_without_a_place_are_an_error_and_missing_ones_are_not():
    """A light checkpoint into the plain or the base network: the wrong network, not a detail."""
    light, plain = backbone(), backbone(None)
    base = backbone(dict(type="MRLABase", head_channels=4))
    for target in (plain, base):
        with pytest.raises(CheckpointError, match="of layer attentions that the model has no"):
            load_into(target, light.state_dict())
    with pytest.raises(CheckpointError, match="would stay random: layer1.0.mrla.lambda_t"):
        load_into(light, base.state_dict())
    report = load_into(light, plain.state_dict())
    assert report.missing
    assert all("mrla" in key for key in report.missing)
    assert "missing" in report.summary()


def test_a_detectors_neck_may_not_go_missing():
    """Unless the checkpoint is of a backbone or a classifier, which has none."""
    load_into(Detector(), backbone().state_dict())
    load_into(Detector(), classifier(5).state_dict())
    with pytest.raises(CheckpointError, match=r"would stay random: neck.lateral.weight, neck"):
        load_into(Detector(), Detector(neck="nekc").state_dict())
