"""What a layer attention says it attends to is what its forward computes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmrla.layers import LayerAttention, MRLABase, MRLALight
from tests.conftest import relative_error

BATCH, CHANNELS, HEADS = 3, 24, 4
D_K = CHANNELS // HEADS


def layers_and_maps(cls, count=4, **kwargs):
    layers = [cls(CHANNELS, head_channels=D_K, kernel_size=5, **kwargs) for _ in range(count)]
    maps = [3 * torch.randn(BATCH, CHANNELS, 5, 7) for _ in layers]
    return layers, maps


def query_and_key(layer, x):
    """Conv1D over the channels' means, by hand: ``[B, heads, d_k]`` of numpy."""
    y = x.detach().numpy().mean((2, 3))
    found = []
    for conv in (layer.query, layer.key):
        w = conv.weight.detach().numpy().ravel()
        rows = [np.correlate(np.pad(row, len(w) // 2), w, "valid") for row in y]
        found.append(np.stack(rows).reshape(len(y), HEADS, D_K))
    return found


def run(layers, maps, shortcuts=None):
    """Outputs and retrievals of a group, memory and state passed along."""
    outputs, retrievals, state, memory = [], [], None, None
    for i, (layer, x) in enumerate(zip(layers, maps, strict=True)):
        shortcut = x if shortcuts is None else shortcuts[i]
        found = layer.retrieval(x, shortcut, state, memory)
        o, state = layer(x, shortcut, state)
        memory = found.memory
        outputs.append(o)
        retrievals.append(found)
    return outputs, retrievals


def test_base_is_the_softmax_over_layers():
    layers, maps = layers_and_maps(MRLABase)
    outputs, retrievals = run(layers, maps)
    keys, values = [], []
    for layer, x, o, found in zip(layers, maps, outputs, retrievals, strict=True):
        query, key = query_and_key(layer, x)
        keys.append(key)
        values.append(layer.value(x))
        logits = np.stack([(query * k).sum(-1) for k in keys], -1) / math.sqrt(D_K)
        expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        assert relative_error(found.query, torch.from_numpy(query)) < 1e-5
        assert relative_error(found.scores, torch.from_numpy(expected).float()) < 1e-5
        # and so much of each value is in o
        weights = found.scores.repeat_interleave(D_K, 1)[..., None, None]
        total = (weights * torch.stack(values, 2)).sum(2)
        assert relative_error(o, total) < 1e-5


def test_light_is_the_unrolled_recurrence():
    layers, maps = layers_and_maps(MRLALight, recurrence="output", value_act="gelu")
    outputs, retrievals = run(layers, maps)
    values = [torch.nn.functional.gelu(layer.value(x)) for layer, x in zip(layers, maps)]  # noqa: B905
    for t, (o, found) in enumerate(zip(outputs, retrievals, strict=True)):
        assert found.scores.shape == (BATCH, HEADS, t + 1)
        total = (found.memory[..., None, None] * torch.stack(values[: t + 1], 2)).sum(2)
        assert relative_error(o, total) < 1e-5
        for s in range(t + 1):
            query, key = query_and_key(layers[s], maps[s])
            gate = 1 / (1 + np.exp(-(query * key).sum(-1) / math.sqrt(D_K)))
            beta = np.ones(CHANNELS)
            for layer in layers[s + 1 : t + 1]:
                beta = beta * layer.lambda_t.detach().numpy()
            expected = gate * np.abs(beta).reshape(HEADS, D_K).mean(-1)
            assert relative_error(found.scores[..., s], torch.from_numpy(expected).float()) < 1e-5


def test_light_as_released_has_the_same_weights_whatever_the_shortcut():
    """The last weight is the gate in o; earlier ones do not look at the shortcut."""
    layers, maps = layers_and_maps(MRLALight)
    shortcuts = [torch.randn_like(x) for x in maps]
    outputs, retrievals = run(layers, maps, shortcuts)
    for layer, x, shortcut, o, found in zip(
        layers, maps, shortcuts, outputs, retrievals, strict=True
    ):
        gate = found.scores[..., -1].repeat_interleave(D_K, 1)[..., None, None]
        expected = gate * layer.value(x) + layer.lambda_t[:, None, None] * shortcut
        assert relative_error(o, expected) < 1e-5
    _, others = run(layers, maps)
    assert torch.equal(retrievals[-1].scores, others[-1].scores)
    assert "shortcut" in layers[0].scores_label
    output = MRLALight(CHANNELS, head_channels=D_K, recurrence="output")
    assert "shortcut" not in output.scores_label


@pytest.mark.parametrize("cls", [MRLABase, MRLALight])
def test_half_precision_and_autocast(cls):
    """Scores are float32 and those of float32 maps, as logits are inside forward."""
    layers, maps = layers_and_maps(cls)
    expected = run(layers, [x.bfloat16().float() for x in maps])[1]
    with torch.autocast("cpu", torch.bfloat16):
        found = run(layers, [x.bfloat16() for x in maps])[1]
    for a, b in zip(found, expected, strict=True):
        assert a.scores.dtype == a.query.dtype == torch.float32
        assert relative_error(a.scores, b.scores) < 1e-5


def test_a_type_that_does_not_tell():
    class Silent(LayerAttention):
        def forward(self, x, shortcut, state):
            return x, state

    with pytest.raises(NotImplementedError, match="Silent does not tell what it attends to"):
        Silent(4).retrieval(torch.rand(1, 4, 2, 2), None, None)
