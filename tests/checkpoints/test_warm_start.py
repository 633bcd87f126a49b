"""An MRLA network that starts from plain weights computes the plain network at step 0."""

from __future__ import annotations

import hashlib
import re

import pytest
import torch
from mmdet.apis import inference_detector
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner.checkpoint import get_torchvision_models
from mmpretrain.models import ResNet, ResNeXt, VisionTransformer
from torch import nn

from mmrla.checkpoints import load_file, state_dict_of, to_released
from mmrla.checkpoints.files import CheckpointError
from mmrla.cli import main
from mmrla.models import MRLAResNet, MRLAResNeXt, MRLAVisionTransformer, WarmStart
from tests.conftest import ROOT, relative_error
from tests.helpers import build, filled, same

LIGHT = dict(type="MRLALight", head_channels=32)
BASE = dict(type="MRLABase", head_channels=16)
SMALL = dict(stem_channels=16, base_channels=16, out_indices=(0, 1, 2, 3))
# A network of depth 18 and how detectors freeze it.
TINY = dict(SMALL, depth=18, layer_attention=LIGHT | dict(head_channels=8))
FROZEN = dict(TINY, frozen_stages=1, norm_eval=True)
BOTH = pytest.mark.parametrize("layer_attention", [LIGHT, BASE], ids=["light", "base"])


def styled(plain: nn.Module, style: str) -> dict:
    state = plain.state_dict()
    if style == "torchvision":  # and timm's ResNets
        return {**state, "fc.weight": torch.zeros(9, 2048), "fc.bias": torch.zeros(9)}
    state = {f"backbone.{k}": v for k, v in state.items()}
    if style == "mmpretrain":
        return {"state_dict": {**state, "head.fc.weight": torch.zeros(9, 2048)}, "meta": {}}
    assert style == "detector"
    return {"state_dict": {**state, "neck.fpn_convs.0.conv.bias": torch.zeros(256)}}


def warm(source, folder, cls=MRLAResNet, *, init: dict | None = None, depth=50, **kwargs):
    """A network that has started from a network or from what a file holds."""
    state = source.state_dict() if isinstance(source, nn.Module) else source
    path = folder / "source.pth"
    torch.save(state, path)
    init_cfg = dict(type="mmrla.WarmStart", checkpoint=str(path)) | (init or {})
    model = cls(**({} if "arch" in kwargs else dict(depth=depth)), init_cfg=init_cfg, **kwargs)
    model.init_weights()
    return model


def assert_starts_as(plain: nn.Module, model: nn.Module, x: torch.Tensor) -> None:
    plain.eval()  # which returns None
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model.eval()(x), plain(x), strict=True))


@BOTH
@pytest.mark.parametrize("style", ["torchvision", "mmpretrain", "detector"])
def test_resnet50_starts_as_the_plain_network(style, layer_attention, tmp_path):
    # Full width once; the styles differ in names alone.
    width = dict(out_indices=(0, 1, 2, 3)) if style == "torchvision" else SMALL
    plain = filled(ResNet(50, **width))
    model = warm(styled(plain, style), tmp_path, layer_attention=layer_attention, **width)
    x = torch.randn(2, 3, 64, 96)
    assert_starts_as(plain, model, x)
    plain.train()
    with torch.no_grad():
        for a, b in zip(model.train()(x), plain(x), strict=True):
            assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize(
    "kwargs", [dict(deep_stem=True), dict(norm_cfg=dict(type="GN", num_groups=4)), None]
)
def test_other_stems_and_norms_and_resnext(kwargs, tmp_path):
    """Parts with an initialisation of their own (ConvModule) do not undo what was loaded."""
    if kwargs is None:
        plain = filled(ResNeXt(50))
        model = warm(plain, tmp_path, MRLAResNeXt, layer_attention=LIGHT)
    else:
        plain = filled(ResNet(18, **SMALL, **kwargs))
        model = warm(plain, tmp_path, **TINY, **kwargs)
    assert_starts_as(plain, model, torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("weight_decay", [0, 1e-4])
@BOTH
def test_after_20_steps_every_mrla_parameter_has_moved(layer_attention, weight_decay, tmp_path):
    """The last norms of the plain branches are not zero here, as in a trained network."""
    torch.manual_seed(1)
    plain = filled(ResNet(50, **SMALL))
    model = warm(plain, tmp_path, layer_attention=layer_attention, **SMALL).train()
    before = {k: p.detach().clone() for k, p in model.named_parameters() if "mrla" in k}
    assert len(before) > 70
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, weight_decay=weight_decay
    )
    x = torch.randn(4, 3, 64, 64)
    for _ in range(20):
        optimizer.zero_grad()
        sum(o.square().mean() for o in model(x)).backward()
        optimizer.step()
    still = {k for k, p in model.named_parameters() if k in before and torch.equal(p, before[k])}
    if layer_attention is BASE and not weight_decay:
        # A stage's first layer attends to itself with weight 1, whatever its query and its key
        # are; the key still serves later layers.
        assert still <= {f"layer{i}.0.mrla.query.weight" for i in range(1, 5)}
    else:
        assert not still


@BOTH
def test_vision_transformer(layer_attention, tmp_path):
    """A timm-named DeiT starts as the plain network, and all of its MRLA parts move."""
    arch = dict(embed_dims=64, num_layers=5, num_heads=2, feedforward_channels=96)
    kwargs = dict(arch=arch, img_size=32, patch_size=8)
    plain = filled(VisionTransformer(**kwargs))
    timm = to_released({f"backbone.{k}": v for k, v in plain.state_dict().items()})
    assert "blocks.0.mlp.fc1.weight" in timm
    attention = layer_attention | dict(head_channels=16)
    model = warm(timm, tmp_path, MRLAVisionTransformer, layer_attention=attention, **kwargs)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x)[0], plain(x)[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        model(x)[0].square().mean().backward()
        optimizer.step()
    without = {k for k, p in model.named_parameters() if "mrla" in k and not p.grad.any()}
    # The class token alone is read, so nothing of the last block's patch tokens counts; and with
    # MRLA-base the first block of a group attends to itself whatever its query is.
    last = {k for k, _ in model.named_parameters() if k.startswith("layers.4.mrla")}
    assert without - last <= {"layers.0.mrla.attention.query.weight"}
    assert "layers.4.mrla.norm.weight" not in without


def norms(model: nn.Module):
    return [(k, m) for k, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]


def test_freezing_leaves_fresh_parts_out(tmp_path):
    plain = filled(ResNet(18, **SMALL))
    model = warm(plain, tmp_path, **FROZEN)
    for _ in range(2):  # train() again changes nothing
        model.train()
        for key, parameter in model.named_parameters():
            plain_frozen = key.startswith(("conv1", "bn1", "layer1")) and "mrla" not in key
            assert parameter.requires_grad is not plain_frozen, key
        for key, module in norms(model):
            assert module.training is ("mrla" in key), key
    before = model.layer1[0].bn_mrla.running_mean.clone()
    out = model(torch.randn(2, 3, 32, 32))
    assert not torch.equal(model.layer1[0].bn_mrla.running_mean, before)
    sum(o.sum() for o in out).backward()
    assert model.layer1[0].bn_mrla.weight.grad is not None
    # unless the user says otherwise
    assert_all_frozen(warm(plain, tmp_path, init=dict(freeze_mrla=True), **FROZEN))


def assert_all_frozen(model: nn.Module) -> None:
    model.train()
    assert not any(p.requires_grad for p in model.layer1.parameters())
    assert not any(module.training for _, module in norms(model))


def test_fresh_norms_learn_where_the_recipe_freezes_norms(tmp_path):
    """As in DETR's recipes. Frozen at gamma = 0, they would keep the layer attention out."""
    recipe = dict(TINY, norm_cfg=dict(type="BN", requires_grad=False), norm_eval=True)
    model = warm(filled(ResNet(18, **SMALL)), tmp_path, **recipe).train()
    for key, module in norms(model):
        assert {p.requires_grad for p in module.parameters()} == {"mrla" in key}, key
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # the first step moves gamma away from zero, the second all behind it
        optimizer.zero_grad()
        sum(o.square().mean() for o in model(torch.randn(2, 3, 64, 64))).backward()
        optimizer.step()
    ours = [p for k, p in model.named_parameters() if ".mrla." in k]
    assert ours
    assert all(p.grad.any() for p in ours)
    # Weights that came with the checkpoint follow the recipe.
    model = warm(model, tmp_path, **recipe)
    assert not any(p.requires_grad for k, p in model.named_parameters() if "bn" in k)


def test_a_checkpoint_with_mrla_weights_is_taken_as_it_is_and_frozen_as_in_the_paper(tmp_path):
    source = filled(MRLAResNet(**TINY))
    model = warm({"state_dict": source.state_dict()}, tmp_path, **FROZEN)
    assert same(source, model)
    assert_all_frozen(model)
    model = warm(source, tmp_path, init=dict(freeze_mrla=False), **FROZEN).train()
    assert model.layer1[0].bn_mrla.training
    # Frozen by hand stays frozen; the class works as the name does; a list would be undone.
    model = warm(source, tmp_path, init=dict(freeze_mrla=False, type=WarmStart), **FROZEN)
    assert torch.equal(model.layer1[0].bn2.weight, source.layer1[0].bn2.weight)
    model.layer2.requires_grad_(False)
    model.train()
    assert not any(p.requires_grad for p in model.layer2.parameters())
    with pytest.raises(ValueError, match="WarmStart must be the only init_cfg"):
        MRLAResNet(18, init_cfg=[dict(type="mmrla.WarmStart"), dict(type="Kaiming")])
    with pytest.raises(ValueError, match="freeze_mrla must be None, True or False, got 'yes'"):
        warm(source, tmp_path, init=dict(freeze_mrla="yes"), **FROZEN)


@BOTH
def test_detector_starts_at_the_plain_detectors_predictions(layer_attention, coco_mini, tmp_path):
    """Mask R-CNN on real images: the same boxes, scores and masks, bit for bit."""
    cfg = Config.fromfile(ROOT / "configs/mask_rcnn_r50_1x.py")
    cfg.test_dataloader.dataset.pipeline[1].scale = (320, 256)
    cfg.model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=20)
    cfg.model.backbone.init_cfg = None
    plain = build(cfg.model, "mmdet")
    filled(plain.backbone)
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "plain.pth")
    init_cfg = dict(type="mmrla.WarmStart", checkpoint=str(tmp_path / "plain.pth"))
    cfg.model.backbone.update(layer_attention=layer_attention, init_cfg=init_cfg)
    started = build(cfg.model, "mmdet")
    started.backbone.init_weights()
    rest = {k: v for k, v in plain.state_dict().items() if not k.startswith("backbone.")}
    started.load_state_dict(rest, strict=False)
    for image in sorted((coco_mini / "val2017").glob("*.jpg"))[:2]:
        results = []
        for model in (plain, started):
            model.cfg = cfg
            with DefaultScope.overwrite_default_scope("mmdet"):
                results.append(inference_detector(model.eval(), str(image)).pred_instances)
        a, b = results
        assert len(a) == 20
        for field in ("bboxes", "scores", "labels", "masks"):
            assert torch.equal(a[field], b[field]), field


def test_wrong_checkpoints_are_errors_and_torchvisions_names_are_known(tmp_path):
    attention = LIGHT | dict(head_channels=8)
    with pytest.raises(CheckpointError, match="would stay random: .*layer"):
        warm(ResNet(34, **SMALL), tmp_path, layer_attention=attention, **SMALL)
    gone = dict(checkpoint=str(tmp_path / "nothing.pth"))
    with pytest.raises(FileNotFoundError, match="no such checkpoint: .*/nothing.pth"):
        warm({}, tmp_path, init=gone)
    for depth in (18, 34, 50, 101, 152):
        assert get_torchvision_models()[f"resnet{depth}"].startswith("https://")


def test_convert_and_publish_commands(tmp_path, capsys):
    model = filled(MRLAResNet(**TINY))
    state = {f"backbone.{k}": v for k, v in model.state_dict().items()}
    average = {f"module.{k}": v.double().add(1).to(v.dtype) for k, v in state.items()}
    training = {
        "state_dict": state, "ema_state_dict": {"steps": torch.tensor(3), **average},
        "optimizer": {"state": {0: torch.zeros(1000)}},
        "meta": {"dataset_meta": {"classes": ("a", "b")}, "epoch": 3},
    }  # fmt: skip
    source = tmp_path / "epoch_3.pth"
    torch.save(training, source)

    def command(*argv: object) -> str:
        main([*map(str, argv)])
        return capsys.readouterr().out

    released, back = tmp_path / "released.pth", tmp_path / "back.pth"
    said = command("convert", source, released, "--to", "released")
    assert "found: ResNet-18 + MRLALight, mmrla key names" in said
    assert "found: ResNet-18 + MRLALight, released key" in command("convert", released, back)
    assert same(state, torch.load(back, weights_only=True)["state_dict"])

    command("publish", source, tmp_path / "out/r18.pth")
    (published,) = (tmp_path / "out").iterdir()
    digest = hashlib.sha256(published.read_bytes()).hexdigest()[:8]
    assert re.fullmatch(rf"r18_\d{{8}}-{digest}\.pth", published.name)
    content = torch.load(published, weights_only=True)
    assert set(content) == {"state_dict", "meta"}
    assert content["meta"] == {"dataset_meta": {"classes": ("a", "b")}}
    # mmengine keeps the averaged weights in state_dict and the others in ema_state_dict.
    assert same(state, content["state_dict"])
    command("publish", source, tmp_path / "raw/r18", "--no-ema")
    (raw,) = (tmp_path / "raw").iterdir()
    expected = state_dict_of(load_file(source), "raw")
    assert same(expected, torch.load(raw, weights_only=True)["state_dict"])
