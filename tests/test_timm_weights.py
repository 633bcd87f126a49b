"""Weights of mmrla.timm: plain networks' as the start, and those of mmrla's hosts."""

from __future__ import annotations

import itertools

import pytest
import torch

timm = pytest.importorskip("timm", reason="requirements/extras.txt is not installed")

from mmrla.checkpoints.files import CheckpointError  # noqa: E402
from mmrla.models import (  # noqa: E402
    MRLADistilledVisionTransformer,
    MRLAResNet,
    MRLAResNeXt,
    MRLAVisionTransformer,
)
from mmrla.timm import from_mmrla, to_mmrla  # noqa: E402
from tests.conftest import filled, relative_error  # noqa: E402
from tests.test_timm import create, image  # noqa: E402


def test_starts_from_plain_weights(tmp_path):
    """``pretrained=True``, as timm loads it: other classes, other channels, strict keys."""
    plain = create("resnet18", released=True, num_classes=1000)
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    overlay = dict(pretrained_cfg_overlay=dict(file=str(tmp_path / "plain.pth")))
    model = create("resnet18_mrla_light", pretrained=True, num_classes=1000, **overlay).eval()
    assert torch.equal(model(image()), plain.eval()(image()))
    other = create("resnet18_mrla_base", pretrained=True, in_chans=1, num_classes=7, **overlay)
    assert other(torch.rand(2, 1, 32, 32)).shape == (2, 7)
    assert torch.equal(other.layer3[0].conv1.weight, plain.layer3[0].conv1.weight)
    features = create("resnet18_mrla_light", pretrained=True, features_only=True, **overlay)
    assert torch.equal(features.layer3[0].conv1.weight, plain.layer3[0].conv1.weight)

    # Weights that hold the attention load in full, and nothing may be missing.
    trained = create("resnet18_mrla_light", released=True, num_classes=1000)
    torch.save(trained.state_dict(), tmp_path / "plain.pth")
    again = create("resnet18_mrla_light", pretrained=True, num_classes=1000, **overlay)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in trained.state_dict().items())
    for wrong, message in (
        (dict(layer_attention="MRLABase"), "Unexpected.*lambda_t"),
        (dict(layers=(1, 2, 2, 1)), r"Missing.*layer3\.1\.bn_mrla"),
    ):
        with pytest.raises(RuntimeError, match=message):
            create("resnet18_mrla_light", pretrained=True, num_classes=1000, **wrong, **overlay)


def test_vit_starts_from_plain_weights_of_another_size(tmp_path):
    plain = create("deit_tiny_patch16_224", released=True, num_classes=1000)
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    overlay = dict(pretrained_cfg_overlay=dict(file=str(tmp_path / "plain.pth")))
    kwargs = dict(pretrained=True, num_classes=1000, img_size=48, **overlay)
    model = create("deit_tiny_patch16_224_mrla_light", **kwargs).eval()
    expected = create("deit_tiny_patch16_224", **kwargs).eval()
    assert torch.equal(model(image(48)), expected(image(48)))


HOSTS = {
    "resnet18": (MRLAResNet, dict(depth=18)),
    "resnet50d": (MRLAResNet, dict(depth=50, deep_stem=True, avg_down=True)),
    "resnext50_32x4d": (MRLAResNeXt, dict(depth=50)),
    "deit_tiny_patch16_224": (MRLAVisionTransformer, dict(arch="deit-tiny")),
    "deit_tiny_distilled_patch16_224": (MRLADistilledVisionTransformer, dict(arch="deit-tiny")),
}
LAYERS = (1, 2, 1, 1)


@pytest.mark.parametrize(
    ("name", "attention"),
    [*itertools.product(("resnet18", "deit_tiny_patch16_224"), (None, "MRLALight", "MRLABase")),
     ("resnet50d", "MRLABase"),
     ("resnext50_32x4d", "MRLALight"), ("deit_tiny_distilled_patch16_224", "MRLABase")],
)  # fmt: skip
def test_computes_what_the_host_does(name, attention, monkeypatch):
    """Outputs and every gradient, with weights renamed both ways.

    The hosts are tested against the equations and the released code.
    """
    host, kwargs = HOSTS[name]
    vit = "deit" in name
    if vit:
        kwargs, small = {**kwargs, "img_size": 64, "out_type": "raw"}, dict(img_size=64)
    else:
        kwargs, small = {**kwargs, "out_indices": (3,)}, dict(layers=LAYERS)
        block = host.arch_settings[kwargs["depth"]][0]
        monkeypatch.setitem(host.arch_settings, kwargs["depth"], (block, LAYERS))
    config = attention and dict(type=attention)
    theirs = filled(host(**kwargs, layer_attention=config)).double().train()
    given = dict(layer_attention=attention) if attention else {}
    ours = timm.create_model(f"{name}_mrla_base" if attention else name, **small, **given)
    ours = ours.double().train()
    ours.reset_classifier(0)
    ours.load_state_dict(from_mmrla(theirs.state_dict()))
    back = to_mmrla(ours.state_dict())
    assert set(back) == {f"backbone.{key}" for key in theirs.state_dict()}
    assert all(torch.equal(back[f"backbone.{k}"], v) for k, v in theirs.state_dict().items())

    pixels = image(64).double()
    got, (expected,) = ours.forward_features(pixels), theirs(pixels)
    assert relative_error(got, expected) < 1e-10
    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    wanted = from_mmrla({key: p.grad for key, p in theirs.named_parameters()})
    most = max(grad.abs().max() for grad in wanted.values())
    for key, parameter in ours.named_parameters():
        assert (parameter.grad - wanted[key]).abs().max() < 1e-9 * most, key


def test_weights_of_classifiers_and_detectors():
    model = create("resnet18_mrla_light", released=True, layers=(2, 2, 2, 2))
    state = to_mmrla(model.state_dict())
    assert torch.equal(state["head.fc.weight"], model.fc.weight)
    head = {"rpn_head.rpn_conv.weight": torch.ones(1), "neck.lateral.weight": torch.ones(1)}
    again = from_mmrla({"state_dict": {**state, **head}})
    assert again.keys() == model.state_dict().keys()
    vit = create("deit_tiny_distilled_patch16_224_mrla_light").state_dict()
    assert from_mmrla(to_mmrla(vit)).keys() == vit.keys()
    for convert in (to_mmrla, from_mmrla):
        with pytest.raises(CheckpointError, match=r"these begin with features\.0"):
            convert({"features.0.weight": torch.ones(1)})


@pytest.mark.parametrize(
    ("name", "kwargs", "key"),
    [
        ("deit3_small_patch16_224_mrla_light", {}, r"layers\.0\.ls1\.gamma.* .24 such keys"),
        ("resnet18_mrla_light", dict(block_args=dict(attn_layer="se")), r"layer1\.0\.se\.fc1"),
    ],
)
def test_weights_that_no_host_takes(name, kwargs, key):
    with pytest.raises(CheckpointError, match=f"no host of mmrla has backbone.{key}"):
        to_mmrla(timm.create_model(name, device="meta", **kwargs).state_dict())
