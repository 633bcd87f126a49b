"""Within-layer attentions as plugins of the ResNet hosts."""

from __future__ import annotations

from math import log2

import cv2
import pytest
import torch
from mmcv.cnn.bricks import ContextBlock, NonLocal2d
from mmengine.config import Config
from torch import nn

from mmrla.checkpoints import convert_state_dict, load_into
from mmrla.checkpoints.files import CheckpointError
from mmrla.models import (
    ECA,
    DoubleAttention,
    MRLAEfficientNet,
    MRLAResNet,
    MRLAResNetCIFAR,
    MRLAResNeXt,
)
from tests.conftest import ROOT, filled, relative_error
from tests.models.zoo import BASE, LIGHT, SMALL, after_step, assert_same, count, starting_from

AA = dict(type="mmrla.AttentionAugmentedConv", num_heads=2, min_key_channels=3, size=(4, 5))
# One of each, small enough to test, at its own place.
PLUGINS: dict[str, dict] = {
    "se": dict(cfg=dict(type="mmrla.SE", ratio=4)),
    "eca": dict(cfg=dict(type="mmrla.ECA")),
    "cbam": dict(cfg=dict(type="mmrla.CBAM", reduction=4)),
    "a2": dict(cfg=dict(type="mmrla.DoubleAttention"), blocks=(-1,), position="after_block"),
    "aa": dict(cfg=AA),
    "ba": dict(cfg=dict(type="mmrla.BridgeAttention", reduction=4)),
    "tdam": dict(cfg=dict(type="mmrla.TDAM", reduction=4, convs=2, steps=3)),
    "nl": dict(cfg=dict(type="NonLocal2d"), blocks=(-1,), position="after_block"),
    "gc": dict(cfg=dict(type="ContextBlock", ratio=0.5)),
}
FRESH_IS_IDENTITY = ("a2", "nl", "gc")


def network(name: str, depth: int = 50, cls: type = MRLAResNet, **kwargs) -> nn.Module:
    width = {} if cls is MRLAResNetCIFAR else SMALL
    kwargs = {"layer_attention": None, **width, **kwargs}
    return filled(cls(depth, plugins=[PLUGINS[name]] if name else None, **kwargs))


# --- in the hosts ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLUGINS)
@pytest.mark.parametrize(
    ("cls", "depth", "kwargs"),
    [
        (MRLAResNet, 50, dict(norm_cfg=dict(type="GN", num_groups=2))),
        (MRLAResNet, 50, dict(layer_attention=BASE)),
        (MRLAResNet, 18, dict(layer_attention=LIGHT, deep_stem=True, avg_down=True)),
        (MRLAResNeXt, 50, dict(groups=2, base_channels=8, width_per_group=8)),
        (MRLAResNetCIFAR, 20, dict(layer_attention=LIGHT)),
    ],
    ids=["resnet", "resnet with base", "basic with light", "resnext", "cifar with light"],
)
def test_every_parameter_gets_a_gradient(cls, depth, kwargs, name):
    model = network(name, depth, cls, **kwargs).train()
    size = (21, 17) if cls is MRLAResNetCIFAR else (65, 49)
    sum(out.square().mean() for out in model(torch.randn(3, 3, *size))).backward()
    per_block = "blocks" not in PLUGINS[name]
    places = sum(model.stage_blocks) if per_block else len(model.stage_blocks)
    assert len(plugins_of(model)) == places
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


def plugins_of(part: nn.Module) -> list[nn.Module]:
    return [getattr(m, n) for m in part.modules() for n in getattr(m, "plugin_names", ())]


@pytest.mark.parametrize("name", PLUGINS)
def test_recomputation_freezing_and_half_precision(name):
    """The same gradients by with_cp; an effect, near in bfloat16; what freezing promises."""
    x = torch.randn(2, 3, 64, 48)
    plain, again = (
        after_step(network(name, 18, with_cp=with_cp, layer_attention=LIGHT).train(), x)
        for with_cp in (False, True)
    )
    assert_same(again, plain, 1e-5, without=("running", "num_batches"))
    assert all(torch.equal(again[k], v) for k, v in plain.items() if k.startswith("out"))
    model, without = network(name, 18).eval(), network("", 18).eval()
    with torch.no_grad():
        exact, without = model(x)[-1], without(x)[-1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(x)[-1].float()
    assert relative_error(exact, without) > 1e-2
    assert half.isfinite().all()
    assert relative_error(half, exact) < 0.3
    model = network(name, 18, frozen_stages=1, norm_eval=True).train()
    for plugin in plugins_of(model.layer1):
        assert not plugin.training
        assert not any(p.requires_grad for p in plugin.parameters())
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert not any(m.training for m in norms)
    assert all(p.requires_grad for m in plugins_of(model.layer2) for p in m.parameters())


def test_only_the_named_stages_and_blocks_have_it():
    plugin = dict(PLUGINS["eca"], stages=(False, True, True, False), blocks=(0, -2))
    model = MRLAResNet(50, layer_attention=None, plugins=[plugin], **SMALL)
    found = {k.rsplit(".eca", 1)[0] for k in model.state_dict() if ".eca." in k}
    assert found == {"layer2.0", "layer2.2", "layer3.0", "layer3.4"}


def test_kernel_sizes_of_eca_are_the_papers():
    for channels in (16, 64, 256, 512, 1024, 2048):
        t = (log2(channels) + 1) / 2
        assert ECA(channels).conv.kernel_size[0] == int(t) + (int(t) % 2 == 0)


def test_stochastic_depth_of_eca_passes_samples_by():
    module = filled(ECA(16, drop_path_rate=0.25))
    x = torch.rand(400, 16, 2, 3) + 0.1
    scaled = module.eval()(x) / x
    ratio = module.train()(x) / x
    dropped = (ratio - 1).abs().amax((1, 2, 3)) < 1e-6
    assert 60 < dropped.sum() < 140
    kept = 1 + (scaled - 1) / 0.75
    assert relative_error(ratio[~dropped], kept[~dropped]) < 1e-5


@pytest.mark.parametrize("name", FRESH_IS_IDENTITY)
def test_added_blocks_start_as_identity(name):
    """In spite of the ancestor, which gives all convolutions Kaiming's initialisation."""
    model = MRLAResNet(18, layer_attention=None, plugins=[PLUGINS[name]], **SMALL)
    model.init_weights()
    plugins = plugins_of(model)
    assert plugins
    for plugin in plugins:
        kinds = DoubleAttention | ContextBlock | NonLocal2d
        assert isinstance(plugin, kinds)
        channels = plugin.extend.out_channels if name == "a2" else plugin.in_channels
        x = torch.randn(2, channels, 4, 3)
        assert torch.equal(plugin(x), x)


def test_residual_branches_start_at_zero_with_tdam_too():
    model = MRLAResNet(18, layer_attention=None, plugins=[PLUGINS["tdam"]], **SMALL)
    model.init_weights()
    x = torch.rand(2, 8, 9, 6)
    assert torch.equal(model.layer1(x), x)


def test_real_images(coco_mini):
    """Detection's sizes, with every plugin: finite, and each image by itself as in a batch."""
    paths = sorted((coco_mini / "val2017").glob("*.jpg"))[:2]
    images = [cv2.resize(cv2.imread(str(p)), (107, 85)) for p in paths]
    batch = torch.stack([torch.from_numpy(i).permute(2, 0, 1).float() / 255 for i in images])
    for name in PLUGINS:
        model = network(name, 18, layer_attention=LIGHT).eval()
        with torch.no_grad():
            outs, alone = model(batch), model(batch[1:])
        for out, one in zip(outs, alone, strict=True):
            assert torch.isfinite(out).all(), name
            assert relative_error(out[1:], one) < 1e-4, name


# --- published sizes -------------------------------------------------------------------------

# Million parameters of ResNet-50 with 1000 classes, of the sources in docs/within_layer.md.
PUBLISHED = {
    "se": 28.1, "eca": 25.6, "cbam": 28.1, "a2": 33.0, "aa": 25.8, "ba": 28.7, "nl": 27.66,
    "gc": 28.08, "gc1": 25.69,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published(name):
    cfg = Config.fromfile(ROOT / "configs" / "imagenet" / f"resnet50_{name}_in1k.py")
    kwargs = dict(cfg.model.backbone)
    assert kwargs.pop("type") == "mmrla.MRLAResNet"
    total = count(MRLAResNet, **kwargs) + (2048 + 1) * 1000
    assert total / 1e6 == pytest.approx(PUBLISHED[name], rel=0.004)


# --- checkpoints -----------------------------------------------------------------------------


def started(name: str, state: dict, path, kind: str = "mmrla.WarmStart", **kwargs) -> nn.Module:
    """Initialised from a checkpoint."""
    init_cfg = starting_from(state, path, kind)
    kwargs = dict(layer_attention=None, plugins=[PLUGINS[name]], init_cfg=init_cfg) | kwargs
    model = MRLAResNet(18, **kwargs, **SMALL)
    model.zero_init_residual = "Pretrained" not in kind  # the ancestor's rule, not plugins'
    model.init_weights()
    return model


@pytest.mark.parametrize("name", PLUGINS)
def test_plain_checkpoint_warm_starts_it(name, tmp_path, monkeypatch):
    logged: list[str] = []
    monkeypatch.setattr("mmrla.models.warm_start.print_log", lambda text, **_: logged.append(text))
    plain = network("", 18)
    state = plain.state_dict()
    model = started(name, state, tmp_path, frozen_stages=1, norm_eval=True)
    assert len(logged) == 1
    assert logged[0].endswith("tensors of plugins are newly initialised")
    own = model.state_dict()
    kept = state.keys() & own.keys()
    assert len(kept) == len(state) - (8 if name == "aa" else 0)
    assert all(torch.equal(own[key], state[key]) for key in kept)
    # Fresh parts of frozen stages learn.
    model.train()
    for plugin in plugins_of(model.layer1):
        assert plugin.training
        assert all(p.requires_grad for p in plugin.parameters())
    assert not model.layer1[0].conv1.weight.requires_grad
    if name in FRESH_IS_IDENTITY:
        x = torch.randn(2, 3, 64, 48)
        with torch.no_grad():
            assert all(map(torch.equal, model.eval()(x), plain.eval()(x)))


@pytest.mark.parametrize("name", PLUGINS)
def test_its_own_checkpoint_fills_all_of_it_and_freezes(name, tmp_path):
    saved = network(name, 18, layer_attention=LIGHT).state_dict()
    state = dict(state_dict={f"backbone.{k}": v for k, v in saved.items()})
    assert convert_state_dict(state["state_dict"]).keys() == state["state_dict"].keys()
    model = started(name, state, tmp_path, layer_attention=LIGHT, frozen_stages=1)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in saved.items())
    assert not any(p.requires_grad for p in model.layer1.parameters())


@pytest.mark.parametrize("several", [False, True], ids=["alone", "in a list"])
def test_pretrained_fills_what_starts_at_zero(several, tmp_path):
    saved = network("a2", 18).state_dict()
    more = {}
    if several:
        first = dict(type="Constant", layer="Linear", val=0.0)
        pretrained = dict(type="Pretrained", checkpoint=str(tmp_path / "weights.pth"))
        more = dict(init_cfg=[first, pretrained])
    model = started("a2", saved, tmp_path, "Pretrained", **more)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in saved.items())


def test_loads_that_would_leave_a_part_of_the_plugins_random_are_refused():
    model = network("cbam")
    state = model.state_dict()
    load_into(model, {k: v for k, v in state.items() if ".cbam." not in k})
    with pytest.raises(CheckpointError, match=r"cbam\.mlp\.0\.weight"):
        load_into(model, {k: v for k, v in state.items() if not k.endswith("mlp.0.weight")})
    with pytest.raises(CheckpointError, match="layer1.0.conv1.weight"):
        load_into(model, {k: v for k, v in state.items() if k != "layer1.0.conv1.weight"})


def test_other_hosts_have_no_plugins():
    with pytest.raises(TypeError, match="plugins"):
        MRLAEfficientNet("b0", plugins=[PLUGINS["eca"]])


# --- bad arguments ---------------------------------------------------------------------------


def resnet(*plugins, depth=50, **kwargs):
    return MRLAResNet(depth, layer_attention=None, plugins=list(plugins), **SMALL, **kwargs)


def plugin(kind: str = "mmrla.ECA", *, more: dict | None = None, **cfg) -> dict:
    return dict(cfg=dict(type=kind, **cfg), **(more or {}))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MRLAResNet(50, plugins=plugin()), TypeError, "plugins must be a list"),
        (lambda: resnet("eca"), TypeError, "plugins must be a list.*'eca'"),
        (lambda: resnet(dict(cfg="eca")), TypeError, "cfg must be a dict with a type.*'eca'"),
        (lambda: resnet(plugin("ECB")), ValueError, "unknown plugin 'ECB'; allowed: Att.*, ECA"),
        (lambda: resnet(plugin(more=dict(place=1))), ValueError, "unknown key 'place'"),
        (lambda: resnet(plugin(more=dict(stages=(1, 1)))), ValueError, "each of 4 stages"),
        (lambda: resnet(plugin(more=dict(blocks=(3,)))), ValueError, "blocks must be from -3 to 2"),
        (lambda: resnet(plugin(more=dict(blocks=("a",)))), ValueError, "blocks must be indices"),
        (lambda: resnet(plugin(more=dict(position="conv2"))), ValueError, "ECA must be.*'conv2'"),
        (
            lambda: resnet(plugin(more=dict(position="after_conv3")), depth=18),
            ValueError, "block of 2 convolutions, got 'after_conv3'",
        ),
        (
            lambda: resnet(plugin("mmrla.TDAM", more=dict(position="after_conv1"))),
            ValueError, r"position of TDAM must be one of \['after_conv3'\]",
        ),
        (
            lambda: resnet(dict(cfg=AA, position="after_conv2")),
            ValueError, r"AttentionAugmentedConv must be one of \['conv1', 'conv2', 'conv3'\]",
        ),
        (lambda: resnet(plugin(), plugin()), ValueError, "two are called 'eca'"),
        (lambda: resnet(plugin(size=3)), TypeError, "plugin ECA: .*'size'"),
        (lambda: resnet(plugin(kernel_size=4)), ValueError, "kernel_size must be odd, got 4"),
        (lambda: resnet(plugin(drop_path_rate=1)), ValueError, r"drop_path_rate.*\[0, 1\), got 1"),
        (lambda: resnet(plugin("mmrla.SE", ratio=0)), ValueError, "SE: ratio.*got 0"),
        (lambda: resnet(plugin("mmrla.CBAM", reduction=1.5)), ValueError, "reduction.*got 1.5"),
        (lambda: resnet(plugin("mmrla.CBAM", kernel_size=2)), ValueError, "must be odd, got 2"),
        (lambda: resnet(plugin("mmrla.DoubleAttention", reduction=0)), ValueError, "got 0"),
        (lambda: resnet(plugin("mmrla.BridgeAttention", reduction=-1)), ValueError, "got -1"),
        (lambda: resnet(plugin("mmrla.TDAM", steps=1)), ValueError, "steps must be 2 or more"),
        (lambda: resnet(plugin("mmrla.TDAM", convs=4)), ValueError, "convs must be from 1 to 3"),
        (lambda: resnet(plugin("mmrla.TDAM", searchlight="both")), ValueError, "'both'"),
        (
            lambda: resnet(plugin("mmrla.AttentionAugmentedConv", num_heads=8)),
            ValueError, "8 channels leave none to the convolution",
        ),
        (
            lambda: resnet(plugin("mmrla.AttentionAugmentedConv", key_ratio=0)),
            ValueError, "key_ratio must be positive, got 0",
        ),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
