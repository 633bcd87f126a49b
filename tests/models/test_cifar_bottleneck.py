"""CIFAR ResNets of bottlenecks: the network, its start and its size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmrla.analysis import complexity
from mmrla.models import MRLAResNetCIFAR
from tests.conftest import relative_error
from tests.models.zoo import attentions

BLOCKS = {20: 2, 56: 6, 110: 12}


class Plain(nn.Module):
    """The network in plain torch: norms behind convolutions, in the order they are called."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        self._add(3, 16, 3)
        self.blocks, width = [], 16
        for stage, out in enumerate((64, 128, 256)):
            for i in range(BLOCKS[depth]):
                stride = 2 if stage and not i else 1
                self._add(width, out // 4, 1)
                self._add(out // 4, out // 4, 3, stride)
                self._add(out // 4, out, 1)
                if width != out:
                    self._add(width, out, 1, stride)
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


def ordered(model: MRLAResNetCIFAR) -> list[nn.Module]:
    """Convolutions and norms of ours in the order of :class:`Plain`."""
    found = [model.conv1, model.bn1]
    for block in (b for name in ("layer1", "layer2", "layer3") for b in getattr(model, name)):
        found += [block.conv1, block.bn1, block.conv2, block.bn2, block.conv3, block.bn3]
        found += block.downsample or ()
    return found


def bottleneck(depth: int, **kwargs) -> MRLAResNetCIFAR:
    return MRLAResNetCIFAR(depth, block="bottleneck", **kwargs)


def test_is_the_network_written_out():
    """Depth 20 with the same weights: outputs, gradients, running statistics; nothing is left."""
    theirs, ours = Plain(20).double(), bottleneck(20, layer_attention=None).double()
    parts = ordered(ours)
    pairs = list(zip(parts[::2], theirs.convs, strict=True))
    pairs += zip(parts[1::2], theirs.norms, strict=True)
    for mine, their in pairs:
        if isinstance(their, nn.BatchNorm2d):
            nn.init.uniform_(their.weight, 0.5, 1.5)
            nn.init.normal_(their.bias)
        mine.load_state_dict(their.state_dict())
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))
    x = torch.randn(3, 3, 20, 16, dtype=torch.double)
    for mode in (True, False):
        (got,), expected = ours.train(mode)(x), theirs.train(mode)(x)
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
    model = bottleneck(depth, layer_attention=None)
    got = complexity(model, torch.rand(1, 3, 32, 32))
    assert (got.params, got.macs) == (params, macs)
    convs = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert convs - 3 + 1 == depth  # without the shortcuts', with the classifier


def test_start_of_the_protocol():
    """Convolutions normal with std sqrt(2 / (k k C_out)); every gamma is 1."""
    model = bottleneck(20, layer_attention=None, zero_init_residual=False)
    model.init_weights()
    drawn = []
    for module in ordered(model):
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
    model = bottleneck(20, mrla_drop_path_rate=0.2)
    layers = attentions(model)
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
