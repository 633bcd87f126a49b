"""What all hosts keep, and each of the newer ones against equations written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.models.backbones import (
    DistilledVisionTransformer,
    EfficientNet,
    ResNet_CIFAR,
    VisionTransformer,
)
from torch import nn

from mmrla.checkpoints import load_into
from mmrla.checkpoints.files import CheckpointError
from mmrla.models import (
    CeiT,
    MRLACeiT,
    MRLADistilledVisionTransformer,
    MRLAEfficientNet,
    MRLAPyramidVisionTransformerV2,
    MRLAResNetCIFAR,
    MRLAVisionTransformer,
    SimpleFeaturePyramid,
)
from tests.conftest import generated, relative_error
from tests.models import reference

# mmdet's, which imports only behind mmrla where mmcv has no compiled operations.
PyramidVisionTransformerV2 = MRLAPyramidVisionTransformerV2.__bases__[1]
ARCH = dict(embed_dims=32, num_layers=5, num_heads=2, feedforward_channels=48)
TOKENS = dict(arch=ARCH, img_size=64)
PVT = dict(embed_dims=16, num_layers=(2, 2, 1, 1), out_indices=(0, 1, 2, 3))
CIFAR = dict(stem_channels=16, base_channels=16, num_stages=3, strides=(1, 2, 2),
             dilations=(1, 1, 1), out_indices=(2,))  # fmt: skip
# EfficientNet-Lite0, which mmpretrain lacks: kernel, width, squeeze, stride, expansion, kind.
LITE0 = [
    [[3, 32, 0, 2, 0, -1]],
    [[3, 16, 0, 1, 1, 0]],
    [[3, 24, 0, 2, 6, 0], [3, 24, 0, 1, 6, 0]],
    [[5, 40, 0, 2, 6, 0], [5, 40, 0, 1, 6, 0]],
    [[3, 80, 0, 2, 6, 0], *[[3, 80, 0, 1, 6, 0]] * 2, *[[5, 112, 0, 1, 6, 0]] * 3],
    [[5, 192, 0, 2, 6, 0], *[[5, 192, 0, 1, 6, 0]] * 3, [3, 320, 0, 1, 6, 0]],
    [[1, 1280, 0, 1, 0, -1]],
]
# Ours, its ancestor with the same arguments, those arguments, d_k.
HOSTS = {
    "efficientnet": (MRLAEfficientNet, EfficientNet, dict(arch="b0", out_indices=(3, 6)), 8),
    "efficientnet-lite0": (MRLAEfficientNet, None, dict(arch="lite0", out_indices=(3, 6)), 8),
    "vit": (MRLAVisionTransformer, VisionTransformer, TOKENS | dict(patch_size=8), 16),
    "vit-featmap": (
        MRLAVisionTransformer,
        VisionTransformer,
        TOKENS | dict(patch_size=8, out_type="featmap", with_cls_token=False),
        16,
    ),
    "deit-distilled": (
        MRLADistilledVisionTransformer,
        DistilledVisionTransformer,
        TOKENS | dict(patch_size=8),
        16,
    ),
    "ceit": (MRLACeiT, CeiT, TOKENS | dict(stem_channels=8, patch_size=2), 16),
    "ceit-featmap": (
        MRLACeiT,
        CeiT,
        TOKENS | dict(stem_channels=8, patch_size=2, out_type="featmap"),
        16,
    ),
    "pvtv2": (MRLAPyramidVisionTransformerV2, PyramidVisionTransformerV2, PVT, 16),
    "resnet20": (MRLAResNetCIFAR, None, dict(depth=20), 32),
}
KINDS = ["MRLALight", "MRLABase"]


def build(name: str, kind: str | None, **more):
    ours, _, kwargs, d = HOSTS[name]
    attention = kind and dict(type=kind, head_channels=d)
    return ours(**kwargs, layer_attention=attention, **more)


def plain(name: str) -> nn.Module:
    _, ancestor, kwargs, _ = HOSTS[name]
    if ancestor is not None:
        return ancestor(**kwargs)
    if name == "efficientnet-lite0":

        class Lite0(EfficientNet):
            layer_settings = {"b": LITE0}

        return Lite0("b0", out_indices=(3, 6), act_cfg=dict(type="ReLU6"))

    class ResNet20(ResNet_CIFAR):
        arch_settings = {20: (ResNet_CIFAR.arch_settings[18][0], (3, 3, 3))}

    return ResNet20(20, **CIFAR)


def fill(model: nn.Module) -> nn.Module:
    model.load_state_dict({k: generated(k, tuple(v.shape)) for k, v in model.state_dict().items()})
    return model


def flat(outputs) -> list[torch.Tensor]:
    return [t for out in outputs for t in (out if isinstance(out, tuple) else (out,))]


@pytest.mark.parametrize("name", HOSTS)
def test_without_layer_attention_it_is_its_ancestor(name):
    """Keys, outputs at odd sizes, gradients and running statistics, bit for bit."""
    theirs, ours = fill(plain(name)), build(name, None)
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    for kind in KINDS:
        added = build(name, kind).state_dict().keys() - state.keys()
        assert all("mrla" in key for key in added)
        assert state.keys() <= build(name, kind).state_dict().keys()
    ours.load_state_dict(state)
    for size in ((64, 64), (72, 40), (33, 70)):
        x = torch.randn(2, 3, *size)
        grads = []
        for model in (theirs, ours):
            for mode in (True, False):
                torch.manual_seed(1)
                model.train(mode)
                model.zero_grad()
                outs = flat(model(x))
                torch.cat([o.flatten() for o in outs]).square().mean().backward()
                grads.append([*outs, *(p.grad for p in model.parameters())])
        for a, b in zip(grads[0] + grads[1], grads[2] + grads[3], strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HOSTS)
def test_every_parameter_gets_a_gradient_and_half_precision_is_finite(name, kind):
    model = build(name, kind, drop_path_rate=0.1)
    model.init_weights()
    x = torch.randn(3, 3, 64, 48)
    # torch 2.1 has no autocast to float16 on the CPU.
    old = torch.__version__.startswith("2.1.")
    for dtype in (None, torch.bfloat16, *(() if old else (torch.float16,))):
        model.train()
        model.zero_grad()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            outs = flat(model(x))
            sum((o.float() * torch.randn_like(o.float())).sum() for o in outs).backward()
        assert all(o.isfinite().all() for o in outs)
        missing = [k for k, p in model.named_parameters() if p.grad is None]
        assert not missing
        assert all(p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        once, twice = flat(model(x)), flat(model(x))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["efficientnet", "efficientnet-lite0", "vit", "deit-distilled", "ceit", "pvtv2"]
)
def test_warm_start_is_the_plain_network_and_all_of_mrla_moves(name, kind, tmp_path):
    theirs = fill(plain(name))
    torch.save(theirs.state_dict(), tmp_path / "plain.pth")
    start = dict(type="mmrla.WarmStart", checkpoint=str(tmp_path / "plain.pth"))
    model = build(name, kind, init_cfg=start)
    model.init_weights()
    x = torch.randn(2, 3, 64, 64)
    theirs.eval()
    with torch.no_grad():
        expected = flat(theirs(x))
        got = flat(model.eval()(x))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for _ in range(6):
        optimizer.zero_grad()
        sum(o.square().mean() for o in flat(model(x))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    # Slowly at first: the norms around the attention start at zero.
    still = {k for k, p in model.named_parameters() if "mrla" in k and not p.grad.any()}
    # Where a class token alone is read, what stands behind the last self-attention does not count.
    behind = "layers.4.mrla" if name in ("vit", "deit-distilled", "ceit") else "none"
    still = {k for k in still if not k.startswith(behind)}
    # A group's first layer attends to itself with weight 1 whatever its query is, and in a group
    # of one layer nobody else asks for its key.
    alone = ("query.weight", "key.weight")
    assert not {k for k in still if kind == "MRLALight" or not k.endswith(alone)}
    assert len(still) <= 8


def check_against(model: nn.Module, x: torch.Tensor, expected_from) -> None:
    """Output and every gradient against a function of the input and the parameters, float64."""
    model = model.double().train()
    x = x.double().requires_grad_()
    out = flat(model(x))[-1]
    weights = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
    again = x.detach().clone().requires_grad_()
    expected = expected_from(again, weights)
    assert relative_error(out, expected.detach()) < 1e-9
    grad_out = torch.randn_like(out)
    out.backward(grad_out)
    expected.backward(grad_out)
    assert relative_error(x.grad, again.grad) < 1e-7
    for key, parameter in model.named_parameters():
        other = weights[key].grad
        assert other is not None, key
        scale = max(other.abs().max().item(), 1e-6)
        assert (parameter.grad - other).abs().max().item() / scale < 1e-6, key


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_ceit_is_what_its_paper_writes(kind):
    model = fill(build("ceit", kind))
    x = torch.randn(2, 3, 64, 64)
    check_against(model, x, lambda x, w: reference.ceit(x, w, 5, heads=2, patch=2, kind=kind, d=16))


@pytest.mark.parametrize("kind", KINDS)
def test_efficientnet_attends_behind_every_layer_with_a_shortcut(kind):
    """Around mmpretrain's own layers, the attention of each stage by its equations."""
    model = fill(build("efficientnet", kind))
    inner = fill(build("efficientnet", kind)).double().train()
    norms = [m for k, m in inner.named_modules() if k.endswith("mrla.norm")]
    assert len(norms) == 9  # of 16 layers: 7 change width or size

    def expected(x, weights):
        def run(x):
            x = inner.layers[0](x)
            for i in range(1, 6):
                state = ()
                for j, block in enumerate(inner.layers[i]):
                    shortcut, x = x, block(x)
                    if x.shape != shortcut.shape:
                        state = ()
                        continue
                    name = f"layers.{i}.{j}.mrla"
                    norm = inner.get_submodule(name).norm
                    x, state = reference.on_map(x, shortcut, state, weights, name, 8, norm, kind)
            return inner.layers[6](x)

        class Whole(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                return run(x)

        prefixed = {f"inner.{k}": v for k, v in weights.items()}
        return torch.func.functional_call(Whole(), prefixed, (x,))

    check_against(model, torch.randn(3, 3, 64, 96), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_pvtv2_attends_behind_every_block(kind):
    model = fill(build("pvtv2", kind))
    inner = fill(build("pvtv2", kind)).double().train()
    for module in (model, inner):
        for part in module.modules():
            if type(part).__name__ == "DropPath":
                part.drop_prob = 0.0

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x, weights):
            for i, (embed, blocks, norm) in enumerate(inner.layers):
                x, grid = embed(x)
                state = ()
                for j, block in enumerate(blocks):
                    shortcut, x = x, block(x, grid)
                    name = f"layers.{i}.1.{j}.mrla"
                    x, state = reference.on_tokens(
                        x, shortcut, state, weights, name, 16, grid, kind
                    )
                x = norm(x).transpose(1, 2).unflatten(2, grid)
            return x

    def expected(x, weights):
        prefixed = {f"inner.{k}": v for k, v in weights.items()}
        return torch.func.functional_call(Whole(), prefixed, (x, weights))

    class LastOnly(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x)[-1:]

    # The last map alone is compared, so each stage's own norm counts once.
    check_against(model, torch.randn(2, 3, 64, 96), expected)


@pytest.mark.parametrize(
    ("ours", "kwargs", "light", "base"),
    [
        (MRLAEfficientNet, dict(arch="b0"), 0.01, 0.01),
        (MRLAEfficientNet, dict(arch="b1"), 0.02, 0.02),
        (MRLAVisionTransformer, dict(arch="deit-tiny"), 0.03, 0.03),
        (MRLACeiT, dict(arch="tiny"), 0.03, 0.03),
    ],
)
def test_added_parameters_round_to_the_papers(ours, kwargs, light, base):
    d = dict(head_channels=8 if ours is MRLAEfficientNet else 16)

    def count(attention):
        return sum(p.numel() for p in ours(**kwargs, layer_attention=attention).parameters())

    before = count(None)
    for kind, expected in (("MRLALight", light), ("MRLABase", base)):
        assert round((count(dict(type=kind, **d)) - before) / 1e6, 2) == expected


@pytest.mark.parametrize(("kind", "total"), [("MRLALight", 5_749_792), ("MRLABase", 5_742_880)])
def test_deit_tiny_has_the_released_number_of_parameters(kind, total):
    model = dict(
        type="mmpretrain.ImageClassifier",
        backbone=dict(
            type="mmrla.MRLAVisionTransformer",
            arch="deit-tiny",
            layer_attention=dict(type=kind, head_channels=16),
        ),
        head=dict(type="mmpretrain.VisionTransformerClsHead", num_classes=1000, in_channels=192),
    )
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        assert sum(p.numel() for p in MODELS.build(model).parameters()) == total


@pytest.mark.parametrize(
    ("ours", "kwargs", "total"),
    [
        # Published: CeiT-T 6.4 M, CeiT-S 24.2 M; PVTv2-B0/B1/B2 3.7 M, 14.0 M, 25.4 M.
        (CeiT, dict(arch="tiny"), 6.4),
        (CeiT, dict(arch="small"), 24.2),
        (MRLAPyramidVisionTransformerV2, dict(arch="b0", layer_attention=None), 3.7),
        (MRLAPyramidVisionTransformerV2, dict(arch="b1", layer_attention=None), 14.0),
        (MRLAPyramidVisionTransformerV2, dict(arch="b2", layer_attention=None), 25.4),
        (MRLAResNetCIFAR, dict(depth=20, layer_attention=None), 0.3),
        (MRLAResNetCIFAR, dict(depth=56, layer_attention=None), 0.9),
        (MRLAResNetCIFAR, dict(depth=110, layer_attention=None), 1.7),
    ],
)
def test_plain_networks_have_their_published_size(ours, kwargs, total):
    model = ours(**kwargs)
    width = {CeiT: getattr(model, "embed_dims", 0), MRLAResNetCIFAR: 0}.get(ours)
    if width is None:
        width = model.embed_dims * 8
    classes = 10 if ours is MRLAResNetCIFAR else 1000
    count = sum(p.numel() for p in model.parameters()) + (width + 1) * classes
    assert round(count / 1e6, 1) == total


def test_position_embeddings_fit_other_grids():
    """From a square grid to any; what is no such layout is refused with both numbers."""
    small = fill(MRLAVisionTransformer(**TOKENS, patch_size=8))
    big = MRLAVisionTransformer(arch=ARCH, img_size=(96, 48), patch_size=8)
    load_into(big, small.state_dict())
    expected = torch.nn.functional.interpolate(
        small.pos_embed[:, 1:].reshape(1, 8, 8, 32).permute(0, 3, 1, 2),
        size=(12, 6),
        mode="bicubic",
        align_corners=False,
    )
    assert torch.equal(big.pos_embed[:, :1], small.pos_embed[:, :1])
    got = big.pos_embed[:, 1:].reshape(1, 12, 6, 32).permute(0, 3, 1, 2)
    assert relative_error(got, expected.detach()) < 1e-6
    bare = MRLAVisionTransformer(**TOKENS, patch_size=8, out_type="featmap", with_cls_token=False)
    state = {k: v for k, v in small.state_dict().items() if k != "cls_token"}
    load_into(bare, state)
    assert torch.equal(bare.pos_embed, small.pos_embed[:, 1:])
    distilled = MRLADistilledVisionTransformer(**TOKENS, patch_size=8)
    with pytest.raises(CheckpointError, match="65 tokens; without 2 extra .* leaves 63.*66 = 2"):
        load_into(distilled, small.state_dict(), allow_missing=["dist_token"])
    with pytest.raises(CheckpointError, match="66 tokens; without 1 extra .* leaves 65.*65 = 1"):
        load_into(small, distilled.state_dict())
    with pytest.raises(ValueError, match="66 tokens"):
        small.load_state_dict(distilled.state_dict(), strict=False)


def test_depth_of_groups_and_shared_stochastic_depth():
    vit = MRLAVisionTransformer(**TOKENS, patch_size=8, drop_path_rate=0.2)
    rates = [getattr(layer.mrla.drop_path, "drop_prob", 0) for layer in vit.layers]
    assert rates == [0] * 5  # as released
    for model in (
        MRLAVisionTransformer(**TOKENS, patch_size=8, drop_path_rate=0.2, mrla_drop_path_rate=None),
        MRLACeiT(**TOKENS, stem_channels=8, drop_path_rate=0.2, mrla_drop_path_rate=None),
    ):
        rates = [getattr(layer.mrla.drop_path, "drop_prob", 0) for layer in model.layers]
        assert np.allclose(rates, [0, 0.05, 0.1, 0.15, 0.2])
    net = MRLAEfficientNet("b0", drop_path_rate=0.2, mrla_drop_path_rate=None)
    for block in net._blocks():
        if hasattr(block, "mrla"):
            assert block.mrla.drop_path.drop_prob == pytest.approx(block.drop_path.drop_prob)
    pvt = MRLAPyramidVisionTransformerV2(**PVT, drop_path_rate=0.3, mrla_drop_path_rate=None)
    for stage in pvt.layers:
        for block in stage[1]:
            own = block.attn.dropout_layer.drop_prob
            assert getattr(block.mrla.drop_path, "drop_prob", 0) == pytest.approx(own)


def test_frozen_stages_and_recomputation():
    net = MRLAEfficientNet("b0", frozen_stages=4, norm_eval=True)
    net.train()
    frozen = {k for k, p in net.named_parameters() if not p.requires_grad}
    assert {k for k in frozen if "mrla" in k} == {
        k for k, _ in net.named_parameters() if "mrla" in k and int(k.split(".")[1]) < 4
    }
    assert not net.layers[4][1].mrla.norm.training
    plain_step, recomputed = (
        fill(MRLAEfficientNet("b0", with_cp=with_cp)).double().train() for with_cp in (False, True)
    )
    x = torch.randn(2, 3, 64, 64).double()
    for model in (plain_step, recomputed):
        y = x.clone().requires_grad_()
        model(y)[-1].square().mean().backward()
    for a, b in zip(plain_step.parameters(), recomputed.parameters(), strict=True):
        assert torch.allclose(b.grad, a.grad, rtol=1e-6, atol=1e-12)
    vit = MRLAVisionTransformer(**TOKENS, patch_size=8, frozen_stages=2)
    for i, layer in enumerate(vit.layers):
        assert all(p.requires_grad == (i >= 2) for p in layer.mrla.parameters())
    distilled = MRLADistilledVisionTransformer(**TOKENS, patch_size=8, frozen_stages=1)
    assert not distilled.dist_token.requires_grad
    ceit = MRLACeiT(**TOKENS, stem_channels=8, frozen_stages=1)
    assert not any(p.requires_grad for p in ceit.stem.parameters())


def test_frozen_batch_norms_of_ceit_learn_nothing():
    model = MRLACeiT(**TOKENS, stem_channels=8, frozen_stages=2)
    model.train()
    frozen = {k: v.clone() for k, v in model.state_dict().items()
              if k.startswith(("stem.", "layers.0.", "layers.1."))}  # fmt: skip
    model(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in frozen.items())
    assert model.layers[2].ffn.bn1.num_batches_tracked == 1
    all_of_it = MRLACeiT(**TOKENS, stem_channels=8, frozen_stages=5)
    assert not any(p.requires_grad for p in all_of_it.lca.parameters())


@pytest.mark.parametrize("name", ["vit", "ceit", "pvtv2"])
@pytest.mark.parametrize("form", ["plain", "list", "prefixed", "classifier"])
def test_pretrained_weights_are_all_there(name, form, tmp_path):
    """Whatever the form of init_cfg: nothing that was loaded is overwritten or passed over."""
    source = fill(build(name, "MRLALight"))
    state = source.state_dict()
    if form == "classifier":
        state = {f"backbone.{k}": v for k, v in state.items()} | {"head.x": torch.zeros(1)}
    torch.save(state, tmp_path / "weights.pth")
    cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "weights.pth"))
    if form == "classifier":
        cfg["prefix"] = "backbone."
    if form == "prefixed":
        cfg["type"] = "mmengine.Pretrained"
    model = build(name, "MRLALight", init_cfg=[cfg] if form == "list" else cfg)
    model.init_weights()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in source.state_dict().items())


def test_other_init_cfgs_of_pvtv2_hold():
    constant = dict(type="Constant", layer="Conv2d", val=0.5)
    model = build("pvtv2", "MRLALight", init_cfg=constant)
    model.init_weights()
    assert (model.layers[0][0].projection.weight == 0.5).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda **kw: MRLAVisionTransformer(
            **TOKENS, patch_size=8, with_cls_token=False, out_type="featmap", **kw
        ),
        lambda **kw: MRLAVisionTransformer(**TOKENS, patch_size=8, pre_norm=True, **kw),
        lambda **kw: MRLAVisionTransformer(
            **TOKENS, patch_size=8, layer_scale_init_value=0.1, **kw
        ),
        lambda **kw: MRLAEfficientNet("es", **kw),
        lambda init_cfg=None, **kw: CeiT(**TOKENS, stem_channels=8, init_cfg=init_cfg),
    ],
)
def test_warm_start_of_variants(make, tmp_path):
    """Networks of other arguments than the usual start from their own plain weights."""
    theirs = fill(make(layer_attention=None))
    torch.save(theirs.state_dict(), tmp_path / "plain.pth")
    model = make(init_cfg=dict(type="mmrla.WarmStart", checkpoint=str(tmp_path / "plain.pth")))
    model.init_weights()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        pairs = zip(flat(model.eval()(x)), flat(theirs.eval()(x)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_the_hosts_where_nobody_says(kind):
    for name, d in (("vit", 16), ("ceit", 16), ("pvtv2", 16), ("efficientnet", 8)):
        ours, _, kwargs, _ = HOSTS[name]
        model = ours(**kwargs, layer_attention=dict(type=kind))
        assert {m.head_channels for m in model.modules() if hasattr(m, "head_channels")} == {d}


def test_narrow_stages_have_one_head():
    model = MRLAResNetCIFAR(20)
    stages = (model.layer1, model.layer2, model.layer3)
    assert [stage[0].mrla.head_channels for stage in stages] == [16, 32, 32]
    narrow = MRLAResNetCIFAR(20, layer_attention=dict(type="MRLABase", head_channels=8))
    assert narrow.layer1[0].mrla.head_channels == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("vit", "MRLALight", mrla_group_size=0), "at least 1, got 0"),
        (lambda: build("ceit", "MRLABase", mrla_group_size=-2), "at least 1, got -2"),
        (lambda: build("vit", "MRLALight", mrla_group_size=2.0), "must be an int, got 2.0"),
        (lambda: build("pvtv2", "MRLALight", mrla_drop_path_rate=1.0), r"\[0, 1\), got 1.0"),
        (
            lambda: MRLAEfficientNet(
                "b0", layer_attention=dict(type="MRLALight", head_channels=16)
            ),
            "head_channels=16 with channels=24",
        ),
        (
            lambda: MRLAPyramidVisionTransformerV2(
                "b0",
                layer_attention=dict(
                    type="MRLABase",
                    head_channels=48,
                ),
            ),
            "head_channels=48 with channels=",
        ),
        (
            lambda: MRLACeiT("tiny", layer_attention=dict(type="MRLALight", head_channels=20)),
            "head_channels=20 with channels=192",
        ),
        (lambda: MRLAPyramidVisionTransformerV2("b9"), "b0.*got 'b9'"),
        (lambda: CeiT("huge"), "tiny.*got 'huge'"),
        (lambda: build("ceit", None, with_cls_token=False), "no with_cls_token, got .*=False"),
        (lambda: build("ceit", None, pre_norm=True), "CeiT has no pre_norm, got pre_norm=True"),
        (lambda: build("ceit", None, layer_cfgs=[{}]), "CeiT has no layer_cfgs"),
        (lambda: build("deit-distilled", None, with_cls_token=False), "has a class token, got"),
        (lambda: MRLAResNetCIFAR(20, frozen_stages=4), "frozen_stages must be from -1 to 3, got 4"),
        (lambda: MRLAResNetCIFAR(21), r"\[20, 56, 110\], got 21"),
        (
            lambda: MRLAVisionTransformer(**TOKENS, with_cls_token=False),
            "with_cls_token must be True",
        ),
        (lambda: SimpleFeaturePyramid(32, scales=(8.0,)), "4, 2, 1 and 0.5, got 8.0"),
        (lambda: SimpleFeaturePyramid(32, num_outs=2), "got 2 with"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_grid_that_cannot_be_made_is_named():
    layer = build("vit", "MRLALight").layers[0].mrla
    with pytest.raises(ValueError, match="10 patch tokens .11 tokens, 1 of them extra.*3 x 3 = 9"):
        layer(torch.zeros(1, 11, 32), torch.zeros(1, 11, 32), (3, 3), 1, None)


def test_simple_feature_pyramid():
    neck = SimpleFeaturePyramid(32, 16)
    x = torch.randn(2, 32, 6, 5, requires_grad=True)
    outs = neck((torch.zeros(1), x))
    assert [tuple(o.shape) for o in outs] == [
        (2, 16, 24, 20), (2, 16, 12, 10), (2, 16, 6, 5), (2, 16, 3, 2), (2, 16, 2, 1)]  # fmt: skip
    assert torch.equal(outs[4], outs[3][:, :, ::2, ::2])
    sum(o.square().sum() for o in outs).backward()
    assert all(p.grad is not None for p in neck.parameters())
    # LayerNorm over channels ends every level.
    assert outs[0].mean(1).abs().max() < 1e-5


def test_gradients_of_one_image_are_those_of_it_in_a_batch():
    """CeiT with frozen norms: torch on the CPU misreads some strides of a batch of one there."""
    model = fill(build("ceit", None)).double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    grads = []
    for image in (x, x.repeat(2, 1, 1, 1)):
        model.zero_grad()
        flat(model(image))[0].square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for got, expected in zip(*grads, strict=True):
        assert (got - expected).abs().max() <= 1e-9 * expected.abs().max() + 1e-15
