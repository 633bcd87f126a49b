from __future__ import annotations

import pytest
import torch

from mmrla.analysis import complexity
from mmrla.registry import MODELS

LIGHT = dict(type="MRLALight", head_channels=32)
BASE = dict(type="MRLABase", head_channels=16)


def classifier(depth, layer_attention):
    return MODELS.build(
        dict(
            type="mmpretrain.ImageClassifier",
            backbone=dict(type="mmrla.MRLAResNet", depth=depth, layer_attention=layer_attention),
            neck=dict(type="mmpretrain.GlobalAveragePooling"),
            head=dict(type="mmpretrain.LinearClsHead", num_classes=1000, in_channels=2048),
        )
    )


@pytest.mark.parametrize(
    ("depth", "layer_attention", "params", "gmacs"),
    [
        (50, None, 25_557_032, 4.112),
        (101, None, 44_549_160, 7.834),
        (50, LIGHT, 25.738e6, 4.178),
        (101, LIGHT, 44.940e6, 7.942),
        (50, BASE, 25.723e6, 4.192),
        (101, BASE, 44.907e6, 8.007),
    ],
)
def test_figures_of_the_released_networks(depth, layer_attention, params, gmacs):
    """To the last digit that is known: exact for the plain networks, else 3 decimals."""
    model = classifier(depth, layer_attention).train()
    got = complexity(model, torch.rand(1, 3, 224, 224))
    assert got.params == sum(p.numel() for p in model.parameters())
    if layer_attention is None:
        assert got.params == params
    else:
        assert round(got.params / 1e6, 3) == params / 1e6
    assert round(got.macs / 1e9, 3) == gmacs
    assert model.training  # left as it was
    assert all(m.training for m in model.modules())
