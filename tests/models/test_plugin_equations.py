"""Within-layer attentions against their equations, and those of mmdet and mmpretrain."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
import torch.nn.functional as F
from mmpretrain.models import SEResNet
from torch import Tensor, nn

from mmrla.models import (
    CBAM,
    ECA,
    SE,
    AttentionAugmentedConv,
    DoubleAttention,
    MRLAResNet,
)
from tests.conftest import compare, filled
from tests.models.zoo import SMALL
from tests.reference import batch_norm, sigmoid

# --- each against its equation ---------------------------------------------------------------


def gate(values: Tensor) -> Tensor:
    return sigmoid(values)[:, :, None, None]


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


def cbam(x: Tensor, w: dict) -> Tensor:
    def mlp(y: Tensor) -> Tensor:
        hidden = y @ w["mlp.0.weight"].T + w["mlp.0.bias"]
        return hidden.clamp(min=0) @ w["mlp.2.weight"].T + w["mlp.2.bias"]

    x = x * gate(mlp(mean(x)) + mlp(x.flatten(2).max(2)[0]))
    both = torch.stack([x.max(1)[0], x.sum(1) / x.shape[1]], dim=1)
    windows = F.pad(both, [3] * 4).unfold(2, 7, 1).unfold(3, 7, 1)
    spatial = torch.einsum("bchwij,cij->bhw", windows, w["spatial.weight"][0])[:, None]
    return x * sigmoid(batch_norm(spatial, w, "spatial_norm"))


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


def compare_all(module: nn.Module, expected, x: Tensor) -> None:
    compare(filled(module), expected, x, limits=(1e-10, 1e-8, 1e-7), zero=1e-12)


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
    conv = filled(AttentionAugmentedConv(8, 16, num_heads=2, min_key_channels=2, downsample=2))
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
        features.append(batch_norm(conv(features[-1], i), w, f"bn{i}").clamp(min=0))
    y = batch_norm(conv(features[-1], 3), w, "bn3")
    return (attend(features, y, conv) + x).clamp(min=0)


def bridge(w: dict):
    def attend(features, y, conv) -> Tensor:
        name = "bridge_attention"
        summed = 0
        for i, feature in enumerate([features[1], features[2], y]):
            squeezed = mean(feature) @ w[f"{name}.squeeze.{i}.0.weight"].T
            summed = summed + batch_norm(squeezed, w, f"{name}.squeeze.{i}.1")
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
                y = batch_norm(conv(y, i), w, f"tdam.norms.{step}.{n}")
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
    compare_all(block, lambda x, w: bottleneck(x, w, attend(w)), torch.randn(4, 32, 5, 6))


# --- against the mm packages -----------------------------------------------------------------


def same_outputs(mine: nn.Module, theirs: nn.Module) -> None:
    filled(theirs)
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
