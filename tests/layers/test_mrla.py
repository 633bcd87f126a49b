from __future__ import annotations

import pytest
import torch

from mmrla.layers import MRLABase, MRLALight
from mmrla.ops import mrla_light


def test_initialisation():
    """Value: Kaiming normal, fan_out; lambda: N(0, 1); Conv1D: torch's default."""
    layer = MRLALight(1024, head_channels=32)
    fan_out = 1024 * 9
    assert layer.value.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    assert layer.lambda_t.std().item() == pytest.approx(1, rel=0.1)
    assert abs(layer.lambda_t.mean().item()) < 0.1
    for conv in (layer.query, layer.key):
        assert conv.weight.shape == (1, 1, 5)
        assert conv.bias is None
        assert conv.weight.abs().max() <= 5**-0.5


def test_light_takes_the_shortcut_and_passes_no_state():
    layer = MRLALight(16, head_channels=8)
    x, shortcut = torch.randn(2, 2, 16, 5, 4)
    o, state = layer(x, shortcut, None)
    weights = (layer.query.weight, layer.key.weight, layer.value.weight)
    assert torch.equal(o, mrla_light(x, shortcut, *weights, layer.lambda_t, 8))
    assert state is None


def test_base_attends_to_every_layer_of_the_group():
    layers = [MRLABase(16, head_channels=4) for _ in range(3)]
    xs = torch.randn(3, 2, 16, 4, 4)
    state = None
    outputs = []
    for layer, x in zip(layers, xs, strict=True):
        o, state = layer(x, x, state)
        outputs.append(o)
    keys, values = state.keys, state.values
    assert [k.shape for k in keys] == [(2, 16)] * 3
    assert torch.equal(values[1], layers[1].value(xs[1]))
    # A single layer attends to itself with weight 1.
    assert torch.equal(outputs[0], values[0])
    # A convex combination per sample and channel stays between the least and the largest value.
    stacked = torch.stack(values)
    assert (outputs[2] <= stacked.amax(0) + 1e-6).all()
    assert (outputs[2] >= stacked.amin(0) - 1e-6).all()


@pytest.mark.parametrize("cls", [MRLALight, MRLABase])
def test_bad_arguments(cls):
    with pytest.raises(ValueError, match="head_channels=48 with channels=64; allowed: 1, 2, 4, 8"):
        cls(64, head_channels=48)
    with pytest.raises(TypeError, match="head_channels must be an int, got 8.0"):
        cls(64, head_channels=8.0)
    with pytest.raises(ValueError, match="kernel_size=4"):
        cls(64, kernel_size=4)
    if cls is MRLALight:
        with pytest.raises(ValueError, match=r"one of \('shortcut', 'output', None\), got 'input'"):
            cls(64, recurrence="input")
