"""Within-layer attentions against their equations, and as plugins of the ResNet hosts."""

from __future__ import annotations

from math import log2, sqrt

import cv2
import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import ContextBlock, NonLocal2d
from mmpretrain.models import SEResNet
from torch import Tensor, nn

from mmrla.checkpoints import convert_state_dict, load_into
from mmrla.checkpoints.files import CheckpointError
from mmrla.models import (
    CBAM,
    ECA,
    SE,
    AttentionAugmentedConv,
    DoubleAttention,
    MRLAEfficientNet,
    MRLAResNet,
    MRLAResNetCIFAR,
    MRLAResNeXt,
)
from tests.conftest import generated, relative_error

SMALL = dict(stem_channels=8, base_channels=8, out_indices=(0, 1, 2, 3))
LIGHT = dict(type="MRLALight", head_channels=8)
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


def randomise(module: nn.Module) -> nn.Module:
    """Weights under which every part has an effect: zeros at the start would hide it."""
    state = module.state_dict()
    module.load_state_dict({k: generated(k, tuple(v.shape)) for k, v in state.items()})
    return module


def network(name: str, depth: int = 50, cls: type = MRLAResNet, **kwargs) -> nn.Module:
    width = {} if cls is MRLAResNetCIFAR else SMALL
    kwargs = {"layer_attention": None, **width, **kwargs}
    return randomise(cls(depth, plugins=[PLUGINS[name]] if name else None, **kwargs))


# --- each against its equation ---------------------------------------------------------------


def gate(values: Tensor) -> Tensor:
    return (1 / (1 + (-values).exp()))[:, :, None, None]


def mean(x: Tensor) -> Tensor:
    return x.sum((2, 3)) / (x.shape[2] * x.shape[3])


def se(x: Tensor, w: dict) -> Tensor:
    hidden = mean(x) @ w["conv1.conv.weight"].flatten(1).T + w["conv1.conv.bias"]
    hidden = hidden * (hidden > 0)
    return x * gate(hidden @ w["conv2.conv.weight"].flatten(1).T + w["conv2.conv.bias"])


def eca(x: Tensor, w: dict) -> Tensor:
    kernel = w["conv.weight"].flatten()
    half = len(kernel) // 2
    y = mean(x)
    summed = torch.zeros_like(y)
    for c in range(y.shape[1]):
        for j, k in enumerate(range(c - half, c + half + 1)):
            if 0 <= k < y.shape[1]:
                summed[:, c] = summed[:, c] + kernel[j] * y[:, k]
    return x * gate(summed)


def norm(x: Tensor, w: dict, name: str) -> Tensor:
    """Batch norm in training, along all but the channels."""
    dims = [0, *range(2, x.ndim)]
    centred = x - x.mean(dims, keepdim=True)
    shape = [1, -1] + [1] * (x.ndim - 2)
    normed = centred / (centred.square().mean(dims, keepdim=True) + 1e-5).sqrt()
    return normed * w[f"{name}.weight"].view(shape) + w[f"{name}.bias"].view(shape)


def cbam(x: Tensor, w: dict) -> Tensor:
    def mlp(y: Tensor) -> Tensor:
        hidden = y @ w["mlp.0.weight"].T + w["mlp.0.bias"]
        return hidden.clamp(min=0) @ w["mlp.2.weight"].T + w["mlp.2.bias"]

    x = x * gate(mlp(mean(x)) + mlp(x.flatten(2).max(2)[0]))
    both = torch.stack([x.max(1)[0], x.sum(1) / x.shape[1]], dim=1)
    windows = F.pad(both, [3] * 4).unfold(2, 7, 1).unfold(3, 7, 1)
    spatial = torch.einsum("bchwij,cij->bhw", windows, w["spatial.weight"][0])[:, None]
    return x / (1 + (-norm(spatial, w, "spatial_norm")).exp())


def a2(x: Tensor, w: dict) -> Tensor:
    def conv(name: str, y: Tensor) -> Tensor:
        weight, bias = w[f"{name}.weight"].flatten(1), w[f"{name}.bias"]
        return (weight @ y) + bias[:, None]

    flat = x.flatten(2)
    weights = conv("gather", flat).exp()
    weights = weights / weights.sum(2, keepdim=True)
    descriptors = conv("features", flat) @ weights.transpose(1, 2)
    attention = conv("distribute", flat).exp()
    z = descriptors @ (attention / attention.sum(1, keepdim=True))
    return x + conv("extend", z).view_as(x)


MODULES = {
    "se": (lambda: SE(24, ratio=3), se),
    "eca": (lambda: ECA(24), eca),
    "eca-7": (lambda: ECA(24, kernel_size=7), eca),
    "cbam": (lambda: CBAM(24, reduction=5), cbam),
    "a2": (lambda: DoubleAttention(24, reduction=3), a2),
}


def compare_all(module: nn.Module, expected, *inputs: Tensor) -> None:
    """Outputs and every gradient, of inputs too, in double precision."""
    module = randomise(module).double().train()
    w = {k: p.detach().clone().requires_grad_() for k, p in module.named_parameters()}
    mine = [x.double().requires_grad_() for x in inputs]
    theirs = [x.detach().clone().requires_grad_() for x in mine]
    out, wanted = module(*mine), expected(*theirs, w)
    assert relative_error(out, wanted.detach()) < 1e-10
    torch.manual_seed(1)
    grad = torch.randn_like(wanted)
    out.backward(grad)
    wanted.backward(grad)
    for x, y in zip(mine, theirs, strict=True):
        assert relative_error(x.grad, y.grad) < 1e-8
    for key, parameter in module.named_parameters():
        if w[key].grad.abs().max() > 1e-9:  # else zero but for rounding, as of a bias before a norm
            assert relative_error(parameter.grad, w[key].grad) < 1e-7, key
        else:
            assert parameter.grad.abs().max() < 1e-9, key


@pytest.mark.parametrize("name", MODULES)
def test_module_is_its_equation(name):
    make, expected = MODULES[name]
    compare_all(make(), expected, torch.randn(3, 24, 5, 7))


def augmented(stride: int, height: int, width: int, heads: int, channels: int, values: int):
    """Eq. 1 to 6 position by position."""

    def expected(x: Tensor, w: dict) -> Tensor:
        convolved = F.conv2d(x, w["conv.weight"], stride=stride, padding=1)
        if stride > 1:
            ones = torch.ones_like(x)
            window = dict(kernel_size=3, stride=stride, padding=1, divisor_override=1)
            x = F.avg_pool2d(x, **window) / F.avg_pool2d(ones, **window)
        rows, columns = x.shape[2:]
        found = (w["query_key_value.weight"].flatten(1) @ x.flatten(2)).transpose(1, 2)
        keys = heads * channels
        q, k, v = found[..., :keys], found[..., keys : 2 * keys], found[..., 2 * keys :]
        position = [(i // columns, i % columns) for i in range(rows * columns)]

        def distance(difference: int, size: int) -> int:
            return max(-size + 1, min(size - 1, difference)) + size - 1

        outputs = []
        for h in range(heads):
            part = slice(h * channels, (h + 1) * channels)
            logits = []
            for i, (yi, xi) in enumerate(position):
                for j, (yj, xj) in enumerate(position):
                    key = k[:, j, part]
                    key = key + w["relative_height"][distance(yj - yi, height)]
                    key = key + w["relative_width"][distance(xj - xi, width)]
                    logits.append((q[:, i, part] * key).sum(1) / sqrt(channels))
            attention = torch.stack(logits, 1).view(len(x), len(position), -1).softmax(2)
            outputs.append(attention @ v[..., h * values : (h + 1) * values])
        mixed = torch.cat(outputs, 2) @ w["project.weight"].flatten(1).T
        mixed = mixed.transpose(1, 2).reshape(len(x), -1, rows, columns)
        return torch.cat([convolved, mixed], 1)

    return expected


@pytest.mark.parametrize(
    ("stride", "size", "shape"),
    [(1, (4, 5), (4, 5)), (1, (2, 3), (5, 4)), (2, 4, (7, 5))],
    ids=["its size", "larger", "strided"],
)
def test_attention_augmented_convolution_is_its_equation(stride, size, shape):
    conv = AttentionAugmentedConv(
        6, 24, stride=stride, num_heads=3, min_key_channels=2, value_ratio=0.3, size=size
    )
    assert (conv.head_channels, conv.value_channels) == (2, 6)
    expected = augmented(stride, *conv.size, heads=3, channels=2, values=2)
    compare_all(conv, expected, torch.randn(2, 6, *shape))


def test_attention_augmented_convolution_on_a_smaller_map():
    conv = randomise(AttentionAugmentedConv(8, 16, num_heads=2, min_key_channels=2, downsample=2))
    x = torch.randn(2, 8, 9, 7)
    out = conv(x)
    assert out.shape == (2, 16, 9, 7)
    pooled = F.avg_pool2d(x, 3, 2, padding=1, count_include_pad=False)
    smooth = F.interpolate(conv.attend(pooled), (9, 7), mode="bilinear")
    assert torch.equal(out[:, -conv.value_channels :], smooth)


def bottleneck(x: Tensor, w: dict, attend) -> Tensor:
    """Block 1 of a stage: no projection. ``attend(features, y)`` changes the branch's output."""

    def conv(y: Tensor, i: int) -> Tensor:
        return F.conv2d(y, w[f"conv{i}.weight"], padding=1 if i == 2 else 0)

    features = [x]
    for i in (1, 2):
        features.append(norm(conv(features[-1], i), w, f"bn{i}").clamp(min=0))
    y = norm(conv(features[-1], 3), w, "bn3")
    return (attend(features, y, conv) + x).clamp(min=0)


def bridge(w: dict):
    def attend(features, y, conv) -> Tensor:
        name = "bridge_attention"
        summed = 0
        for i, feature in enumerate([features[1], features[2], y]):
            squeezed = mean(feature) @ w[f"{name}.squeeze.{i}.0.weight"].T
            summed = summed + norm(squeezed, w, f"{name}.squeeze.{i}.1")
        return y * gate(summed.clamp(min=0) @ w[f"{name}.excite.weight"].T)

    return attend


def top_down(w: dict, convs: int, joint: bool):
    def attend(features, y, conv) -> Tensor:
        bottom = features[3 - convs]
        for step in range(2):

            def linear(z: Tensor, name: str) -> Tensor:
                return z @ w[f"tdam.searchlight.{name}.weight"].flatten(1).T

            hidden = linear(mean(y), "top").clamp(min=0)
            if joint:
                hidden = torch.cat([hidden, linear(mean(bottom), "bottom").clamp(min=0)], 1)
            light = linear(hidden, "out")
            bottom = gate(light) * bottom
            scores = (light[:, :, None, None] * bottom).sum(1)
            bottom = torch.sigmoid(scores)[:, None] * bottom
            y = bottom
            for n, i in enumerate(range(4 - convs, 4)):
                y = norm(conv(y, i), w, f"tdam.norms.{step}.{n}")
                y = y if i == 3 else y.clamp(min=0)
        return y

    return attend


@pytest.mark.parametrize(
    ("cfg", "attend"),
    [
        (dict(type="mmrla.BridgeAttention", reduction=4), bridge),
        (dict(type="mmrla.TDAM", steps=3, reduction=4), lambda w: top_down(w, 1, True)),
        (
            dict(type="mmrla.TDAM", steps=3, convs=3, reduction=4, searchlight="top"),
            lambda w: top_down(w, 3, False),
        ),
    ],
    ids=["ba", "tdam joint", "tdam top"],
)
def test_branch_plugin_is_its_equation(cfg, attend):
    model = MRLAResNet(50, layer_attention=None, plugins=[dict(cfg=cfg)], **SMALL)
    block = model.layer1[1]
    # Blocks change their input in place only through relu, so a leaf may come in.
    compare_all(
        _Alone(block), lambda x, w: bottleneck(x, _inner(w), attend(_inner(w))),
        torch.randn(4, 32, 5, 6),
    )  # fmt: skip


class _Alone(nn.Module):
    """A block without its state."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)[0]


def _inner(w: dict) -> dict:
    return {key.removeprefix("block."): value for key, value in w.items()}


# --- against the mm packages -----------------------------------------------------------------


def same_outputs(mine: nn.Module, theirs: nn.Module) -> None:
    randomise(theirs)
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 65, 49)
    for mode in (True, False):
        mine.train(mode)
        theirs.train(mode)
        outs = [mine(x), theirs(x)]
        assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


@pytest.mark.parametrize("position", ["after_conv1", "after_conv2", "after_conv3"])
def test_plugins_are_mmdets(position):
    """Its names, its places, its arithmetic."""
    # Behind mmrla, which provides mmcv's operations where they are not compiled.
    from mmdet.models.backbones import ResNet as MMDetResNet

    plugins = [
        dict(cfg=dict(type="ContextBlock", ratio=0.5), stages=(0, 1, 1, 1), position=position),
        dict(cfg=dict(type="NonLocal2d", postfix="_a"), stages=(0, 0, 0, 1), position=position),
    ]
    width = dict(stem_channels=8, base_channels=8)
    mine = MRLAResNet(50, layer_attention=None, plugins=plugins, **SMALL)
    same_outputs(mine, MMDetResNet(50, plugins=plugins, norm_eval=False, **width))


def test_squeeze_and_excitation_is_mmpretrains():
    mine = MRLAResNet(50, layer_attention=None, plugins=[dict(cfg=dict(type="mmrla.SE"))], **SMALL)
    same_outputs(mine, SEResNet(50, **SMALL))


# --- in the hosts ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLUGINS)
@pytest.mark.parametrize(
    ("cls", "depth", "layer_attention", "kwargs"),
    [
        (MRLAResNet, 50, None, dict(norm_cfg=dict(type="GN", num_groups=2))),
        (MRLAResNet, 50, dict(type="MRLABase", head_channels=8), {}),
        (MRLAResNet, 18, LIGHT, dict(deep_stem=True, avg_down=True)),
        (MRLAResNeXt, 50, None, dict(groups=2, base_channels=8, width_per_group=8)),
        (MRLAResNetCIFAR, 20, LIGHT, {}),
    ],
    ids=["resnet", "resnet with base", "basic with light", "resnext", "cifar with light"],
)
def test_every_parameter_gets_a_gradient(cls, depth, kwargs, name, layer_attention):
    model = network(name, depth, cls, layer_attention=layer_attention, **kwargs).train()
    size = (21, 17) if cls is MRLAResNetCIFAR else (65, 49)
    outs = model(torch.randn(3, 3, *size))
    sum(out.square().mean() for out in outs).backward()
    plugins = [m for block in model.modules() for m in _plugins(block)]
    per_block = "blocks" not in PLUGINS[name]
    assert len(plugins) == (sum(model.stage_blocks) if per_block else len(model.stage_blocks))
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


def _plugins(block: nn.Module) -> list[nn.Module]:
    return [getattr(block, name) for name in getattr(block, "plugin_names", ())]


@pytest.mark.parametrize("name", PLUGINS)
def test_recomputation_gives_the_same(name):
    x = torch.randn(2, 3, 64, 48)
    results = []
    for with_cp in (False, True):
        model = network(name, with_cp=with_cp, layer_attention=LIGHT).train()
        outs = model(x)
        sum(out.square().mean() for out in outs).backward()
        results.append((outs, {k: p.grad for k, p in model.named_parameters()}))
    (plain, grads), (again, grads_again) = results
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    for key, grad in grads.items():
        assert relative_error(grads_again[key], grad) < 1e-5, key


@pytest.mark.parametrize("name", PLUGINS)
def test_it_is_not_without_effect_and_half_precision_is_near(name):
    model, plain = network(name).eval(), network("").eval()
    x = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        exact, without = model(x)[-1], plain(x)[-1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(x)[-1].float()
    assert relative_error(exact, without) > 1e-2
    assert torch.isfinite(half).all()
    assert relative_error(half, exact) < 0.3


@pytest.mark.parametrize("name", PLUGINS)
def test_frozen_stages_and_frozen_norms(name):
    model = network(name, frozen_stages=1, norm_eval=True)
    model.train()
    for plugin in (p for block in model.layer1 for p in _plugins(block)):
        assert not plugin.training
        assert not any(p.requires_grad for p in plugin.parameters())
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert not any(m.training for m in norms)
    assert all(p.requires_grad for b in model.layer2 for m in _plugins(b) for p in m.parameters())


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
    module = randomise(ECA(16, drop_path_rate=0.25))
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
    plugins = [m for block in model.modules() for m in _plugins(block)]
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
    from mmengine.config import Config

    from tests.conftest import ROOT

    cfg = Config.fromfile(ROOT / "configs" / "imagenet" / f"resnet50_{name}_in1k.py")
    kwargs = dict(cfg.model.backbone)
    assert kwargs.pop("type") == "mmrla.MRLAResNet"
    model = MRLAResNet(**kwargs)
    head = 2048 * 1000 + 1000
    count = sum(p.numel() for p in model.parameters()) + head
    assert abs(count / 1e6 - PUBLISHED[name]) < 0.004 * PUBLISHED[name]


# --- checkpoints -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLUGINS)
def test_plain_checkpoint_warm_starts_it(name, tmp_path, monkeypatch):
    logged: list[str] = []
    monkeypatch.setattr("mmrla.models.warm_start.print_log", lambda text, **_: logged.append(text))
    plain = network("")
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    init_cfg = dict(type="mmrla.WarmStart", checkpoint=str(tmp_path / "plain.pth"))
    model = MRLAResNet(
        50, layer_attention=None, plugins=[PLUGINS[name]], init_cfg=init_cfg, frozen_stages=1,
        norm_eval=True, **SMALL,
    )  # fmt: skip
    model.init_weights()
    assert len(logged) == 1
    assert logged[0].endswith("tensors of plugins are newly initialised")
    state, own = plain.state_dict(), model.state_dict()
    kept = state.keys() & own.keys()
    assert len(kept) == len(state) - (16 if name == "aa" else 0)
    assert all(torch.equal(own[key], state[key]) for key in kept)
    # Fresh parts of frozen stages learn.
    model.train()
    for plugin in (p for block in model.layer1 for p in _plugins(block)):
        assert plugin.training
        assert all(p.requires_grad for p in plugin.parameters())
    assert not model.layer1[0].conv1.weight.requires_grad
    if name in FRESH_IS_IDENTITY:
        x = torch.randn(2, 3, 64, 48)
        with torch.no_grad():
            pairs = zip(model.eval()(x), plain.eval()(x), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", PLUGINS)
def test_its_own_checkpoint_fills_all_of_it_and_freezes(name, tmp_path):
    saved = network(name, layer_attention=LIGHT)
    torch.save(dict(state_dict={f"backbone.{k}": v for k, v in saved.state_dict().items()}),
               tmp_path / "own.pth")  # fmt: skip
    init_cfg = dict(type="mmrla.WarmStart", checkpoint=str(tmp_path / "own.pth"))
    model = MRLAResNet(
        50, layer_attention=LIGHT, plugins=[PLUGINS[name]], init_cfg=init_cfg, frozen_stages=1,
        **SMALL,
    )  # fmt: skip
    model.init_weights()
    own = model.state_dict()
    assert all(torch.equal(own[k], v) for k, v in saved.state_dict().items())
    assert not any(p.requires_grad for p in model.layer1.parameters())


def test_loads_that_would_leave_a_part_of_the_plugins_random_are_refused():
    model = network("cbam")
    state = model.state_dict()
    load_into(model, {k: v for k, v in state.items() if ".cbam." not in k})
    with pytest.raises(CheckpointError, match=r"cbam\.mlp\.0\.weight"):
        load_into(model, {k: v for k, v in state.items() if not k.endswith("mlp.0.weight")})
    with pytest.raises(CheckpointError, match="layer1.0.conv1.weight"):
        load_into(model, {k: v for k, v in state.items() if k != "layer1.0.conv1.weight"})


@pytest.mark.parametrize("several", [False, True], ids=["alone", "in a list"])
def test_pretrained_fills_what_starts_at_zero(several, tmp_path):
    saved = network("a2")
    torch.save(saved.state_dict(), tmp_path / "own.pth")
    init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "own.pth"))
    first = dict(type="Constant", layer="Linear", val=0.0)
    model = MRLAResNet(
        50, layer_attention=None, plugins=[PLUGINS["a2"]],
        init_cfg=[first, init_cfg] if several else init_cfg, **SMALL,
    )  # fmt: skip
    # The ancestor's own rule for lists of several, which is not plugins'.
    model.zero_init_residual = False
    model.init_weights()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in saved.state_dict().items())


def test_other_hosts_have_no_plugins():
    with pytest.raises(TypeError, match="plugins"):
        MRLAEfficientNet("b0", plugins=[PLUGINS["eca"]])


def test_the_converter_keeps_plugins():
    state = {
        f"backbone.{k}": v for k, v in network("eca", layer_attention=LIGHT).state_dict().items()
    }
    assert convert_state_dict(state).keys() == state.keys()


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
