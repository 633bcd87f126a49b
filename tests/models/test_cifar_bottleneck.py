"""CIFAR ResNets of bottlenecks: the network, its start, its size, and the configs that train it."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmrla.analysis import complexity
from mmrla.layers import LayerAttention
from mmrla.models import MRLAResNetCIFAR
from tests.conftest import ROOT, relative_error
from tests.test_configs import (
    BOTTLENECK,
    INTERACTIONS,
    WITH_RELU,
    WITHIN,
    load_once,
    merged,
    plugins_of,
)

BLOCKS = {20: 2, 56: 6, 110: 12}


class Plain(nn.Module):
    """The network in plain torch: norms behind convolutions, in the order they are called."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        self._add(3, 16, 3)
        self.blocks, width = [], 16
        for stage, out in enumerate((64, 128, 256)):
            for i in range((depth - 2) // 9):
                stride = 2 if stage and not i else 1
                for a, b, kernel, s in (
                    (width, out // 4, 1, 1),
                    (out // 4, out // 4, 3, stride),
                    (out // 4, out, 1, 1),
                    *([(width, out, 1, stride)] if width != out else []),
                ):
                    self._add(a, b, kernel, s)
                self.blocks.append(width != out)
                width = out

    def _add(self, a: int, b: int, kernel: int, stride: int = 1) -> None:
        self.convs.append(nn.Conv2d(a, b, kernel, stride, padding=kernel // 2, bias=False))
        self.norms.append(nn.BatchNorm2d(b))

    def forward(self, x):
        layers = (lambda y, c=c, n=n: n(c(y)) for c, n in zip(self.convs, self.norms, strict=True))
        x = F.relu(next(layers)(x))
        for projects in self.blocks:
            y = F.relu(next(layers)(x))
            y = F.relu(next(layers)(y))
            y = next(layers)(y)
            x = F.relu(y + (next(layers)(x) if projects else x))
        return x


def ordered(model: MRLAResNetCIFAR) -> dict[str, nn.Module]:
    """Convolutions and norms of ours in the order of :class:`Plain`."""
    found = {"conv1": model.conv1, "bn1": model.bn1}
    for name in ("layer1", "layer2", "layer3"):
        for block in getattr(model, name):
            parts = [block.conv1, block.bn1, block.conv2, block.bn2, block.conv3, block.bn3]
            found |= {f"{name}.{len(found)}.{i}": p for i, p in enumerate(parts)}
            if block.downsample is not None:
                found |= {f"{name}.{len(found)}.{i}": p for i, p in enumerate(block.downsample)}
    return found


def test_is_the_network_written_out():
    """Depth 20 with the same weights: outputs, gradients, running statistics; nothing is left."""
    torch.manual_seed(0)
    theirs = Plain(20).double()
    ours = MRLAResNetCIFAR(20, block="bottleneck", layer_attention=None).double()
    parts = list(ordered(ours).values())
    pairs = list(zip(parts[::2], theirs.convs, strict=True))
    pairs += zip(parts[1::2], theirs.norms, strict=True)
    for mine, their in pairs:
        if isinstance(their, nn.BatchNorm2d):
            nn.init.uniform_(their.weight, 0.5, 1.5)
            nn.init.normal_(their.bias)
        mine.load_state_dict(their.state_dict())
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters())
    x = torch.randn(3, 3, 20, 16, dtype=torch.double)
    for mode in (True, False):
        ours.train(mode), theirs.train(mode)
        (got,), expected = ours(x), theirs(x)
        assert got.shape == (3, 256, 5, 4)
        assert relative_error(got, expected) < 1e-12
        weight = torch.randn_like(got)
        for model, out in ((ours, got), (theirs, expected)):
            model.zero_grad()
            (out * weight).sum().backward()
        for mine, their in pairs:
            for p, q in zip(mine.parameters(), their.parameters(), strict=True):
                assert relative_error(p.grad, q.grad) < 1e-10
    for mine, their in pairs:
        for p, q in zip(mine.buffers(), their.buffers(), strict=True):
            assert torch.allclose(p, q, rtol=1e-12)


@pytest.mark.parametrize("depth", BLOCKS)
def test_size_by_hand(depth):
    """Parameters and multiply-adds from the widths alone; a norm is two per element."""
    params = macs = 0

    def conv(a, b, kernel, pixels):
        nonlocal params, macs
        params += a * b * kernel**2 + 2 * b
        macs += (a * b * kernel**2 + 2 * b) * pixels

    conv(3, 16, 3, 32 * 32)
    width = 16
    for out, size in ((64, 32), (128, 16), (256, 8)):
        for _ in range(BLOCKS[depth]):
            # The first 1x1 comes before the stride, which is the 3x3's.
            conv(width, out // 4, 1, (2 * size if out > width > 16 else size) ** 2)
            conv(out // 4, out // 4, 3, size**2)
            conv(out // 4, out, 1, size**2)
            if out != width:
                conv(width, out, 1, size**2)
            width = out
    model = MRLAResNetCIFAR(depth, block="bottleneck", layer_attention=None)
    got = complexity(model, torch.rand(1, 3, 32, 32))
    assert (got.params, got.macs) == (params, macs)
    convs = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert convs - 3 + 1 == depth  # without the shortcuts', with the classifier


def test_start_of_the_protocol():
    """Convolutions normal with std sqrt(2 / (k k C_out)); every gamma is 1."""
    cfg = merged(ROOT / "configs/cifar/resnet20-bottleneck_plain_cifar10.py")
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        model = MODELS.build(cfg["model"]["backbone"])
    model.init_weights()
    drawn = []
    for module in ordered(model).values():
        weight = module.weight
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight))
            continue
        std = (2 / (weight.shape[0] * weight[0, 0].numel())) ** 0.5
        drawn.append((weight / std).flatten())
        assert 0.85 < drawn[-1].std() < 1.15
    drawn = torch.cat(drawn)
    assert abs(drawn.std() - 1) < 0.005
    assert abs(drawn.pow(4).mean() - 3) < 0.05  # normal


def test_heads_and_layer_attentions():
    model = MRLAResNetCIFAR(20, block="bottleneck", mrla_drop_path_rate=0.2)
    layers = [m for m in model.modules() if isinstance(m, LayerAttention)]
    assert [m.channels for m in layers] == [64, 64, 128, 128, 256, 256]
    assert {m.head_channels for m in layers} == {32}
    model.train()(torch.randn(2, 3, 32, 32))[0].square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(depth=20, block="Bottleneck"), r"\['basic', 'bottleneck'\], got 'Bottleneck'"),
        (dict(depth=20, block=None), "block must be one of .*, got None"),
        (dict(depth=29, block="bottleneck"), r"\[20, 56, 110\], got 29"),
        (dict(depth=50), r"\[20, 56, 110\], got 50"),
        (dict(depth=20, expansion=4), "expansion=4 needs block='bottleneck', got block='basic'"),
    ],
)
def test_combinations_that_do_not_exist_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MRLAResNetCIFAR(**kwargs)


def attention_of(kind: str) -> tuple[dict | None, float | None]:
    """What a config of this name trains: the layer attention, and its drop path."""
    kind = kind.removesuffix("_se").removesuffix("_eca")
    if kind in ("mrla", "mrla-base"):
        return dict(type="MRLABase" if "base" in kind else "MRLALight", head_channels=32), 0.2
    if kind in ("dla", "dla-base"):
        return dict(type=INTERACTIONS[kind][0], head_channels=16, reduction=4), 0.2
    if kind == "kcla":
        return dict(type="KCLA", head_channels=16), 0.2
    if kind == "dia":
        return dict(type="DIAUnit", reduction=4), None
    if kind == "rla-g":
        return dict(type="RecurrentLayerAggregation", hidden_channels=12), None
    return None, 0.2


def test_configs_are_the_protocol():
    """All of them: the recipe of today's base, and the network; each kind of network is built."""
    for name in sorted(BOTTLENECK):
        depth, kind, classes = re.fullmatch(
            r"resnet(\d+)-bottleneck_(.+)_cifar(\d+)", name
        ).groups()
        cfg = merged(ROOT / f"configs/cifar/{name}.py")
        basic = load_once(ROOT / f"configs/cifar/_base_/cifar{classes}.py")
        assert {k: v for k, v in cfg.items() if k in basic and k != "model"} == {
            k: v for k, v in basic.items() if k != "model"
        }
        backbone = dict(cfg["model"]["backbone"])
        plugins = backbone.pop("plugins", None)
        act = dict(mrla_act_cfg=dict(type="ReLU")) if kind in WITH_RELU else {}
        attention, rate = attention_of(kind)
        assert backbone == dict(
            type="mmrla.MRLAResNetCIFAR",
            depth=int(depth),
            block="bottleneck",
            zero_init_residual=False,
            mrla_drop_path_rate=rate,
            zero_init_mrla=False,
            layer_attention=attention,
            **act,
        )
        within = WITHIN.get(kind.removeprefix("mrla_"))
        assert bool(plugins) == bool(within)
        if classes == "100" or depth == "110" or (depth == "56" and (not within and rate)):
            continue  # one that is built has the same parts
        with DefaultScope.overwrite_default_scope("mmpretrain"):
            model = MODELS.build(cfg["model"]["backbone"])
        assert model.feat_dim == cfg["model"]["head"]["in_channels"]
        expected = [within[0]] * within[3] if within else []
        assert [type(m).__name__ for m in plugins_of(model)] == expected
