"""What the wrapper refuses, and built modules that it takes."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torchvision
from torch import nn

from mmrla.models import LayerAttentionWrapper
from tests.conftest import relative_error
from tests.models.test_wrapper import BACKBONES, REGNET, parts, wrapped
from tests.models.zoo import BASE, LIGHT


class Peeking(nn.Module):
    """Looks at what is between the layers of a group."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2))
        self.stages = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 8, 1)), layers])

    def forward(self, x):
        outs = [self.stages[0](x)]
        for layer in self.stages[1]:
            outs.append(layer(outs[-1]))
        return outs[1:]


class Twice(Peeking):
    def forward(self, x):
        x = self.stages[0](x)
        for layer in self.stages[1]:
            x = layer(layer(x))
        return (x,)


class Between(Peeking):
    def forward(self, x):
        x = self.stages[0](x)
        for layer in self.stages[1]:
            x = layer(x * 2)
        return (x,)


SMALL_SWIN = dict(BACKBONES["swin-mmpretrain"], pad_small_map=False)
DEIT = dict(type="mmpretrain.VisionTransformer", arch="deit-tiny")


@pytest.mark.parametrize(
    ("backbone", "kwargs", "error", "message"),
    [
        (None, {}, TypeError, "backbone must be a config"),
        (dict(depth=1), {}, TypeError, "backbone must be a config"),
        (REGNET, dict(layers="stage*.*"), ValueError, "no module of RegNet is named 'stage"),
        (REGNET, dict(layers=3), TypeError, "layers must be"),
        (REGNET, dict(layers=[3]), TypeError, "layers must be"),
        (REGNET, dict(layers=[]), ValueError, "cannot find the layers of RegNet"),
        (REGNET, dict(layers="layer1.0.conv2"), ValueError, "layer1.0.conv2 .* not residual"),
        (REGNET, dict(layers=["layer1.0", "layer2"]), ValueError, "layer2 .* not residual"),
        (REGNET, dict(layer_attention=dict(type="No")), ValueError, "unknown layer att"),
        (
            REGNET,
            dict(layer_attention=dict(LIGHT, head_channels=7)),
            ValueError,
            "head_channels=7 with",
        ),
        (REGNET, dict(mrla_drop_path_rate=1.0), ValueError, "mrla_drop_path_rate"),
        (SMALL_SWIN, dict(probe_size=8), ValueError, "probe_size"),
        (dict(type="mmdet.CSPDarknet"), {}, ValueError, "cannot find .* CSPDarknet.*stem"),
        (dict(type=Peeking), {}, ValueError, "only stages.1|reads features"),
        (dict(type=Peeking), dict(layers="stages.1.*"), ValueError, "reads features"),
        (dict(type=Twice), dict(layers="stages.1.*"), ValueError, "runs 2 times"),
        (dict(type=Between), dict(layers="stages.1.*"), ValueError, "does not take the out"),
        (DEIT, dict(layers="layers.*"), ValueError, "without the grid"),
    ],
)
def test_bad_arguments(backbone, kwargs, error, message):
    kwargs = dict(probe_size=224, layer_attention=LIGHT) | kwargs
    with pytest.raises(error, match=message):
        LayerAttentionWrapper(backbone=backbone, **kwargs)


def test_named_layers_and_their_norms():
    model = wrapped(
        REGNET, layers=["layer3.1", "layer3.[2-9]"], norm_cfg=dict(type="GN", num_groups=4)
    )
    names = set(parts(model))
    assert "layer3.1.mrla" in names
    assert all(name.startswith("layer3.") and name != "layer3.0.mrla" for name in names)
    assert all(isinstance(part.norm, nn.GroupNorm) for part in parts(model).values())
    convnext = wrapped(BACKBONES["convnext"], layer_attention=LIGHT, mrla_drop_path_rate=None)
    assert {type(part.norm).__name__ for part in parts(convnext).values()} == {"LayerNorm2d"}
    # The layer's own stochastic depth.
    rates = [getattr(p.drop_path, "drop_prob", 0.0) for p in parts(convnext).values()]
    assert rates[0] == 0.0
    assert rates[-1] == pytest.approx(0.3)


class Dict(torchvision.models.ResNet):
    """Gives a dict, as detection backbones of torchvision do."""

    def forward(self, x):
        x = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return {"0": x, "1": [self.layer2(x)]}


def test_takes_a_module():
    """Of torchvision: in place, its weights and keys kept, the equations by hand."""
    plain = torchvision.models.resnet18(num_classes=5).eval()
    module = copy.deepcopy(plain)
    model = LayerAttentionWrapper(module, BASE, probe_size=64)
    assert model is module
    assert isinstance(model, torchvision.models.ResNet)
    own = model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in plain.state_dict().items())
    assert {key.split(".mrla.")[0] for key in own if "mrla" in key} == {
        f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)
    }
    model.init_weights()  # as a detector calls it
    assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())
    image = torch.randn(2, 3, 64, 64)
    x = plain.maxpool(plain.relu(plain.bn1(plain.conv1(image))))
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        state = None
        for block, owner in zip(getattr(plain, stage), getattr(model, stage), strict=True):
            y = block(x)
            o, state = owner.mrla.attention(y, None, state)
            x = y + owner.mrla.norm(o)
    expected = plain.fc(x.mean((2, 3)))
    assert relative_error(model(image), expected) < 1e-5
    model.train()(image).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    cfg = dict(type=Dict, block=torchvision.models.resnet.BasicBlock, layers=[1, 2, 1, 1])
    named = wrapped(cfg, layer_attention=LIGHT, layers="layer[12].*")
    reached = {n.split(".")[0] for n, p in named.named_parameters() if p.requires_grad}
    assert reached == {"conv1", "bn1", "layer1", "layer2"}
    grey = torchvision.models.resnet18()
    grey.conv1 = nn.Conv2d(1, 64, 7, 2, 3)
    assert LayerAttentionWrapper(grey, LIGHT)(torch.rand(1, 1, 64, 64)).shape == (1, 1000)


@dataclass
class Out:
    x: torch.Tensor


class Opaque(torchvision.models.ResNet):
    """Hides an output from those who search nested lists and dicts."""

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return x.mean(), Out(self.layer4(self.layer3(self.layer2(self.layer1(x)))))


class Auxiliary(torchvision.models.ResNet):
    """Has a head for training alone."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.aux = nn.Linear(1000, 10)

    def forward(self, x):
        y = super().forward(x)
        return (y, self.aux(y)) if self.training else y


def test_freezes_nothing_that_the_trial_cannot_follow():
    """Of a module nothing at all, and its gradients stay."""
    block, layers = torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]
    built = wrapped(dict(type=Opaque, block=block, layers=layers), layer_attention=LIGHT)
    given = Auxiliary(block, layers)
    given.conv1.weight.grad = torch.ones_like(given.conv1.weight)
    for model in (built, wrapped(given, layer_attention=LIGHT)):
        assert all(p.requires_grad for p in model.parameters())
    assert given.conv1.weight.grad.all()


def test_a_refused_module_stays_as_it_was():
    module, peeking = torchvision.models.resnet18(), Peeking()
    image = torch.rand(1, 3, 64, 64)
    expected = peeking(image)
    for given, kwargs, message in (
        (module, dict(layers="stage*"), "no module"),
        (module, dict(layer_attention=dict(type="MLA", head_channels=65)), "head_channels=65"),
        # Seen when the layers are extended.
        (peeking, dict(layers="stages.1.*"), "reads features"),
    ):
        cls, keys, attributes = type(given), list(given.state_dict()), vars(given).keys()
        with pytest.raises(ValueError, match=message):
            LayerAttentionWrapper(given, **kwargs)
        assert type(given) is cls
        assert list(given.state_dict()) == keys
        assert vars(given).keys() == attributes
    assert all(map(torch.equal, peeking(image), expected))
    LayerAttentionWrapper(module, probe_size=64)
    with pytest.raises(ValueError, match="ResNet is wrapped already"):
        LayerAttentionWrapper(module, probe_size=64)
    assert isinstance(module, LayerAttentionWrapper)
    with pytest.raises(TypeError, match="or a module, got 3"):
        LayerAttentionWrapper(3)
