"""DIANet, RLA_g, DLA and KCLA in the ResNet hosts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mmrla.layers import DIAUnit, DLABase, DLALight, LayerAttention, RecurrentLayerAggregation
from mmrla.models import (
    MRLACeiT,
    MRLAEfficientNet,
    MRLAPyramidVisionTransformerV2,
    MRLAResNet,
    MRLAResNetCIFAR,
    MRLAResNeXt,
    MRLAVisionTransformer,
    warm_start,
)
from mmrla.models.backbones.mrla_resnet import LayerAttentionStage, MRLABasicBlock
from tests.conftest import generated, relative_error, stable_id
from tests.layers import interaction_reference as reference

DIA = dict(type="DIAUnit", reduction=4)
RLA = dict(type="RecurrentLayerAggregation", hidden_channels=6)
LIGHT = dict(type="DLALight", head_channels=4, reduction=4)
BASE = dict(type="DLABase", head_channels=4, reduction=4)
KCLA = dict(type="KCLA", head_channels=4)
ALL = [DIA, RLA, LIGHT, BASE, KCLA]
SMALL = dict(stem_channels=8, base_channels=8, out_indices=(0, 1, 2, 3))
BY_TYPE = dict(ids=lambda cfg: cfg["type"])


def randomise(module: nn.Module) -> nn.Module:
    """Weights under which every part has an effect (zero gammas would hide the branches)."""
    state = module.state_dict()
    module.load_state_dict({k: generated(k, tuple(v.shape)) for k, v in state.items()})
    return module


def stage(layer_attention: dict, blocks: int, stride: int, **kwargs) -> LayerAttentionStage:
    return randomise(
        LayerAttentionStage(
            block=MRLABasicBlock,
            num_blocks=blocks,
            in_channels=8,
            out_channels=16,
            stride=stride,
            layer_attention=layer_attention,
            **kwargs,
        )
    ).double()


REFERENCES = {
    "DIAUnit": reference.dia_stage,
    "DLALight": lambda *args: reference.dla_light_stage(*args, 4),
    "DLABase": lambda *args: reference.dla_base_stage(*args, 4),
}


@pytest.mark.parametrize("size", [(5, 7), (8, 6)])
@pytest.mark.parametrize("cfg", [DIA, LIGHT, BASE], **BY_TYPE)
def test_stage_is_the_equation(cfg, size):
    """Outputs and every gradient of a stage of four basic blocks."""
    act = dict(type="ReLU") if cfg is BASE else None
    ours = stage(cfg, 4, 2, mrla_act_cfg=act).train()
    x = torch.randn(3, 8, *size, dtype=torch.double, requires_grad=True)
    check(ours, x, lambda x, p: REFERENCES[cfg["type"]](x, p, 4, 2), lambda x: ours(x))


def check(ours: nn.Module, x, expected_of, out_of) -> None:
    leaf = x.detach().clone().requires_grad_()
    parameters = {k: v.detach().clone().requires_grad_() for k, v in ours.named_parameters()}
    outs, expected = out_of(x), expected_of(leaf, parameters)
    outs, expected = (v if isinstance(v, tuple) else (v,) for v in (outs, expected))
    weights = [torch.randn_like(e) for e in expected]
    for got, want in zip(outs, expected, strict=True):
        assert relative_error(got, want.detach()) < 1e-10
    for found in (outs, expected):
        sum((o * w).sum() for o, w in zip(found, weights, strict=True)).backward()
    assert relative_error(x.grad, leaf.grad) < 1e-9
    for key, parameter in ours.named_parameters():
        want = parameters[key].grad
        if want is None:
            want = torch.zeros_like(parameter)
        error = (parameter.grad - want).abs().max()
        assert error < 1e-9 * max(1, want.abs().max()), key


@pytest.mark.parametrize("size", [(9, 7), (8, 12)])
def test_rla_is_the_equation_across_stages(size):
    """Two stages: the hidden map goes on, pooled, and is read through one concatenation."""
    first, second = stage(RLA, 2, 1), stage(RLA, 3, 2)
    second[0].conv1 = nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False).double()
    second[0].downsample[0] = nn.Conv2d(16, 16, 1, stride=2, bias=False).double()
    both = nn.ModuleList([first, second]).train()

    def ours(x):
        carried = [None]
        out = second(first(x, carried), carried)
        return out, carried[0]

    def expected(x, p):
        split = [{k[2:]: v for k, v in p.items() if k[0] == str(i)} for i in (0, 1)]
        h = x.new_zeros(x.shape[0], 6, *x.shape[2:])
        x, h = reference.rla_stage(x, h, split[0], 2, 1)
        return reference.rla_stage(x, h, split[1], 3, 2)

    x = torch.randn(2, 8, *size, dtype=torch.double, requires_grad=True)
    check(both, x, expected, ours)


def network(depth=18, cls=MRLAResNet, **kwargs):
    return randomise(cls(depth, **{**SMALL, **kwargs}))


@pytest.mark.parametrize("cfg", ALL, **BY_TYPE)
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(depth=50),
        dict(depth=50, norm_cfg=dict(type="GN", num_groups=2), mrla_act_cfg=None),
        dict(depth=18, deep_stem=True, avg_down=True, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)),
        dict(depth=50, style="caffe", drop_path_rate=0.3),
        dict(depth=50, cls=MRLAResNeXt, base_channels=64),
        dict(
            depth=20, cls=MRLAResNetCIFAR, base_channels=8, stem_channels=8, out_indices=(0, 1, 2)
        ),
    ],
    ids=stable_id,
)
def test_every_parameter_gets_a_gradient(cfg, kwargs):
    model = network(**kwargs, layer_attention=cfg).train()
    outs = model(torch.randn(2, 3, 65, 49))
    assert outs[-1].shape[1] == model.feat_dim
    sum(o.square().sum() for o in outs).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
    shared = [p for k, p in model.layer2.named_parameters() if ".mrla." in k]
    assert all(p.grad.abs().sum() > 0 for p in shared if p.dim() > 1 and p.shape[0] > 1)


@pytest.mark.parametrize("cfg", ALL, **BY_TYPE)
def test_state_dict_holds_the_plain_networks_and_shared_parts_once(cfg):
    model = MRLAResNet(18, **SMALL, layer_attention=cfg)
    plain, ours = (
        {k: v.shape for k, v in m.state_dict().items()}
        for m in (MRLAResNet(18, **SMALL, layer_attention=None), model)
    )
    assert plain.items() <= ours.items()
    assert all("mrla" in key for key in ours.keys() - plain.keys())
    shared = model.layer1[0].mrla.shared
    owners = {k.split(".")[1] for k in ours if any(f".mrla.{part}." in k for part in shared)}
    assert owners == ({"0"} if shared else set())
    for part in shared:
        assert getattr(model.layer1[1].mrla, part) is getattr(model.layer1[0].mrla, part)
        assert getattr(model.layer1[1].mrla, part) is not getattr(model.layer2[1].mrla, part)
    twin = copy.deepcopy(model)
    for part in shared:
        assert getattr(twin.layer1[1].mrla, part) is getattr(twin.layer1[0].mrla, part)
        assert getattr(twin.layer1[1].mrla, part) is not getattr(model.layer1[0].mrla, part)


@pytest.mark.parametrize("cfg", ALL, **BY_TYPE)
def test_checkpointing_and_eval_of_frozen_stages(cfg):
    results = []
    for with_cp in (False, True):
        model = network(layer_attention=cfg, with_cp=with_cp, norm_eval=True).train()
        torch.manual_seed(1)
        x = torch.randn(2, 3, 33, 47).requires_grad_()
        outs = model(x)
        sum(o.square().mean() for o in outs).backward()
        results.append([*outs, x.grad, *(p.grad for p in model.parameters())])
    assert all(relative_error(a, b.detach()) < 1e-5 for a, b in zip(*results, strict=True))
    frozen = network(layer_attention=cfg, frozen_stages=2).train()
    for key, parameter in frozen.named_parameters():
        assert parameter.requires_grad is not key.startswith(("conv1", "bn1", "layer1", "layer2"))
    sum(o.sum() for o in frozen(torch.randn(2, 3, 32, 32))).backward()
    assert all(p.grad is not None for p in frozen.parameters() if p.requires_grad)


@pytest.mark.parametrize("cfg", ALL, **BY_TYPE)
def test_autocast(cfg):
    model = network(layer_attention=cfg).train()
    with torch.autocast("cpu", torch.bfloat16):
        outs = model(torch.randn(2, 3, 40, 56))
    sum(o.float().square().mean() for o in outs).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("cfg", ALL, **BY_TYPE)
def test_warm_start_from_a_plain_checkpoint(cfg, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(warm_start, "print_log", lambda text, *args, **kwargs: said.append(text))
    plain = network(layer_attention=None).eval()
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    init_cfg = dict(type="mmrla.WarmStart", checkpoint=str(tmp_path / "plain.pth"))
    model = MRLAResNet(18, **SMALL, layer_attention=cfg, init_cfg=init_cfg, frozen_stages=1)
    model.init_weights()
    x = torch.randn(2, 3, 40, 56)
    outs, expected = model.eval()(x), plain(x)
    same = all(
        torch.allclose(o[:, : e.shape[1]], e, rtol=1e-4, atol=1e-5 * e.abs().max().item())
        for o, e in zip(outs, expected, strict=True)
    )
    assert same is (cfg is not DIA)
    assert any("DIAUnit the network does not start as the plain" in t for t in said) is not same
    assert model.layer1[0].conv1.weight.requires_grad is False
    assert all(p.requires_grad for k, p in model.named_parameters() if "mrla" in k)


def test_detectors_leave_rlas_last_map_out():
    """As released: no more channels; what only serves them is frozen, and keys stay."""
    cfg = dict(RLA, concat_output=False)
    model = network(layer_attention=cfg).train()
    assert model.feat_dim == 64
    assert model.state_dict().keys() == network(layer_attention=RLA).state_dict().keys()
    outs = model(torch.randn(2, 3, 32, 48))
    assert [o.shape[1] for o in outs] == [8, 16, 32, 64]
    sum(o.square().sum() for o in outs).backward()
    unused = {k for k, p in model.named_parameters() if p.grad is None}
    assert unused == {k for k, p in model.named_parameters() if not p.requires_grad}
    assert all(k.startswith(("mrla_output", "layer4.1.mrla.norm")) for k in unused)
    assert len(unused) == 4


def test_published_parameters():
    """28.4 M and 25.9 M (table 1 of MRLA's paper), a classifier of 1000 classes included."""
    for cfg, millions in (("DIAUnit", 28.4), ("RecurrentLayerAggregation", 25.9)):
        model = MRLAResNet(50, layer_attention=dict(type=cfg))
        head = (model.feat_dim + 1) * 1000
        assert round((sum(p.numel() for p in model.parameters()) + head) / 1e6, 1) == millions


def test_real_image(coco_mini):
    import mmcv

    path = sorted((coco_mini / "val2017").glob("*.jpg"))[0]
    pixels = torch.from_numpy(mmcv.imread(str(path))).permute(2, 0, 1)[None].float()
    x = (pixels - 120) / 58
    for cfg in ALL:
        for out in MRLAResNet(18, **SMALL, layer_attention=cfg).eval()(x):
            assert torch.isfinite(out).all()
            assert out.std() > 0


@pytest.mark.parametrize("cfg", ALL, **BY_TYPE)
@pytest.mark.parametrize(
    "host",
    [
        lambda la: MRLAEfficientNet("b0", layer_attention=la),
        lambda la: MRLAVisionTransformer("deit-tiny", layer_attention=la),
        lambda la: MRLAPyramidVisionTransformerV2("b0", layer_attention=la),
        lambda la: MRLACeiT("tiny", layer_attention=la),
    ],
)
def test_hosts_refuse_what_they_cannot_take(host, cfg):
    with pytest.raises(
        ValueError, match=rf"MRLA\w+ cannot take layer_attention {cfg['type']}: it s"
    ):
        host(cfg)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(layer_attention=DIA, mrla_drop_path_rate=0.2), "mrla_drop_path_rate.*DIAUnit.*0.2"),
        (dict(layer_attention=RLA, mrla_act_cfg=dict(type="ReLU")), "mrla_act_cfg.*RecurrentLayer"),
        (
            dict(layer_attention=dict(DIA, reduction=0)),
            "reduction must be at least 1, got 0",
        ),
        (
            dict(layer_attention=dict(RLA, hidden_channels=0)),
            "hidden_channels must be at least 1",
        ),
        (dict(layer_attention=dict(LIGHT, head_channels=3)), "head_channels=3"),
        (dict(layer_attention=dict(BASE, reduction=99)), "reduction=99"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MRLAResNet(18, **SMALL, **kwargs)


def test_placements_of_other_layer_attentions_raise():
    class Nowhere(LayerAttention):
        def forward(self, x, shortcut, state):
            return x, state

    with pytest.raises(NotImplementedError, match="Nowhere"):
        Nowhere(8).at_input(torch.zeros(1), None)
    assert {DIAUnit.placement, RecurrentLayerAggregation.placement} == {"branch", "input"}
    assert DLALight.placement == DLABase.placement == "after"
