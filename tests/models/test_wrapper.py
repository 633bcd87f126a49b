"""A layer attention in backbones that mmrla has no host for."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.registry import MODELS
from torch import nn

import mmrla.registry
from mmrla.layers.layer_attention import Carried
from mmrla.models import LayerAttentionWrapper
from tests.conftest import flat, needs_new_compiler, relative_error
from tests.helpers import build, same
from tests.models.zoo import BASE, LIGHT, after_step, assert_same, starting_from

REGNET = dict(
    type="mmdet.RegNet",
    arch=dict(w0=8, wa=8.0, wm=2.0, group_w=8, depth=7, bot_mul=1.0),  # 1, 1, 3 and 2 layers
    stem_channels=8,
    base_channels=8,
)
SWIN = dict(embed_dims=16, depths=(2, 3), num_heads=(2, 4), strides=(4, 2), out_indices=(0, 1))
BACKBONES = {
    "regnet": REGNET,
    "res2net": dict(type="mmdet.Res2Net", depth=50, scales=4, base_width=4, base_channels=16),
    "resnest": dict(type="mmdet.ResNeSt", depth=50, base_channels=16, stem_channels=16),
    "convnext": dict(
        type="mmpretrain.ConvNeXt",
        arch=dict(depths=[2, 1, 2, 1], channels=[8, 16, 24, 32]),
        out_indices=(0, 1, 2, 3),
        gap_before_final_norm=False,
        drop_path_rate=0.3,
    ),
    "swin": dict(type="mmdet.SwinTransformer", window_size=4, drop_path_rate=0.0, **SWIN),
    "swin-mmpretrain": dict(
        type="mmpretrain.SwinTransformer",
        arch=dict(embed_dims=16, depths=[2, 2, 2, 2], num_heads=[2, 2, 4, 4]),
        window_size=4,
        pad_small_map=True,
        out_indices=(0, 3),
    ),
}
LAYERS = {"regnet": 7, "res2net": 16, "resnest": 16, "convnext": 6, "swin": 5, "swin-mmpretrain": 8}


def wrapped(backbone: dict, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return LayerAttentionWrapper(backbone=backbone, **{"probe_size": 64, **kwargs})


def parts(backbone: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in backbone.named_modules() if n.rpartition(".")[2] == "mrla"}


@pytest.mark.parametrize("attention", [LIGHT, BASE], ids=["light", "base"])
@pytest.mark.parametrize("name", BACKBONES)
def test_backbones(name, attention):
    """Keys, shapes, a gradient everywhere, and nothing left between forwards."""
    plain = MODELS.build(BACKBONES[name])
    model = wrapped(BACKBONES[name], layer_attention=attention)
    assert len(parts(model)) == LAYERS[name]
    own, ancestor = model.state_dict(), plain.state_dict()
    assert {key for key in own if "mrla" not in key} == set(ancestor)
    assert len(own) > len(ancestor)
    # A checkpoint of the ancestor loads: nothing unexpected, nothing but the attention missing.
    missing, unexpected = model.load_state_dict(ancestor, strict=False)
    assert unexpected == []
    assert all("mrla" in key for key in missing)
    image = torch.randn(2, 3, 70, 61)
    model.train(), plain.train()
    outs = flat(model(image))
    assert [o.shape for o in outs] == [o.shape for o in flat(plain(image))]
    sum((o * torch.randn_like(o)).sum() for o in outs).backward()
    without = [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]
    assert without == []
    zero = [n for n, p in model.named_parameters() if "mrla" in n and not p.grad.any()]
    # Softmax over a group of one layer does not depend on query and key.
    assert attention is BASE or zero == []
    model.eval()
    with torch.no_grad():
        assert all(map(torch.equal, flat(model(image)), flat(model(image))))


def residual_layers(model: nn.Module) -> list[list[nn.Module]]:
    return [list(getattr(model, name)) for name in model.res_layers]


class ByHand(nn.Module):
    """The equations: out = y + norm(o_t), state along a stage, shortcuts after the projection.

    ``plain`` computes the layers, the modules of ``own`` the attention.
    """

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own, self.plain = own, MODELS.build(REGNET).double()
        self.plain.load_state_dict(own.state_dict(), strict=False)

    def forward(self, image):
        plain, outs = self.plain, []
        x = plain.relu(plain.norm1(plain.conv1(image)))
        for blocks, owners in zip(residual_layers(plain), residual_layers(self.own), strict=True):
            state = None
            for block, owner in zip(blocks, owners, strict=True):
                shortcut = x if block.downsample is None else block.downsample(x)
                y = block.relu(block.norm1(block.conv1(x)))
                y = block.relu(block.norm2(block.conv2(y)))
                y = block.relu(block.norm3(block.conv3(y)) + shortcut)
                o, state = owner.mrla.attention(y, shortcut, state)
                x = y + owner.mrla.norm(o)
            outs.append(x)
        return outs


@pytest.mark.parametrize("with_cp", [False, True], ids=["", "with_cp"])
@pytest.mark.parametrize("attention", [LIGHT, dict(LIGHT, recurrence="output"), BASE],
                         ids=["light", "light-output", "base"])  # fmt: skip
def test_outputs_gradients_and_statistics(attention, with_cp):
    """Against a loop written out, in double precision and training mode."""
    model = wrapped(dict(REGNET, with_cp=with_cp), layer_attention=attention).double()
    by_hand = ByHand(copy.deepcopy(model)).train()
    image = torch.randn(2, 3, 50, 39, dtype=torch.double)
    got, found = after_step(model.train(), image), after_step(by_hand, image)
    scale = max(p.grad.abs().max() for p in model.parameters())
    for key, value in got.items():
        want = found[key if key in found else f"{'own' if 'mrla' in key else 'plain'}.{key}"]
        if key.startswith(("out", "x")):
            assert relative_error(value, want) < (1e-8 if key == "x" else 1e-10)
        elif "running" in key or "num_batches" in key:
            # Recomputed layers count a batch twice, as in the ancestor.
            assert with_cp or relative_error(value, want) < 1e-7, key
        else:
            assert (value - want).abs().max() < 1e-8 * scale, key


@pytest.mark.parametrize("name", BACKBONES)
def test_none_is_the_backbone(name):
    """Bit for bit, random numbers included."""
    torch.manual_seed(3)
    plain = MODELS.build(BACKBONES[name])
    after_build = torch.get_rng_state()
    torch.manual_seed(3)
    model = LayerAttentionWrapper(backbone=BACKBONES[name], layer_attention=None)
    assert torch.equal(torch.get_rng_state(), after_build)
    assert list(model.state_dict()) == list(plain.state_dict())
    for module in (plain, model):
        module.train()
        torch.manual_seed(4)
    image = torch.randn(2, 3, 64, 64)
    assert_same(after_step(model, image), after_step(plain, image), 0)
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_freezes_as_the_ancestor():
    cfg = dict(REGNET, frozen_stages=1, norm_eval=True)
    model = wrapped(cfg, layer_attention=LIGHT)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    plain = {n for n, p in MODELS.build(cfg).named_parameters() if not p.requires_grad}
    assert {n for n in frozen if "mrla" not in n} == plain
    assert all(n.startswith("layer1.") for n in frozen - plain)
    inside = [n for n, _ in model.named_parameters() if n.startswith("layer1.") and "mrla" in n]
    assert inside
    assert set(inside) == frozen - plain
    assert model.train() is model
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    # Swin freezes from its train().
    swin = wrapped(dict(BACKBONES["swin"], frozen_stages=1), layer_attention=LIGHT)
    assert not any(p.requires_grad for p in parts(swin)["stages.0.blocks.0.mrla"].parameters())
    swin.train()
    assert not any(m.training for m in swin.stages[0].modules())


def test_warm_start_computes_the_plain_network(tmp_path):
    """From a checkpoint of the ancestor; fresh parts of frozen stages stay trainable."""
    plain = MODELS.build(REGNET)
    plain.eval()
    init = starting_from({"state_dict": plain.state_dict()}, tmp_path)
    model = wrapped(dict(REGNET, init_cfg=init, frozen_stages=1), layer_attention=LIGHT)
    model.init_weights()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(image), plain(image))
    model.train()
    assert all(p.requires_grad for part in parts(model).values() for p in part.parameters())
    # Pretrained, as the ancestor reads it.
    init["type"] = "Pretrained"
    model = wrapped(dict(REGNET, init_cfg=init), layer_attention=LIGHT)
    model.init_weights()
    assert same(plain, model)


def test_an_exception_leaves_nothing_behind():
    """A forward that breaks inside a group, then one within another, then a whole one."""
    model = wrapped(REGNET, layer_attention=BASE).eval()
    image, other = torch.randn(1, 3, 64, 64), torch.randn(3, 3, 48, 32)
    block = model.layer3[1].conv2
    with torch.no_grad():
        expected = model(image)

        def fail(*_):
            raise RuntimeError("out of memory")

        handle = block.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(image)
        handle.remove()
        handle = None

        def nested(*_):
            handle.remove()
            model(other)

        handle = block.register_forward_pre_hook(nested)
        assert all(map(torch.equal, model(image), expected))
    assert not any(
        isinstance(v, (Carried, torch.Tensor)) for m in model.modules() for v in vars(m).values()
    )


def test_copies_and_pickles():
    model = wrapped(REGNET, layer_attention=LIGHT).eval()
    assert isinstance(model, LayerAttentionWrapper)
    assert isinstance(model, MODELS.get("mmdet.RegNet"))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(image)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(other) is type(model)
            assert other is not model
            assert all(map(torch.equal, other(image), expected))


@needs_new_compiler
@pytest.mark.parametrize(("name", "attention"), [("regnet", LIGHT), ("convnext", BASE)])
def test_compiles_to_one_graph(name, attention):
    torch._dynamo.reset()
    image = torch.randn(2, 3, 64, 64)
    cfg = dict(BACKBONES[name])
    cfg.pop("drop_path_rate", None)
    model = wrapped(cfg, layer_attention=attention)
    other = copy.deepcopy(model)
    want = after_step(other, image)
    got = after_step(torch.compile(model, backend="eager", fullgraph=True), image)
    scale = max(p.grad.abs().max() for p in other.parameters())
    for key, value in want.items():
        if value.dim() and key in dict(other.named_parameters()):
            assert (got[key] - value).abs().max() < 1e-5 * scale, key
        else:
            torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", ["regnet", "swin"])
def test_distributed(name):
    """DDP raises in the second step where a parameter had no part in the first."""
    model = wrapped(BACKBONES[name], layer_attention=LIGHT)
    parallel = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        sum(o.square().mean() for o in parallel(torch.randn(2, 3, 64, 64))).backward()


@pytest.mark.parametrize(("name", "widths"), [("regnet", [8, 16, 32, 64]), ("swin", [16, 32])])
def test_a_detector_trains_a_step(name, widths):
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    cfg = mmrla.get_config("retinanet_r50_mrla_1x").model
    cfg.backbone = dict(
        type="mmrla.LayerAttentionWrapper", backbone=BACKBONES[name], layer_attention=LIGHT
    )
    cfg.neck.update(in_channels=widths, start_level=0, out_channels=32)
    cfg.bbox_head.update(in_channels=32, feat_channels=32, num_classes=3, stacked_convs=1)
    detector = build(cfg, "mmdet")
    sample = DetDataSample(
        metainfo=dict(img_shape=(64, 96), pad_shape=(64, 96), batch_input_shape=(64, 96))
    )
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[8.0, 8.0, 40.0, 50.0]]), labels=torch.tensor([1])
    )
    before = {key: value.clone() for key, value in detector.backbone.named_parameters()}
    detector.train()
    losses = detector.loss(torch.randn(2, 3, 64, 96), [sample, sample])
    sum(sum(value) for value in losses.values()).backward()
    torch.optim.SGD(detector.parameters(), lr=1.0).step()
    stood_still = [k for k, v in detector.backbone.named_parameters() if torch.equal(v, before[k])]
    assert [key for key in stood_still if "mrla" in key] == []


@pytest.mark.parametrize("name", ["regnet", pytest.param("res2net", marks=pytest.mark.slow)])
def test_traces(name):
    """With projections, whose statistics count a batch once in the traced network too."""
    model = wrapped(BACKBONES[name], layer_attention=LIGHT)
    image = torch.randn(2, 3, 64, 64)
    reference = copy.deepcopy(model).train()
    traced = torch.jit.trace(copy.deepcopy(model).eval(), image, check_trace=False)
    with torch.no_grad():
        for got, want in zip(traced(image), model.eval()(image), strict=True):
            assert relative_error(got, want) < 1e-5
    training = copy.deepcopy(model).train()
    traced = torch.jit.trace(training, image, check_trace=False)
    training.load_state_dict(reference.state_dict())  # tracing ran it
    traced(image), reference(image)
    torch.testing.assert_close(dict(training.named_buffers()), dict(reference.named_buffers()))
    assert get_model_complexity_info(model, (3, 64, 64))["flops"] > 0
