"""DenseFormer against its equation: outputs and every gradient."""

import pytest
import torch

from mmrla.layers import DenseFormer


@pytest.mark.parametrize("shape", [(2, 7, 6), (1, 6, 3, 5)])
def test_denseformer_weighs_all_outputs_so_far(shape):
    channels = 6
    embedded, *outputs = (torch.randn(shape, dtype=torch.double) for _ in range(4))
    layers = [DenseFormer(channels, index).double() for index in range(3)]
    for layer in layers:
        torch.nn.init.normal_(layer.alpha)
    inputs = [x.requires_grad_() for x in (embedded, *outputs, *(la.alpha for la in layers))]
    state, found = None, []
    for layer, x in zip(layers, outputs, strict=True):
        o, state = layer(x, embedded, state)
        found.append(o)
    maps = torch.stack([embedded, *outputs])
    expected = [torch.einsum("i,i...->...", la.alpha, maps[: i + 2]) for i, la in enumerate(layers)]
    probes = [torch.randn_like(o) for o in found]
    ours, reference = ((*o, *torch.autograd.grad(o, inputs, probes)) for o in (found, expected))
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
