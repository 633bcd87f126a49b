"""What a layer attention says it attends to is what its forward computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmrla.layers import MLA, LayerAttention, LinearRLA, MRLABase, MRLALight
from tests.conftest import relative_error
from tests.reference import heads, linear_kernel, projected, shares, sigmoid, softmax_kernel, spread

BATCH, CHANNELS, HEADS = 3, 24, 4
D_K = CHANNELS // HEADS


def layers_and_maps(cls, count=4, **kwargs):
    layers = [cls(CHANNELS, head_channels=D_K, kernel_size=5, **kwargs) for _ in range(count)]
    maps = [3 * torch.randn(BATCH, CHANNELS, 5, 7) for _ in layers]
    return layers, maps


def run(layers, maps, shortcuts=None):
    """Outputs and retrievals of a group, memory and state passed along."""
    outputs, retrievals, state, memory = [], [], None, None
    for layer, x, shortcut in zip(layers, maps, shortcuts or maps, strict=True):
        found = layer.retrieval(x, shortcut, state, memory)
        o, state = layer(x, shortcut, state)
        memory = found.memory
        outputs.append(o)
        retrievals.append(found)
    return outputs, retrievals


@pytest.mark.parametrize("cls", [MRLABase, MLA, LinearRLA])
def test_scores_are_the_shares_of_the_values(cls):
    layers, maps = layers_and_maps(cls)
    for t, (o, found) in enumerate(zip(*run(layers, maps), strict=True)):
        makers = [layers[t]] * (t + 1) if cls is MLA else layers[: t + 1]
        pairs = list(zip(makers, maps[: t + 1], strict=True))
        query = projected(maps[t], layers[t].query.weight)
        keys = [projected(x, layer.key.weight) for layer, x in pairs]
        kernel = linear_kernel if cls is LinearRLA else softmax_kernel
        expected = shares(query, keys, D_K, kernel)
        assert relative_error(found.query, heads(query, D_K).detach()) < 1e-5
        assert relative_error(found.scores, torch.stack(expected, -1).detach()) < 1e-5
        # and so much of each value is in o
        total = sum(
            spread(found.scores[..., s], D_K) * layer.value(x) for s, (layer, x) in enumerate(pairs)
        )
        assert relative_error(o, total) < 1e-5


def test_light_without_previous_information_looks_at_its_own_layer():
    layers, maps = layers_and_maps(MRLALight, recurrence=None)
    for layer, x, o, found in zip(layers, maps, *run(layers, maps), strict=True):
        assert not found.scores[..., :-1].any()
        assert relative_error(o, found.memory[..., -1, None, None] * layer.value(x)) < 1e-5


def test_light_is_the_unrolled_recurrence():
    layers, maps = layers_and_maps(MRLALight, recurrence="output", value_act="gelu")
    values = [F.gelu(layer.value(x)) for layer, x in zip(layers, maps, strict=True)]
    for t, (o, found) in enumerate(zip(*run(layers, maps), strict=True)):
        assert found.scores.shape == (BATCH, HEADS, t + 1)
        total = (found.memory[..., None, None] * torch.stack(values[: t + 1], 2)).sum(2)
        assert relative_error(o, total) < 1e-5
        for s in range(t + 1):
            query, key = (
                heads(projected(maps[s], conv.weight), D_K)
                for conv in (layers[s].query, layers[s].key)
            )
            gate = sigmoid((query * key).sum(-1) / D_K**0.5)
            beta = torch.ones(CHANNELS)
            for layer in layers[s + 1 : t + 1]:
                beta = beta * layer.lambda_t
            expected = gate * beta.abs().reshape(HEADS, D_K).mean(-1)
            assert relative_error(found.scores[..., s], expected.detach()) < 1e-5


def test_light_as_released_has_the_same_weights_whatever_the_shortcut():
    """The last weight is the gate in o; earlier ones do not look at the shortcut."""
    layers, maps = layers_and_maps(MRLALight)
    shortcuts = [torch.randn_like(x) for x in maps]
    outputs, retrievals = run(layers, maps, shortcuts)
    for layer, x, shortcut, o, found in zip(
        layers, maps, shortcuts, outputs, retrievals, strict=True
    ):
        gate = spread(found.scores[..., -1], D_K)
        expected = gate * layer.value(x) + layer.lambda_t[:, None, None] * shortcut
        assert relative_error(o, expected) < 1e-5
    assert torch.equal(retrievals[-1].scores, run(layers, maps)[1][-1].scores)
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
