"""Hosts beside ResNet against equations written out, and what each has of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mmrla.checkpoints import load_into
from mmrla.checkpoints.files import CheckpointError
from mmrla.models import (
    CeiT,
    MRLACeiT,
    MRLADistilledVisionTransformer,
    MRLAEfficientNet,
    MRLAPyramidVisionTransformerV2,
    MRLAResNet,
    MRLAResNetCIFAR,
    MRLAVisionTransformer,
    SimpleFeaturePyramid,
)
from tests import reference
from tests.conftest import compare, filled, flat, relative_error
from tests.models.zoo import CEIT, KINDS, PVT, VIT, build, count, starting_from

LIMITS = dict(limits=(1e-9, 1e-7, 1e-6), zero=1e-12)


def around(inner: nn.Module, run):
    """``run(x, weights)`` with the inner network's own modules, as a function of its parameters."""

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x, weights):
            return run(x, weights)

    return lambda x, w: torch.func.functional_call(
        Whole(), {f"inner.{key}": value for key, value in w.items()}, (x, w)
    )


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_ceit_is_what_its_paper_writes(kind):
    model = filled(build("ceit", kind and dict(type=kind), img_size=64))
    x = torch.randn(2, 3, 64, 64)
    compare(model, lambda x, w: reference.ceit(x, w, 5, 2, 2, kind, d=16), x, **LIMITS)


@pytest.mark.parametrize("kind", KINDS)
def test_efficientnet_attends_behind_every_layer_with_a_shortcut(kind):
    """Around mmpretrain's own layers, the attention of each stage by its equations."""
    model, inner = (filled(build("efficientnet", dict(type=kind))).double() for _ in range(2))
    inner.train()
    assert len([k for k, _ in inner.named_modules() if k.endswith("mrla.norm")]) == 9

    def run(x, weights):
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

    compare(model, around(inner, run), torch.randn(3, 3, 64, 96), **LIMITS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["pvtv2", "vit", "distilled"])
def test_transformers_attend_behind_every_block(name, kind):
    """Around the ancestor's own blocks, on a grid that is no square."""
    more = dict(img_size=(48, 32), out_type="raw")
    if name == "pvtv2":
        more = dict(out_indices=(3,))
    model, inner = (filled(build(name, dict(type=kind), **more)).double() for _ in range(2))
    inner.train()
    for part in (*model.modules(), *inner.modules()):
        if type(part).__name__ == "DropPath":
            part.drop_prob = 0.0

    def run_pvt(x, weights):
        for i, (embed, blocks, norm) in enumerate(inner.layers):
            x, grid = embed(x)
            state = ()
            for j, block in enumerate(blocks):
                place = (f"layers.{i}.1.{j}.mrla", 16, grid, kind)
                shortcut, x = x, block(x, grid)
                x, state = reference.on_tokens(x, shortcut, state, weights, *place)
            x = norm(x).transpose(1, 2).unflatten(2, grid)
        return x

    def run_vit(x, weights):
        x, grid = inner.patch_embed(x)
        extra = [getattr(inner, n) for n in ("cls_token", "dist_token") if hasattr(inner, n)]
        x = torch.cat([*(t.expand(len(x), -1, -1) for t in extra), x], 1) + inner.pos_embed
        state = ()
        for i, block in enumerate(inner.layers):
            state = () if i % 4 == 0 else state
            place = (f"layers.{i}.mrla", 16, grid, kind)
            shortcut, x = x, block(x)
            x, state = reference.on_tokens(x, shortcut, state, weights, *place)
        return inner.norm1(x) if hasattr(inner, "norm1") else inner.ln1(x)

    x = torch.randn(2, 3, 64, 32) if name == "pvtv2" else torch.randn(2, 3, 48, 32)
    compare(model, around(inner, run_pvt if name == "pvtv2" else run_vit), x, **LIMITS)


# Millions of parameters with a classifier: what the attention adds (light and base alike), and the
# plain networks' published ones.
ADDED = [
    (MRLAEfficientNet, dict(arch="b0"), 0.01), (MRLAEfficientNet, dict(arch="b1"), 0.02),
    (MRLAVisionTransformer, dict(arch="deit-tiny"), 0.03), (MRLACeiT, dict(arch="tiny"), 0.03),
]  # fmt: skip
PUBLISHED = [
    (CeiT, dict(arch="tiny"), 192, 6.4), (CeiT, dict(arch="small"), 384, 24.2),
    *((MRLAPyramidVisionTransformerV2, dict(arch=arch, layer_attention=None), width, total)
      for arch, width, total in (("b0", 256, 3.7), ("b1", 512, 14.0), ("b2", 512, 25.4))),
    *((MRLAResNetCIFAR, dict(depth=depth, layer_attention=None), 0, total)
      for depth, total in ((20, 0.3), (56, 0.9), (110, 1.7))),
    # Table 1 of MRLA's paper.
    (MRLAResNet, dict(depth=50, layer_attention=dict(type="DIAUnit")), 2048, 28.4),
    (MRLAResNet, dict(depth=50, layer_attention=dict(type="RecurrentLayerAggregation")),
     2048 + 32, 25.9),
]  # fmt: skip


def test_sizes_are_the_published():
    for cls, kwargs, expected in ADDED:
        d = dict(head_channels=8 if cls is MRLAEfficientNet else 16)
        before = count(cls, **kwargs, layer_attention=None)
        for kind in KINDS:
            added = count(cls, **kwargs, layer_attention=dict(type=kind, **d)) - before
            assert round(added / 1e6, 2) == expected
    for cls, kwargs, width, total in PUBLISHED:
        classifier = (width + 1) * (10 if cls is MRLAResNetCIFAR else 1000)
        assert round((count(cls, **kwargs) + classifier) / 1e6, 1) == total


@pytest.mark.parametrize(("kind", "total"), [("MRLALight", 5_749_792), ("MRLABase", 5_742_880)])
def test_deit_tiny_has_the_released_number_of_parameters(kind, total):
    attention = dict(type=kind, head_channels=16)
    backbone = count(MRLAVisionTransformer, arch="deit-tiny", layer_attention=attention)
    assert backbone + (192 + 1) * 1000 == total


def test_position_embeddings_fit_other_grids():
    """From a square grid to any; what is no such layout is refused with both numbers."""
    small = filled(build("vit", None, img_size=64))
    big = build("vit", None, img_size=(96, 48))
    load_into(big, small.state_dict())
    square = small.pos_embed[:, 1:].reshape(1, 8, 8, 32).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(square, (12, 6), mode="bicubic", align_corners=False)
    assert torch.equal(big.pos_embed[:, :1], small.pos_embed[:, :1])
    got = big.pos_embed[:, 1:].reshape(1, 12, 6, 32).permute(0, 3, 1, 2)
    assert relative_error(got, expected.detach()) < 1e-6
    bare = build("vit", None, img_size=64, out_type="featmap", with_cls_token=False)
    load_into(bare, {k: v for k, v in small.state_dict().items() if k != "cls_token"})
    assert torch.equal(bare.pos_embed, small.pos_embed[:, 1:])
    distilled = build("distilled", None, img_size=64)
    with pytest.raises(CheckpointError, match="65 tokens; without 2 extra .* leaves 63.*66 = 2"):
        load_into(distilled, small.state_dict(), allow_missing=["dist_token"])
    with pytest.raises(CheckpointError, match="66 tokens; without 1 extra .* leaves 65.*65 = 1"):
        load_into(small, distilled.state_dict())
    with pytest.raises(ValueError, match="66 tokens"):
        small.load_state_dict(distilled.state_dict(), strict=False)


def test_shared_stochastic_depth():
    def rates(model) -> list[float]:
        return [getattr(layer.mrla.drop_path, "drop_prob", 0) for layer in model.layers]

    shared = dict(drop_path_rate=0.2, mrla_drop_path_rate=None)
    assert rates(MRLAVisionTransformer(**VIT, drop_path_rate=0.2)) == [0] * 5  # as released
    for model in (MRLAVisionTransformer(**VIT, **shared), MRLACeiT(**CEIT, **shared)):
        assert np.allclose(rates(model), [0, 0.05, 0.1, 0.15, 0.2])
    for block in MRLAEfficientNet("b0", **shared)._blocks():
        if hasattr(block, "mrla"):
            assert block.mrla.drop_path.drop_prob == pytest.approx(block.drop_path.drop_prob)
    for stage in MRLAPyramidVisionTransformerV2(**PVT, **shared).layers:
        for block in stage[1]:
            own = block.attn.dropout_layer.drop_prob
            assert getattr(block.mrla.drop_path, "drop_prob", 0) == pytest.approx(own)


@pytest.mark.parametrize("name", ["resnet", "efficientnet", "vit", "pvtv2"])
def test_drop_path_drops_samples_of_the_attention_in_training_alone(name):
    model = build(name, dict(type="MRLALight"), mrla_drop_path_rate=0.4)
    branch = next(
        m for k, m in model.named_modules() if k.endswith(("mrla.drop_path", "mrla_drop_path"))
    )
    x = torch.ones(1000, 1, 1, 1)
    assert torch.equal(branch.eval()(x), x)
    survivors = branch.train()(x).flatten()
    assert torch.allclose(survivors.unique(), torch.tensor([0.0, 1 / 0.6]))
    assert 0.55 < (survivors > 0).float().mean() < 0.65


def test_frozen_stages():
    net = MRLAEfficientNet("b0", frozen_stages=4, norm_eval=True).train()
    for key, parameter in net.named_parameters():
        if "mrla" in key:
            assert parameter.requires_grad == (int(key.split(".")[1]) >= 4)
    assert not net.layers[4][1].mrla.norm.training
    vit = MRLAVisionTransformer(**VIT, frozen_stages=2)
    for i, layer in enumerate(vit.layers):
        assert all(p.requires_grad == (i >= 2) for p in layer.mrla.parameters())
    distilled = MRLADistilledVisionTransformer(**VIT, frozen_stages=1)
    assert not distilled.dist_token.requires_grad
    ceit = MRLACeiT(**CEIT, frozen_stages=2).train()
    assert not any(p.requires_grad for p in ceit.stem.parameters())
    frozen = {k: v.clone() for k, v in ceit.state_dict().items()
              if k.startswith(("stem.", "layers.0.", "layers.1."))}  # fmt: skip
    ceit(torch.randn(2, 3, 32, 32))  # frozen batch norms learn nothing
    assert all(torch.equal(v, ceit.state_dict()[k]) for k, v in frozen.items())
    assert ceit.layers[2].ffn.bn1.num_batches_tracked == 1
    whole = MRLACeiT(**CEIT, frozen_stages=5)
    assert not any(p.requires_grad for p in whole.lca.parameters())


@pytest.mark.parametrize("name", ["vit", "ceit", "pvtv2"])
@pytest.mark.parametrize("form", ["plain", "list", "prefixed", "classifier"])
def test_pretrained_weights_are_all_there(name, form, tmp_path):
    """Whatever the form of init_cfg: nothing that was loaded is overwritten or passed over."""
    source = filled(build(name, "light"))
    state = source.state_dict()
    if form == "classifier":
        state = {f"backbone.{k}": v for k, v in state.items()} | {"head.x": torch.zeros(1)}
    cfg = starting_from(
        state, tmp_path, "mmengine.Pretrained" if form == "prefixed" else "Pretrained"
    )
    if form == "classifier":
        cfg["prefix"] = "backbone."
    model = build(name, "light", init_cfg=[cfg] if form == "list" else cfg)
    model.init_weights()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in source.state_dict().items())


def test_other_init_cfgs_of_pvtv2_hold():
    model = build("pvtv2", "light", init_cfg=dict(type="Constant", layer="Conv2d", val=0.5))
    model.init_weights()
    assert (model.layers[0][0].projection.weight == 0.5).all()


def test_a_grid_that_cannot_be_made_is_named():
    layer = build("vit", "light").layers[0].mrla
    with pytest.raises(ValueError, match="10 patch tokens .11 tokens, 1 of them extra.*3 x 3 = 9"):
        layer(torch.zeros(1, 11, 32), torch.zeros(1, 11, 32), (3, 3), 1, None)


def test_simple_feature_pyramid():
    neck = SimpleFeaturePyramid(32, 16)
    outs = neck((torch.zeros(1), torch.randn(2, 32, 6, 5)))
    assert [tuple(o.shape) for o in outs] == [
        (2, 16, 24, 20), (2, 16, 12, 10), (2, 16, 6, 5), (2, 16, 3, 2), (2, 16, 2, 1)]  # fmt: skip
    assert torch.equal(outs[4], outs[3][:, :, ::2, ::2])
    sum(o.square().sum() for o in outs).backward()
    assert all(p.grad is not None for p in neck.parameters())
    # LayerNorm over channels ends every level.
    assert outs[0].mean(1).abs().max() < 1e-5


def test_gradients_of_one_image_are_those_of_it_in_a_batch():
    """CeiT with frozen norms: torch on the CPU misreads some strides of a batch of one there."""
    model = filled(build("ceit", None)).double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    x, grads = torch.randn(1, 3, 64, 64, dtype=torch.float64), []
    for image in (x, x.repeat(2, 1, 1, 1)):
        model.zero_grad()
        flat(model(image))[0].square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for got, expected in zip(*grads, strict=True):
        assert (got - expected).abs().max() <= 1e-9 * expected.abs().max() + 1e-15
