from __future__ import annotations

import functools
import json
import zlib

import pytest
import torch
from mmengine.config import ConfigDict
from mmpretrain.models import ImageClassifier
from mmpretrain.models import ResNet as PlainResNet
from mmpretrain.models import ResNeXt as PlainResNeXt
from mmpretrain.models.backbones.resnet import ResLayer as PlainResLayer
from torch import nn

from mmrla.layers import MRLABase, MRLALight
from mmrla.models import MRLAResNet, MRLAResNeXt
from mmrla.models.backbones.mrla_resnet import LayerAttentionStage, MRLABottleneck
from mmrla.registry import MODELS
from tests.conftest import (
    filled,
    from_released,
    generated,
    golden,
    kept_for_backward,
    relative_error,
    stable_id,
)
from tests.helpers import build
from tests.models.zoo import BASE, INTERACTIONS, LIGHT, MRLA, RELU, SMALL, weights_left_out

SOURCES = ["fixture", "shared"]


def image(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *(size or (64, 96)))


# --- parity with the released implementation ---


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("name", "blocks", "layer_attention"),
    [
        ("light_block", 1, dict(type="MRLALight", head_channels=32)),
        ("light_block_downsample", 1, dict(type="MRLALight", head_channels=32)),
        ("base_stage", 3, dict(type="MRLABase", head_channels=16)),
    ],
)
def test_golden_stage(name, blocks, layer_attention, source):
    g = golden(name, source)
    prefix = "" if name == "base_stage" else "0."
    stage = LayerAttentionStage(
        block=MRLABottleneck,
        num_blocks=blocks,
        in_channels=g["x"].shape[1],
        out_channels=64,
        expansion=4,
        stride=1 if name == "light_block" else 2,
        layer_attention=layer_attention,
    )
    stage.load_state_dict({prefix + k: v for k, v in g.group("param").items()})
    assert g.error("out_eval", stage.eval()(g["x"])) < 1e-5
    x = g["x"].clone().requires_grad_()
    out = stage.train()(x)
    assert g.error("out_train", out) < 1e-5
    out.backward(g["grad_out"])
    assert g.error("grad_x", x.grad) < 1e-5
    gradients = g.group("grad")
    parameters = dict(stage.named_parameters())
    assert {prefix + k for k in gradients} == set(parameters)
    for key, expected in gradients.items():
        assert relative_error(parameters[prefix + key].grad, expected) < 1e-5, key
    buffers = dict(stage.named_buffers())
    for key, expected in g.group("after").items():
        assert relative_error(buffers[prefix + key], expected) < 1e-5, key


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("name", "layer_attention"),
    [
        ("resnet50_light", dict(type="MRLALight", head_channels=32)),
        ("resnet50_base", dict(type="MRLABase", head_channels=16)),
    ],
)
def test_golden_network(name, layer_attention, source):
    g = golden(name, source)
    model = ImageClassifier(
        backbone=dict(
            type="mmrla.MRLAResNet",
            depth=50,
            out_indices=(0, 1, 2, 3),
            layer_attention=layer_attention,
        ),
        neck=dict(type="mmpretrain.GlobalAveragePooling"),
        head=dict(type="mmpretrain.LinearClsHead", num_classes=1000, in_channels=2048),
    ).eval()
    expected_shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    state = {}
    for key in map(str, g.names["keys"]):
        ours = from_released(key)
        ours = f"head.{ours}" if ours.startswith("fc.") else f"backbone.{ours}"
        state[ours] = key
    assert set(state) == set(expected_shapes)
    shapes = dict(zip(state.values(), map(json.loads, map(str, g.names["shapes"])), strict=True))
    weights = {
        ours: generated(key, tuple(shapes[key])).reshape(expected_shapes[ours])
        for ours, key in state.items()
    }
    model.load_state_dict(weights)
    x = torch.randn(
        tuple(g["input_shape"].tolist()),
        generator=torch.Generator().manual_seed(zlib.crc32(f"{name}.x".encode())),
    )
    with torch.no_grad():
        stages = model.backbone(x)
        logits = model.head.fc(stages[-1].mean((2, 3)))
    assert relative_error(logits, g["logits"]) < 1e-4
    for i, stage in enumerate(stages):
        if f"stage{i + 1}_mean_hw" in g:
            assert relative_error(stage.mean((2, 3)), g[f"stage{i + 1}_mean_hw"]) < 1e-4


# --- the plain network ---


@pytest.mark.parametrize(
    ("ours", "plain", "depth"),
    [
        *((MRLAResNet, PlainResNet, depth) for depth in (18, 34, 50, 101, 152)),
        *((MRLAResNeXt, PlainResNeXt, depth) for depth in (50, 101, 152)),
    ],
)
def test_state_dict_is_a_superset_of_the_plain_networks(ours, plain, depth):
    with weights_left_out():
        models = plain(depth), ours(depth), ours(depth, layer_attention=None)
    theirs, keys, without = ({k: v.shape for k, v in m.state_dict().items()} for m in models)
    assert theirs.items() <= keys.items()
    assert all("mrla" in key for key in keys.keys() - theirs.keys())
    blocks = sum(plain.arch_settings[depth][1])
    assert sum(key.endswith("mrla.lambda_t") for key in keys) == blocks
    assert list(without) == list(theirs)


# --- the ancestor's arguments, on the parts of the layer attention too --------------------------


@pytest.mark.parametrize("attention", ["light", "base", *INTERACTIONS])
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(depth=50, norm_cfg=dict(type="GN", num_groups=2)),
        dict(depth=18, deep_stem=True, avg_down=True, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)),
        dict(depth=50, style="caffe", out_indices=(1, 3), drop_path_rate=0.3),
        dict(depth=18, num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2,)),
        dict(depth=18, mrla_act_cfg=RELU),
    ],
    ids=stable_id,
)
def test_every_parameter_gets_a_gradient(kwargs, attention):
    layer_attention = {"light": LIGHT, "base": BASE, **INTERACTIONS}[attention]
    if attention in ("dia", "rla"):  # no norm after these, so no activation after it
        kwargs = {key: value for key, value in kwargs.items() if key != "mrla_act_cfg"}
    model = filled(MRLAResNet(**{**SMALL, **kwargs}, layer_attention=layer_attention)).train()
    outs = model(image(65, 49))
    assert len(outs) == len(kwargs.get("out_indices", SMALL["out_indices"]))
    sum(o.square().sum() for o in outs).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        # Queries and keys apart: the first layer of a base stage attends to itself with weight 1
        # whatever they are, and deep down large features saturate a gate of light.
        if attention in MRLA and not (".query." in key or ".key." in key):
            assert parameter.grad.abs().sum() > 0 or "drop_path_rate" in kwargs, key
    for block in (model.layer1[-1], model.layer2[-1]) if attention in MRLA else ():
        assert block.mrla.query.weight.grad.abs().sum() > 0
        assert block.mrla.key.weight.grad.abs().sum() > 0
    if attention not in MRLA:
        parts = [p.grad for k, p in model.layer2.named_parameters() if ".mrla." in k]
        assert all(g.abs().sum() > 0 for g in parts if g.dim() > 1 and g.shape[0] > 1)


def test_checkpointing_recomputes_the_layer_attention():
    saved = []
    for with_cp in (False, True):
        model = MRLAResNet(18, with_cp=with_cp, **SMALL, layer_attention=LIGHT)
        run = functools.partial(model, image().requires_grad_())
        saved.append(sum(kept_for_backward(run).values()))
    assert saved[1] < 0.5 * saved[0]


@pytest.mark.parametrize(
    ("norm_cfg", "name", "cls"),
    [
        (dict(type="BN", momentum=0.02, eps=1e-3), "bn_mrla", nn.BatchNorm2d),
        (dict(type="SyncBN", requires_grad=False), "bn_mrla", nn.SyncBatchNorm),
        (dict(type="GN", num_groups=4), "gn_mrla", nn.GroupNorm),
    ],
)
def test_norm_follows_norm_cfg(norm_cfg, name, cls):
    model = MRLAResNet(18, **SMALL, layer_attention=LIGHT, norm_cfg=norm_cfg)
    norm = getattr(model.layer1[0], name)
    assert isinstance(norm, cls)
    assert norm.weight.requires_grad is norm_cfg.get("requires_grad", True)
    if cls is nn.BatchNorm2d:
        assert (norm.momentum, norm.eps) == (0.02, 1e-3)


def test_drop_path_of_the_attention_branch():
    none = MRLAResNet(18, **SMALL, layer_attention=LIGHT, drop_path_rate=0.4)
    assert isinstance(none.layer4[-1].mrla_drop_path, nn.Identity)
    shared = MRLAResNet(
        18, **SMALL, layer_attention=LIGHT, drop_path_rate=0.4, mrla_drop_path_rate=None
    )
    last = shared.layer4[-1]
    assert last.mrla_drop_path.drop_prob == last.drop_path.drop_prob == pytest.approx(0.4)
    assert isinstance(shared.layer1[0].mrla_drop_path, nn.Identity)
    alone = MRLAResNet(18, **SMALL, layer_attention=LIGHT, mrla_drop_path_rate=0.2)
    assert {b.mrla_drop_path.drop_prob for s in alone.res_layers for b in getattr(alone, s)} == {
        0.2
    }
    assert isinstance(alone.layer4[-1].drop_path, nn.Identity)


def test_initialisation():
    model = MRLAResNet(50, layer_attention=LIGHT, init_cfg=None, base_channels=16)
    model.init_weights()
    for name, parameter in model.named_parameters():
        if name.endswith(("bn3.weight", "bn_mrla.weight")):
            assert (parameter == 0).all(), name
        elif "bn" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
    fan_out = model.layer3[0].conv2.weight[:, 0].numel()
    std = model.layer3[0].conv2.weight.std().item()
    assert std == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
    depthwise = torch.cat([b.mrla.value.weight.flatten() for b in model.layer4])
    assert depthwise.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.1)


# --- composing ---


def test_default_is_light_and_types_take_prefix_and_class():
    assert isinstance(MRLAResNet(18, **dict(SMALL, base_channels=32)).layer1[0].mrla, MRLALight)
    for kind in ("MRLABase", "mmrla.MRLABase", MRLABase):
        model = MRLAResNet(18, **SMALL, layer_attention=ConfigDict(type=kind, head_channels=4))
        assert isinstance(model.layer1[0].mrla, MRLABase)


@pytest.mark.parametrize("scope", ["mmdet", "mmpretrain", "mmengine"])
def test_builds_from_the_prefix_in_any_scope(scope):
    cfg = dict(type="mmrla.MRLAResNet", depth=18, **SMALL, layer_attention=LIGHT)
    assert isinstance(build(cfg, scope), MRLAResNet)


# --- bad input ---


def attention(kind: str, **options) -> dict:
    return dict(depth=50, layer_attention=dict(type=kind, **options))


@pytest.mark.parametrize(
    ("cls", "kwargs", "message"),
    [
        (MRLAResNet, dict(depth=42), r"depth must be one of \[18, 34, 50, 101, 152\], got 42"),
        (MRLAResNeXt, dict(depth=18), r"depth must be one of \[50, 101, 152\], got 18"),
        (MRLAResNet, attention("MRLALight", head_channels=48),
         r"head_channels=48 with channels=256; allowed: 1, 2, 4, 8, 16, 32, 64, 128, 256"),
        (MRLAResNet, attention("MRLAHeavy"),
         r"unknown layer attention 'MRLAHeavy'; allowed: .*MLA, MRLABase, MRLALight"),
        (MRLAResNet, attention("MRLALight", heads=2),
         r"layer_attention MRLALight: .*unexpected keyword argument 'heads'"),
        (MRLAResNet, dict(depth=50, layer_attention="MRLALight"), r"got 'MRLALight'"),
        (MRLAResNet, dict(depth=50, mrla_drop_path_rate=1.0), r"in \[0, 1\), got 1.0"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(cls, kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        cls(**kwargs)


def test_errors_survive_the_registry():
    """mmengine wraps what a constructor raises; value and allowed values stay in the message."""
    with pytest.raises(ValueError, match=r"\[18, 34, 50, 101, 152\], got 51"):
        MODELS.build(dict(type="MRLAResNet", depth=51))


def test_stages_are_the_plain_stages_class():
    """Code that looks for mmpretrain's stages, such as layer-wise decay, finds them."""
    assert isinstance(MRLAResNet(18, **SMALL, layer_attention=LIGHT).layer1, PlainResLayer)
