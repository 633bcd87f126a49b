"""mmrla cost resolution and memory, against independent counts."""

from __future__ import annotations

import pytest
import torch

from mmrla.analysis import activation_memory, complexity
from mmrla.engine.network import build_network
from mmrla.layers import LayerAttention
from mmrla.registry import LAYER_ATTENTIONS
from tests.conftest import ROOT
from tests.helpers import cfg_options
from tests.tools.test_figures import DEIT, LIGHT, SMALL_LIGHT


def test_flops_vs_resolution(tool):
    found = tool("resolution", LIGHT, "--sizes", 96, 64, *cfg_options(SMALL_LIGHT))
    rows = found["csv"]
    assert [int(row["size"]) for row in rows] == [64, 96]
    network = build_network(str(LIGHT), options=SMALL_LIGHT)
    plain = build_network(str(LIGHT), options=SMALL_LIGHT, plain=True)
    image = torch.rand(1, 3, 96, 96)
    whole, host = complexity(network.backbone, image), complexity(plain.backbone, image)
    assert float(rows[1]["whole_gflops"]) == pytest.approx(whole.macs / 1e9)
    assert float(rows[1]["added_gflops"]) == pytest.approx((whole.macs - host.macs) / 1e9)
    inside = [float(row["inside_attention_gflops"]) for row in rows]
    assert inside[1] == pytest.approx(whole.attention_macs / 1e9)
    # Linear in pixels but for the little that depends on channels alone.
    assert inside[1] / inside[0] == pytest.approx(96**2 / 64**2, rel=0.02)
    tool("resolution", LIGHT, "--sizes", 64, fails="--sizes must be two or more")
    plain_config = ROOT / "configs/cifar/resnet20_plain_cifar10.py"
    tool("resolution", plain_config, fails="no layer attention to count")


def test_memory_vs_depth(tool, monkeypatch):
    class Keeps(LayerAttention):
        def forward(self, x, shortcut, state):
            return x.sigmoid(), None

    monkeypatch.setitem(LAYER_ATTENTIONS._module_dict, "Keeps", Keeps)
    args = ["--depths", 34, 18, "--size", 64, "--types", "Keeps", "MRLALight"]
    heads = cfg_options({"model.backbone.layer_attention.head_channels": 8})
    found = tool("memory", LIGHT, *args, *heads)
    rows = found["csv"]
    assert [(int(row["depth"]), row["layer_attention"]) for row in rows] == [
        (depth, name) for depth in (18, 34) for name in ("plain", "Keeps", "MRLALight")
    ]
    deeper = {"model.backbone.depth": 34, "model.head.in_channels": 512}
    network = build_network(str(LIGHT), options=deeper)
    expected = activation_memory(network.backbone, torch.rand(2, 3, 64, 64)) / 2**20
    assert float(rows[5]["kept_mib_per_image"]) == pytest.approx(expected, abs=0.01)
    assert float(rows[5]["params_m"]) == pytest.approx(
        sum(p.numel() for p in network.backbone.parameters()) / 1e6, abs=1e-3
    )
    kept = [float(row["kept_mib_per_image"]) for row in rows]
    assert kept[0] < kept[2] < kept[1]
    assert all(row["peak_mib"] == "" for row in rows)  # no GPU here
    tool("memory", "--types", "MRLAHeavy", fails="unknown layer attention 'MRLAHeavy'")
    tool("memory", DEIT, fails="MRLAVisionTransformer takes no depth")
