"""Every layer attention and every option of an ablation in every host."""

from __future__ import annotations

import mmcv
import numpy as np
import pytest
import torch
from torch import nn

from mmrla.layers import MLA, DWConv, LayerAttention, LinearRLA
from mmrla.models import (
    MRLACeiT,
    MRLADistilledVisionTransformer,
    MRLAEfficientNet,
    MRLAPyramidVisionTransformerV2,
    MRLAResNet,
    MRLAResNetCIFAR,
    MRLAResNeXt,
    MRLAVisionTransformer,
)
from tests.conftest import needs_new_compiler, relative_error
from tests.layers import test_equations as equations
from tests.models.test_hosts import flat

ARCH = dict(embed_dims=32, num_layers=5, num_heads=2, feedforward_channels=48)
SMALL = dict(stem_channels=16, base_channels=16)
HOSTS = {
    "resnet": (MRLAResNet, dict(depth=18, **SMALL), 8),
    "resnext": (MRLAResNeXt, dict(depth=50, groups=2, width_per_group=8, stem_channels=16), 32),
    "resnet20": (MRLAResNetCIFAR, dict(depth=20), 32),
    "efficientnet": (MRLAEfficientNet, dict(arch="b0"), 8),
    "vit": (MRLAVisionTransformer, dict(arch=ARCH, img_size=32, patch_size=8), 16),
    "distilled": (MRLADistilledVisionTransformer, dict(arch=ARCH, img_size=32, patch_size=8), 16),
    "ceit": (MRLACeiT, dict(arch=ARCH, img_size=32, patch_size=2, stem_channels=8), 16),
    "pvtv2": (MRLAPyramidVisionTransformerV2, dict(embed_dims=16, num_layers=(2, 2, 1, 1)), 16),
}
TYPES = {
    "mla": dict(type="MLA"),
    "linear-rla": dict(type="LinearRLA"),
    "linear-rla-channels": dict(type="LinearRLA", head_channels=1),
    "dwconv": dict(type="DWConv"),
    "crla": dict(type="MRLALight", head_channels=1),
    "one-head": dict(type="MRLALight", head_channels="all"),
    "output": dict(type="MRLALight", recurrence="output"),
    "no-previous": dict(type="MRLALight", recurrence=None),
    "no-dwconv": dict(type="MRLALight", value_conv=False),
    "fc": dict(type="MRLALight", projection="fc"),
    "lambda-1": dict(type="MRLALight", fixed_lambda=1),
    "lambda-1-output": dict(type="MRLALight", fixed_lambda=1, recurrence="output"),
    "kcla": dict(type="KCLA", spans_stages=False),
    "base-no-dwconv-fc": dict(type="MRLABase", head_channels=8, projection="fc", value_conv=False),
}


def build(host: str, attention: str, **more) -> nn.Module:
    cls, kwargs, heads = HOSTS[host]
    cfg = dict(TYPES[attention])
    if host in ("resnet", "resnext") and cfg["type"] != "DWConv":
        cfg.setdefault("head_channels", heads)  # the others have a default of their own
    return cls(**kwargs, layer_attention=cfg, **more)


def attentions(model: nn.Module) -> list[LayerAttention]:
    return [m for m in model.modules() if isinstance(m, LayerAttention)]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("attention", TYPES)
def test_every_parameter_gets_a_gradient(host, attention):
    """In a training step at an odd size; in eval mode it is a function of its input."""
    model = build(host, attention, drop_path_rate=0.1)
    model.init_weights()
    plain = HOSTS[host][0](**HOSTS[host][1], layer_attention=None).state_dict().keys()
    assert all("mrla" in key for key in model.state_dict().keys() - plain)
    x = torch.randn(2, 3, 40, 32)
    outs = flat(model.train()(x))
    sum((o * torch.randn_like(o)).sum() for o in outs).backward()
    assert not [k for k, p in model.named_parameters() if p.grad is None]
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(flat(model(x)), flat(model(x)), strict=True))
    found = attentions(model)
    cfg, default = TYPES[attention], HOSTS[host][2]
    if (host, attention) == ("resnet20", "kcla"):  # the host has none, and the type's is larger
        default = 64
    assert {type(m).__name__ for m in found} == {cfg["type"]}
    for layer in found:
        if isinstance(layer, DWConv):
            continue
        wanted = cfg.get("head_channels", default)
        assert layer.head_channels == (
            layer.channels if wanted == "all" else min(wanted, layer.channels)
        )


@pytest.mark.parametrize("host", ["resnet", "vit"])
@pytest.mark.parametrize("attention", TYPES)
def test_started_as_identity_it_is_the_plain_network_and_grows_in(host, attention):
    model = build(host, attention)
    plain = HOSTS[host][0](**HOSTS[host][1], layer_attention=None)
    missing = plain.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert not missing
    for part in model.modules():
        if hasattr(part, "start_as_identity"):
            part.start_as_identity()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        pairs = zip(flat(model.eval()(x)), flat(plain.eval()(x)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    sum((o * torch.randn_like(o)).sum() for o in flat(model.train()(x))).backward()
    norms = [
        (k, p)
        for k, p in model.named_parameters()
        if k.endswith(("mrla.norm.weight", "bn_mrla.weight"))
    ]
    assert norms
    assert all(p.grad.any() for _, p in norms)


@pytest.mark.parametrize("host", HOSTS)
def test_init_weights_starts_as_the_plain_network_unless_told(host, tmp_path):
    plain = HOSTS[host][0](**HOSTS[host][1], layer_attention=None)
    plain.init_weights()
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "plain.pth")
    x = torch.randn(2, 3, 32, 32)

    def starts_as_plain(**more) -> bool:
        model = build(host, "crla", **more)
        model.init_weights()
        plain.load_state_dict(model.state_dict(), strict=False)
        with torch.no_grad():
            pairs = list(zip(flat(model.eval()(x)), flat(plain.eval()(x)), strict=True))
        return all(torch.equal(a, b) for a, b in pairs)

    assert starts_as_plain()
    assert not starts_as_plain(zero_init_mrla=False)
    # A plain checkpoint holds nothing for the layer attentions.
    cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "plain.pth"))
    assert starts_as_plain(init_cfg=cfg)
    with pytest.raises(TypeError, match="zero_init_mrla must be a bool, got 1"):
        build(host, "crla", zero_init_mrla=1)


@pytest.mark.parametrize("attention", ["mla", "linear-rla", "dwconv", "fc", "lambda-1"])
def test_recomputing_a_block_changes_nothing(attention):
    """with_cp, whose states are tuples of maps or nothing."""
    grads = []
    for with_cp in (False, True):
        torch.manual_seed(3)
        model = build("resnet", attention, with_cp=with_cp).double().train()
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
        model(x)[-1].square().mean().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-14) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("attention", TYPES)
def test_half_precision_is_finite_and_close(attention):
    model = build("resnet20", attention).train()
    x = torch.randn(4, 3, 24, 32)
    with torch.no_grad():
        expected = model(x)[-1]
        with torch.autocast("cpu", torch.bfloat16):
            got = model(x)[-1].float()
    assert got.isfinite().all()
    assert (got - expected).abs().mean() < 0.1 * expected.abs().mean()


@pytest.mark.parametrize(
    ("attention", "fused"),
    [("crla", True), ("one-head", True), ("lambda-1", True), ("output", False), ("fc", False),
     ("no-dwconv", False), ("no-previous", False), ("base-no-dwconv-fc", False), ("mla", False),
     ("linear-rla", False), ("dwconv", False), ("kcla", False)],
)  # fmt: skip
def test_the_fused_tail_runs_where_it_can_and_agrees_with_the_plain_path(
    attention, fused, monkeypatch
):
    """Bit for bit it need not be; gradients of all parameters, float64."""
    grads = []
    for backend in (None, "naive"):
        if backend:
            monkeypatch.setenv("MMRLA_BACKEND", backend)
        torch.manual_seed(5)
        model = build("resnet", attention, mrla_drop_path_rate=0.3).double().train()
        layer, norm = model.layer1[0].mrla, model.layer1[0].mrla_norm
        z = torch.randn(2, 16, 4, 4, dtype=torch.float64)
        assert layer.fuses_tail(z, model.layer1[0].last_norm, norm) == (fused and not backend)
        torch.manual_seed(6)
        x = torch.randn(3, 3, 32, 40, dtype=torch.float64, requires_grad=True)
        out = model(x)[-1]
        out.square().mean().backward()
        grads.append([out.detach(), x.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("attention", ["mla", "linear-rla", "dwconv", "lambda-1", "no-previous"])
def test_a_stage_on_real_images_by_its_equations(attention, coco_mini):
    """``out = x + drop_path(BN(o))`` around each o, with the second stage's strided projection."""
    paths = sorted(coco_mini.rglob("*.jpg"))[:2]
    images = [mmcv.imresize(mmcv.imread(path), (48, 40)) for path in paths]
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).double() / 255
    model = build("resnet", attention).double().train()
    with torch.no_grad():
        x = model.layer1(model.maxpool(model.relu(model.norm1(model.conv1(x)))))
    got = model.layer2(x)
    y, previous, layers, outputs = x, None, [], []
    for block in model.layer2:
        shortcut = y if block.downsample is None else block.downsample(y)
        y = torch.relu(block.norm2(block.conv2(torch.relu(block.norm1(block.conv1(y))))) + shortcut)
        layer = block.mrla
        outputs.append(y)
        if attention == "dwconv":
            o = equations.convolved(y, layer.value.weight)
        elif attention in ("mla", "linear-rla"):
            layers.append((layer.query.weight, layer.key.weight, layer.value.weight))
            o = equations.retrieved(type(layer), layers, outputs, 8)[-1]
        else:
            previous = shortcut if attention == "lambda-1" else 0
            o = previous + equations.gated(layer, y)
        y = y + block.mrla_norm(o)
    assert relative_error(got, y.detach()) < 1e-10
    grad = torch.randn_like(y)
    weights = list(model.layer2.parameters())
    mine, theirs = (torch.autograd.grad(out, weights, grad) for out in (got, y))
    assert all(
        (a - b).abs().max() <= 1e-8 * b.abs().max().clamp(min=1e-3)
        for a, b in zip(mine, theirs, strict=True)
    )


@needs_new_compiler
@pytest.mark.slow
@pytest.mark.parametrize("attention", TYPES)
def test_compiled_in_one_graph(attention):
    torch._dynamo.reset()
    model = build("resnet20", attention).train()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 0.0
    x = torch.randn(2, 3, 16, 16)
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        out = run(x)[-1]
        out.square().mean().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-3 * a.abs().max().clamp(min=1e-3)


def test_narrow_stages_have_one_head_whatever_the_type():
    for kind, cls in (("MLA", MLA), ("LinearRLA", LinearRLA)):
        model = MRLAResNetCIFAR(20, layer_attention=dict(type=kind))
        assert [m.head_channels for m in attentions(model)][::3] == [16, 32, 32]
        assert all(isinstance(m, cls) for m in attentions(model))
