from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from mmrla.analysis import query_similarity, record_layer_attention
from mmrla.layers import LayerAttention, MRLABase
from mmrla.models import (
    MRLACeiT,
    MRLAEfficientNet,
    MRLAPyramidVisionTransformerV2,
    MRLAResNet,
    MRLAResNetCIFAR,
    MRLAVisionTransformer,
)
from mmrla.registry import LAYER_ATTENTIONS
from tests.conftest import needs_new_compiler, relative_error
from tests.helpers import DEMO

LIGHT = dict(type="MRLALight", head_channels=8)
OUTPUT = dict(type="MRLALight", head_channels=8, recurrence="output")
BASE = dict(type="MRLABase", head_channels=8)
VIT = dict(embed_dims=32, num_layers=6, num_heads=2, feedforward_channels=64)
SMALL = dict(stem_channels=8, base_channels=8)


def resnet(layer_attention, depth=34, **kwargs):
    return MRLAResNet(depth, **SMALL, layer_attention=layer_attention, **kwargs)


def vit(layer_attention, **kwargs):
    return MRLAVisionTransformer(VIT, 32, 8, layer_attention=layer_attention, **kwargs)


def hooks_of(model):
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]


STAGES = {f"layer{i + 1}": n for i, n in enumerate((3, 4, 6, 3))}


# A layer without a shortcut, which has no attention, splits layers.4.
EFFICIENTNET = {"layers.2": 1, "layers.3": 1, "layers.4 1-2": 2, "layers.4 4-5": 2, "layers.5": 3}


@pytest.mark.parametrize(
    ("build", "groups"),
    [
        *((lambda a=a: resnet(a), STAGES) for a in (LIGHT, OUTPUT, BASE)),
        (lambda: MRLAResNetCIFAR(20, layer_attention=BASE), {f"layer{i}": 3 for i in (1, 2, 3)}),
        (lambda: vit(BASE), {"layers 0-3": 4, "layers 4-5": 2}),
        (lambda: vit(OUTPUT), {"layers 0-3": 4, "layers 4-5": 2}),
        # The released recurrence goes through the shortcut, which no group ends.
        (lambda: vit(LIGHT), {"layers": 6}),
        (lambda: MRLACeiT(VIT, 32, layer_attention=BASE), {"layers 0-3": 4, "layers 4-5": 2}),
        (lambda: MRLAPyramidVisionTransformerV2("b0", layer_attention=BASE),
         {f"layers.{i}.1": 2 for i in range(4)}),
        (lambda: MRLAPyramidVisionTransformerV2("b0", layer_attention=LIGHT),
         {f"layers.{i}.1": 2 for i in range(4)}),
        (lambda: MRLAEfficientNet("b0", layer_attention=LIGHT),
         EFFICIENTNET),
        (lambda: MRLAEfficientNet("b0", layer_attention=BASE),
         EFFICIENTNET),
    ],
)  # fmt: skip
def test_hosts(build, groups):
    """Groups by name, over two forwards of other sizes; the host's output stays what it was."""
    model = build().eval()
    images = [torch.randn(2, 3, 32, 32), torch.randn(1, 3, 64, 32)]
    with torch.no_grad():
        expected = [model(x) for x in images]
        with record_layer_attention(model) as rec:
            found = [model(x) for x in images]
    for a, b in zip(found, expected, strict=True):
        for one, other in zip(a, b, strict=True):
            assert relative_error(one, other) < 1e-4
    assert not hooks_of(model)
    assert {group.name: len(group.layers) for group in rec.groups} == groups
    modules = dict(model.named_modules())
    for group in rec.groups:
        count = len(group.layers)
        attention = modules[group.modules[0]]
        heads = attention.channels // attention.head_channels
        assert group.scores.shape == (3, heads, count, count)
        assert group.queries.shape == (3, count, heads, attention.head_channels)
        upper = torch.ones(count, count).triu(1).bool()
        assert torch.equal(group.scores.isnan(), upper.expand_as(group.scores))
        if isinstance(attention, MRLABase):
            sums = group.scores.nansum(-1)
            assert (sums - 1).abs().max() < 1e-5
            assert group.sum_to_one
        else:
            assert "gate" in group.label
            assert not group.sum_to_one


@pytest.mark.parametrize("training", [False, True])
def test_values_are_those_of_the_network_without_hooks(training):
    """Against features of the network taken without any hook, and the equations by hand."""
    model = resnet(BASE, 18).train(training)
    x = torch.randn(4, 3, 64, 64)
    stage, blocks = model.layer2, list(model.layer2)
    y = model.layer1(model.maxpool(model.relu(model.norm1(model.conv1(x)))))
    keys, queries, state = [], [], None
    for block in blocks:
        z = block.norm2(block.residual(block.conv1(y)))
        shortcut = y if block.downsample is None else block.downsample(y)
        features = torch.relu(z + shortcut)
        summary = features.mean((2, 3))[:, None]
        query, key = (conv(summary).unflatten(2, (-1, 8))[:, 0] for conv in
                      (block.mrla.query, block.mrla.key))  # fmt: skip
        queries.append(query)
        keys.append(key)
        y, state = block(y, state)
    expected = torch.stack([(queries[1] * key).sum(-1) for key in keys], -1) / math.sqrt(8)
    with record_layer_attention(model) as rec:
        model(x)
    (group,) = (group for group in rec.groups if group.name == "layer2")
    assert stage[0].mrla is dict(model.named_modules())[group.modules[0]]
    assert relative_error(group.scores[:, :, 1], expected.softmax(-1)) < 1e-4
    assert relative_error(group.queries, torch.stack(queries, 1)) < 1e-4


@pytest.mark.parametrize("attention", [LIGHT, BASE])
@pytest.mark.parametrize("inside", [True, False])
def test_checkpointing_records_once(attention, inside):
    """Recomputed layers are not recorded, and backward works after the hooks have gone."""
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    torch.manual_seed(0)
    model = resnet(attention, 18, with_cp=True).train()
    with record_layer_attention(model) as rec:
        loss = model(images)[0].square().mean()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert [group.scores.shape[0] for group in rec.groups] == [2] * 4
    found = {name: p.grad for name, p in model.named_parameters()}
    torch.manual_seed(0)
    plain = resnet(attention, 18).train()
    with record_layer_attention(plain) as other:
        plain(images)[0].square().mean().backward()
    for a, b in zip(rec.groups, other.groups, strict=True):
        torch.testing.assert_close(a.scores, b.scores, equal_nan=True)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(found[name], p.grad, msg=name)


def test_checkpointing_in_a_host_of_maps():
    model = MRLAEfficientNet("b0", layer_attention=BASE, with_cp=True).train()
    with record_layer_attention(model) as rec:
        model(torch.randn(2, 3, 32, 32))[0].sum().backward()
    assert [group.queries.shape[0] for group in rec.groups] == [2] * 5


def test_leaves_the_model_as_it_was():
    model = resnet(LIGHT, 18, frozen_stages=1).train()
    modes = [module.training for module in model.modules()]
    keys = {name: set(vars(module)) for name, module in model.named_modules()}
    recorders = []

    def fails():
        with record_layer_attention(model) as rec, torch.autocast("cpu", torch.bfloat16):
            recorders.append(rec)
            model(torch.randn(2, 3, 32, 32))
            raise RuntimeError("by an exception")

    with pytest.raises(RuntimeError, match="by an exception"):
        fails()
    (rec,) = recorders
    assert not hooks_of(model)
    assert [module.training for module in model.modules()] == modes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == keys
    assert all(group.scores.dtype == torch.float32 for group in rec.groups)
    assert all(not group.scores.requires_grad for group in rec.groups)
    count = len(rec.groups[0].scores)
    model(torch.randn(2, 3, 32, 32))
    assert len(rec.groups[0].scores) == count  # nothing more outside


def test_a_layer_attention_of_ones_own(monkeypatch):
    """What retrieval needs of earlier layers beyond state goes along as memory."""

    class MeanOf(LayerAttention):
        def forward(self, x, shortcut, state):
            return x, None

        def retrieval(self, x, shortcut, state, memory=None):
            from mmrla.layers import Retrieval

            count = 1 + (memory or 0)
            scores = x.new_full((len(x), 1, count), 1 / count)
            return Retrieval(x.mean((2, 3))[:, None], scores, count)

    monkeypatch.setitem(LAYER_ATTENTIONS._module_dict, "MeanOf", MeanOf)
    model = resnet(dict(type="MeanOf"), 34).eval()
    with record_layer_attention(model) as rec:
        model(torch.randn(1, 3, 32, 32))
    third = rec.groups[2]
    assert third.name == "layer3"
    assert torch.allclose(third.scores[0, 0, 5], torch.full((6,), 1 / 6))


def test_errors():
    class Silent(LayerAttention):
        def forward(self, x, shortcut, state):
            return x, state

    with (
        pytest.raises(ValueError, match="MRLAResNet has no layer attention"),
        record_layer_attention(resnet(None, 18)),
    ):
        pass
    with (
        pytest.raises(TypeError, match=r"Silent \(1\) does not tell .* no method retrieval"),
        record_layer_attention(nn.Sequential(nn.Identity(), Silent(4))),
    ):
        pass
    model = resnet(BASE, 18)
    with record_layer_attention(model) as rec:
        pass
    with pytest.raises(ValueError, match="none of the 8 layer attentions"):
        _ = rec.groups


@needs_new_compiler
def test_a_compiled_network_records_nothing_and_says_so():
    """Nor does its graph keep what was there when it was compiled."""
    model = MRLAResNetCIFAR(20, layer_attention=BASE).eval()
    compiled = torch.compile(model, backend="eager")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), record_layer_attention(compiled) as rec:
        found = compiled(images)
    with pytest.raises(ValueError, match="a compiled network does not call its modules"):
        _ = rec.groups
    with torch.no_grad():
        assert relative_error(model(images)[0], found[0]) < 1e-5
    torch._dynamo.reset()


def test_query_similarity():
    model = resnet(BASE).eval()
    with record_layer_attention(model) as rec:
        model(torch.randn(2, 3, 64, 64))
    group = rec.groups[2]
    q = group.queries
    found = query_similarity(group)
    assert found.shape == (2, 4, q.shape[2])  # six layers, without the first
    expected = (q[1, 3, 1] @ q[1, 4, 1]).abs() / (q[1, 3, 1].norm() * q[1, 4, 1].norm())
    assert torch.isclose(found[1, 2, 1], expected)
    assert query_similarity(group, include_first=True).shape == (2, 5, q.shape[2])
    assert (found <= 1).all()
    assert (found >= 0).all()
    parallel = torch.randn(64, 1, 8, 32) * torch.linspace(-2, 2, 6)[:, None, None]
    assert torch.cosine_similarity(parallel[:, :-1], parallel[:, 1:], dim=-1).max() > 1  # rounding
    assert query_similarity(replace(group, queries=parallel)).max() == 1


@pytest.mark.parametrize("mode", ["predict", "loss"])
def test_in_a_detector_on_a_real_image(mode, coco_mini):
    """All of Mask R-CNN runs inside; its backbone attends as it does alone."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    from mmrla.engine.network import build_network

    network = build_network(str(DEMO), size=96)
    model = network.model.train(mode == "loss")
    inputs, _ = network.read(sorted((coco_mini / "val2017").glob("*.jpg"))[0])
    size = tuple(inputs.shape[-2:])
    meta = dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), size)
    meta["scale_factor"] = (1.0, 1.0)
    sample = DetDataSample(metainfo=meta)
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[8.0, 8.0, 60.0, 70.0]]),
        labels=torch.zeros(1, dtype=torch.long),
        masks=BitmapMasks(torch.ones(1, *size).byte().numpy(), *size),
    )
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0).long())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with record_layer_attention(model) as rec:
        found = model(inputs, [sample], mode=mode)
        if mode == "loss":
            model.parse_losses(found)[0].backward()
    assert [group.name for group in rec.groups] == ["layer1", "layer2", "layer3", "layer4"]
    assert all(name.startswith("backbone.") for group in rec.groups for name in group.modules)
    assert not hooks_of(model)
    model.load_state_dict(state)  # running statistics
    with record_layer_attention(model.backbone) as alone, torch.no_grad():
        model.backbone(inputs)
    for a, b in zip(rec.groups, alone.groups, strict=True):
        torch.testing.assert_close(a.scores, b.scores, equal_nan=True)
