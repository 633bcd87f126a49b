"""AttnRes and DenseFormer in ViTs: against their equations, and at the start the plain network."""

from __future__ import annotations

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from mmrla.analysis import activation_memory, record_layer_attention
from mmrla.layers import AttnRes
from mmrla.models import (
    LayerAttentionWrapper,
    MRLACeiT,
    MRLADistilledVisionTransformer,
    MRLAEfficientNet,
    MRLAPyramidVisionTransformerV2,
    MRLAResNet,
    MRLAVisionTransformer,
)
from tests.conftest import compare, filled, needs_new_compiler, relative_error
from tests.models.zoo import ARCH, CEIT, after_step, assert_same, starting_from
from tests.reference import stream_vit

DEPTH, HEADS = ARCH["num_layers"], ARCH["num_heads"]
FULL, DENSE = dict(type="AttnRes"), dict(type="DenseFormer")
# 3 and 4 do not divide the 10 sub-layers; 16 is more than there are.
ATTNRES = [FULL, *(dict(FULL, block_size=size) for size in (2, 3, 4, 16))]
ALL = [*ATTNRES, DENSE]
PRECISE = dict(type="LN", eps=1e-14)


def vit(attention, cls=MRLAVisionTransformer, **kwargs) -> nn.Module:
    """35 patches."""
    given = dict(arch=ARCH, img_size=(40, 56), patch_size=8) | kwargs
    return cls(layer_attention=attention, **given)


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 40, 56)


def expected(x, w, attention):
    size = None if attention["type"] == "DenseFormer" else attention.get("block_size", 1)
    return stream_vit(x, w, DEPTH, HEADS, 8, size)


@pytest.mark.parametrize("cls", [MRLAVisionTransformer, MRLADistilledVisionTransformer])
@pytest.mark.parametrize("attention", ALL, ids=str)
def test_network_is_its_equation(attention, cls):
    """Outputs, every gradient, and what the recorder says was attended to."""
    model = filled(vit(attention, cls, out_type="raw")).double()
    x, w = images().double(), {k: p.detach().clone() for k, p in model.named_parameters()}
    with record_layer_attention(model) as rec:
        limits = (1e-10, 1e-9, 1e-8)
        compare(model, lambda x, w: expected(x, w, attention)[0], x, limits=limits, zero=0)
    with torch.no_grad():  # what was recorded stays as it was
        for parameter in model.parameters():
            parameter.zero_()
    (group,) = rec.groups
    _, scores = expected(x, w, attention)
    assert not group.scores.requires_grad
    assert len(group.layers) == len(set(group.layers)) == len(scores)
    assert group.sources[0] == "in"
    assert group.scores.shape == (2, 1, len(group.layers), len(group.sources))
    for t, weights in enumerate(scores):
        mean = weights.expand(2, -1) if attention is DENSE else weights.mean(1)
        found = group.scores[:, 0, t]
        assert relative_error(found[:, : mean.shape[1]].double(), mean) < 1e-6
        assert found[:, mean.shape[1] :].isnan().all()


def test_sources_of_blocks_have_names():
    model = vit(dict(FULL, block_size=3))
    with record_layer_attention(model) as rec:
        model(images())
    assert rec.groups[0].layers[:3] == ("0 attn", "0 ffn", "1 attn")
    blocks = ("0 attn - 1 attn", "1 ffn - 2 ffn", "3 attn - 4 attn", "4 ffn")
    assert rec.groups[0].sources == ("in", *blocks)


def step(model, x):
    (out,) = model(x)
    out.square().mean().backward()
    return out


@pytest.mark.parametrize("attention", ALL, ids=str)
def test_starts_as_the_plain_network(attention, tmp_path):
    """Plain weights load, and outputs and the gradients of all of them are the plain network's."""
    plain = filled(vit(None, norm_cfg=PRECISE))
    start = starting_from(plain.state_dict(), tmp_path)
    model = vit(attention, norm_cfg=PRECISE, init_cfg=start)
    model.init_weights()
    if attention is not DENSE:
        plain, model = plain.double(), model.double()
    x = images().to(plain.pos_embed.dtype)
    want, got = step(plain, x), step(model, x)
    bound = 0 if attention is DENSE else 1e-9
    assert relative_error(got, want.detach()) <= bound
    ours = dict(model.named_parameters())
    for key, parameter in plain.named_parameters():
        assert relative_error(ours[key].grad, parameter.grad) <= bound, key
    added = {k: p for k, p in ours.items() if "mrla" in k}
    # Behind the last self-attention the class token alone is read, which MLPs do not mix.
    assert len(added) == DEPTH * (1 if attention is DENSE else 2)
    assert all(p.grad.any() for p in added.values())


@pytest.mark.parametrize("autocast", [False, True])
def test_memory_is_one_map_per_source(autocast):
    """Also under autocast, where the sources themselves are of half the size."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = activation_memory(vit(None), images())
        for attention in (FULL, dict(FULL, block_size=4), DENSE):
            ours = activation_memory(vit(attention), images())
            map_size, sources = 36 * 32 * 4, DEPTH * (1 if attention is DENSE else 2) + 1
            tokens = sources**2 * 36 * 4 * 3  # weights, scores, scales: a few numbers per token
            assert plain < ours < plain + sources * map_size + tokens


@pytest.mark.parametrize("attention", ALL, ids=str)
def test_half_precision(attention):
    plain, model = filled(vit(None)), filled(vit(attention))
    x = images()
    exact = model(x)[0].detach()
    with torch.autocast("cpu", torch.bfloat16):
        want, got = step(plain, x), step(model, x)
    assert got.dtype == want.dtype
    assert relative_error(got, exact) < 0.03
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model = model.bfloat16()
    assert step(model, x.bfloat16()).dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() for p in model.parameters())


@needs_new_compiler
@pytest.mark.parametrize("attention", [dict(FULL, block_size=4), DENSE], ids=str)
def test_compiles_and_exports_in_one_graph(attention):
    model = filled(vit(attention, arch=dict(ARCH, num_layers=3), drop_path_rate=0.2)).eval()
    x = images()
    want = after_step(model, x)
    model.zero_grad()
    assert_same(
        after_step(torch.compile(model, fullgraph=True, backend="aot_eager"), x), want, 1e-4
    )
    torch._dynamo.reset()
    torch.compile(model.train(), fullgraph=True, backend="eager")(x)
    torch._dynamo.reset()
    exported = torch.export.export(model.eval(), (x,)).module()
    assert relative_error(exported(x)[0], model(x)[0].detach()) < 1e-5


def test_of_many_outputs_the_last_is_the_plain_networks():
    """Earlier ones are means over sources; a frozen stage freezes what belongs to it."""
    kwargs = dict(out_type="featmap", out_indices=[1, 4], norm_cfg=PRECISE)
    plain = filled(vit(None, **kwargs)).double()
    model = vit(FULL, frozen_stages=2, **kwargs).double()
    model.load_state_dict(plain.state_dict(), strict=False)
    x = images().double()
    for got, want, factor in zip(model(x), plain(x), (5, 1), strict=True):
        assert relative_error(got * factor, want.detach()) < 1e-9
    learns = {k for k, p in model.named_parameters() if "mrla" in k and p.requires_grad}
    assert learns == {
        f"layers.{i}.mrla.{part}.query" for i in (2, 3, 4) for part in ("attn", "ffn")
    }


def test_ceit_takes_denseformer():
    plain = filled(MRLACeiT(**CEIT, layer_attention=None)).train()
    model = MRLACeiT(**CEIT, layer_attention=DENSE).train()
    model.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(step(model, x), step(plain, x))
    # The class tokens of all blocks are read, so every alpha counts.
    assert all(p.grad.any() for k, p in model.named_parameters() if "alpha" in k)


@pytest.mark.parametrize("name", ["resnet18", "swin"])
def test_wrapped_networks_take_denseformer_along_each_stage(name):
    """Behind projections too; tokens need no grid, as nothing looks at neighbours."""
    torchvision = pytest.importorskip("torchvision.models")

    def backbone():
        torch.manual_seed(0)
        if name == "swin":
            kwargs = dict(embed_dims=8, depths=(2, 3), num_heads=(2, 2), strides=(4, 2))
            return MODELS.build(dict(type="mmdet.SwinTransformer", out_indices=(1,), **kwargs))
        return torchvision.resnet18(num_classes=5)

    plain, model = backbone(), LayerAttentionWrapper(backbone(), DENSE, probe_size=64)
    plain.train(False)
    model.train(False)
    x = torch.randn(2, 3, 64, 64)
    want, got = plain(x), model(x)
    want, got = (y if isinstance(y, torch.Tensor) else y[0] for y in (want, got))
    assert relative_error(got, want.detach()) == 0
    (got * torch.randn_like(got)).sum().backward()
    alphas = {k: p for k, p in model.named_parameters() if "mrla" in k}
    assert len(alphas) == (5 if name == "swin" else 8)
    assert all(p.grad.count_nonzero() == len(p) for p in alphas.values())
    with record_layer_attention(model) as rec:
        model(x)
    assert [g.sources for g in rec.groups][-1][:2] == ("in", "0")
    with pytest.raises(ValueError, match="must be 0, got 0.5"):
        LayerAttentionWrapper(backbone(), DENSE, mrla_drop_path_rate=0.5)


@pytest.mark.parametrize("attention", [FULL, dict(FULL, block_size=3), DENSE], ids=str)
def test_timms_networks_compute_the_same(attention):
    timm = pytest.importorskip("timm")
    from timm.models.vision_transformer import ResPostBlock

    from mmrla.timm import from_mmrla

    model = filled(vit(attention))
    head = {"head.layers.head.weight": torch.eye(32), "head.layers.head.bias": torch.zeros(32)}
    state = {f"backbone.{k}": v for k, v in model.state_dict().items()}
    kwargs = dict(img_size=(40, 56), patch_size=8, embed_dim=32, depth=DEPTH, num_heads=HEADS,
                  mlp_ratio=1.5, num_classes=32)  # fmt: skip
    name = "vit_tiny_patch16_224_mrla_light"
    other = timm.create_model(name, layer_attention=attention, **kwargs)
    other.load_state_dict(from_mmrla({**state, **head}))
    x, want = images(), []
    for checkpointing in (False, True):
        other.set_grad_checkpointing(checkpointing)
        other.zero_grad()
        want.append(after_step(other, x))
        assert relative_error(want[-1]["out0"], model(x)[0].detach()) < 1e-4
    assert_same(*want, 1e-4)
    with pytest.raises(ValueError, match="must be 0, got 0.1"):
        timm.create_model(name, layer_attention=attention, mrla_drop_path_rate=0.1, **kwargs)
    if attention is not DENSE:
        with pytest.raises(ValueError, match="AttnRes: it sits after each sub-layer"):
            timm.create_model(name, layer_attention=attention, block_fn=ResPostBlock, **kwargs)


SUBLAYER = "AttnRes: it sits after each sub-layer of a transformer, in place of the residual str"
SWIN = dict(type="mmpretrain.SwinTransformer")
OUTPUT = "DenseFormer: it sits at a layer's output, which it replaces; there "


@pytest.mark.parametrize(
    ("build", "attention", "message"),
    [
        (lambda la: MRLAResNet(18, layer_attention=la), FULL, SUBLAYER),
        (lambda la: MRLAResNet(18, layer_attention=la), DENSE, OUTPUT + "MRLAResNet has no place"),
        (lambda la: MRLACeiT("tiny", layer_attention=la), FULL, SUBLAYER),
        (lambda la: MRLAEfficientNet("b0", layer_attention=la), DENSE, OUTPUT),
        (lambda la: MRLAPyramidVisionTransformerV2("b0", layer_attention=la), FULL, SUBLAYER),
        (lambda la: LayerAttentionWrapper(SWIN, la), FULL, SUBLAYER),
        (lambda la: vit(la, mrla_drop_path_rate=0.1), FULL, "AttnRes adds nothing there.*got 0.1"),
        (vit, dict(FULL, block_size=0), "block_size must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused(build, attention, message):
    with pytest.raises(ValueError, match=message):
        build(attention)


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="block_size must be an int, got '4'"):
        AttnRes(8, block_size="4")
    with pytest.raises(TypeError, match="layer_attention DenseFormer.*'index'"):
        vit(dict(DENSE, index=3))
