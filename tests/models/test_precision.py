"""Finite outputs and gradients where half precision is short of range."""

from __future__ import annotations

import pytest
import torch

from mmrla.layers import MRLABase, MRLALight
from mmrla.models import MRLADistilledVisionTransformer, MRLAEfficientNet, MRLAResNet
from mmrla.models.backbones.mrla_resnet import MRLABottleneck
from tests.conftest import HALVES
from tests.models.zoo import BASE, LIGHT


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


def assert_finite(*tensors):
    for tensor in tensors:
        assert tensor.isfinite().all()


def images(shape=(2, 3, 48, 48)):
    """Constant, all-zero, one bright pixel, noise, and noise far above and below what is usual."""
    torch.manual_seed(0)
    noise = torch.randn(shape)
    pixel = torch.zeros(shape)
    pixel[:, :, 5, 6] = 1e4
    yield from (torch.zeros(shape), torch.full(shape, 3.0), pixel, noise, 1e4 * noise, 1e-6 * noise)


@pytest.mark.parametrize("scale", [1e4, 1e-6, 0.0])
@pytest.mark.parametrize("cls", [MRLALight, MRLABase])
def test_layers_on_extreme_activations(cls, scale):
    """As a layer meets them: x in half precision, queries of 1e4, logits of 1e8."""
    for dtype in HALVES:
        torch.manual_seed(0)
        layers = [cls(16, head_channels=8) for _ in range(3)]
        # Positive means, so that queries are as large as activations.
        xs = [(scale * torch.rand(2, 16, 9, 7)).to(dtype).requires_grad_() for _ in layers]
        state, outs, shortcut = None, [], torch.zeros_like(xs[0])
        with torch.autocast("cpu", dtype):
            for layer, x in zip(layers, xs, strict=True):
                o, state = layer(x, shortcut, state)
                shortcut = x
                outs.append(o)
        assert_finite(*outs)
        # A gradient of a mean's size: a sum over pixels of 1e4 itself leaves float16.
        grads = [torch.full_like(o, 1.0 / o.numel()) for o in outs]
        torch.autograd.backward(outs, grads)
        assert_finite(*(x.grad for x in xs), *(p.grad for m in layers for p in m.parameters()))
        if scale == 1e-6:  # at 1e4 the gates are saturated: exactly 0 or 1
            assert all(x.grad.abs().sum() > 0 for x in xs)


def not_finite(model, image, dtype):
    """Names of gradients, and "output", that are not finite in a training step."""
    with torch.autocast("cpu", dtype):
        out = model.train()(image)[-1]
    out = out[0] if isinstance(out, (tuple, list)) else out
    out.float().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n for n, t in {**grads, "output": out}.items() if not t.isfinite().all()}


def resnet(attention, **kwargs):
    return MRLAResNet(50, stem_channels=8, base_channels=8, layer_attention=attention, **kwargs)


def frozen_resnet(attention):
    return resnet(attention, norm_eval=True)


def vit(attention):
    arch = dict(embed_dims=32, num_layers=4, num_heads=2, feedforward_channels=64)
    return MRLADistilledVisionTransformer(arch, img_size=48, layer_attention=attention)


def efficientnet(attention):
    return MRLAEfficientNet("b0", layer_attention=attention)


@pytest.mark.parametrize("host", [resnet, frozen_resnet, vit, slow(efficientnet)])
def test_hosts_on_extreme_images(host):
    """Layer attention adds nothing that is not finite.

    The plain networks do leave the range in float16: a batch norm that divides 1e-6 by sqrt(eps)
    has a gradient that does. Norms that are frozen as they were made normalise nothing, and random
    layers then take images of 1e4 out of float16: not tried.
    """
    left_range = []
    for dtype in HALVES:
        for i, image in enumerate(images()):
            if host is frozen_resnet and dtype == torch.float16 and image.abs().max() >= 1e4:
                continue
            found = []
            for attention in (None, LIGHT, BASE):
                torch.manual_seed(0)
                found.append(not_finite(host(attention), image, dtype))
            plain, *with_attention = found
            assert all(names <= plain for names in with_attention), (dtype, i)
            left_range += [(dtype, i)] if plain else []
    assert {dtype for dtype, _ in left_range} <= {torch.float16}
    assert not {i for _, i in left_range} & {0, 1, 3}  # all-zero, constant, noise


class Deep(MRLAResNet):
    """305 layers: 101 bottlenecks (304 is not 3 n + 2)."""

    arch_settings = {305: (MRLABottleneck, (3, 8, 87, 3))}


@pytest.mark.parametrize("backend", [slow("naive"), "fused"])
@pytest.mark.parametrize("attention", [LIGHT, BASE], ids=["light", "base"])
def test_305_layers(attention, backend, monkeypatch):
    monkeypatch.setenv("MMRLA_BACKEND", backend)
    for dtype in (None, *HALVES):
        torch.manual_seed(0)
        model = Deep(305, stem_channels=8, base_channels=8, layer_attention=attention).train()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            out = model(torch.randn(2, 3, 64, 64))[-1]
        assert_finite(out)
        out.float().square().mean().backward()
        grads = [p.grad for p in model.parameters()]
        assert_finite(*grads)
        assert model.conv1.weight.grad.abs().sum() > 0
