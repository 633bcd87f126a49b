"""DIANet, RLA_g, DLA and KCLA in the ResNet hosts, stages against equations written out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mmrla.layers.layer_attention import OpenReLU
from mmrla.models import MRLAResNet
from mmrla.models.backbones.mrla_resnet import LayerAttentionStage, MRLABasicBlock
from tests import reference
from tests.conftest import compare, filled
from tests.models.zoo import INTERACTIONS, RELU, SMALL

DIA, RLA, LIGHT, BASE, KCLA = INTERACTIONS.values()


def stage(layer_attention: dict, blocks: int, stride: int, **kwargs) -> LayerAttentionStage:
    made = LayerAttentionStage(
        block=MRLABasicBlock, num_blocks=blocks, in_channels=8, out_channels=16, stride=stride,
        layer_attention=layer_attention, **kwargs,
    )  # fmt: skip
    return filled(made).double()


@pytest.mark.parametrize("size", [(5, 7), (8, 6)])
@pytest.mark.parametrize("name", ["dia", "dla", "dla-base"])
def test_stage_is_the_equation(name, size):
    """Outputs and every gradient of a stage of four basic blocks."""
    cfg = INTERACTIONS[name]

    def expected(x, w):
        if name == "dia":
            return reference.dia_stage(x, w, 4, 2)
        return reference.dla_stage(x, w, 4, 2, 4, cfg["type"])

    made = stage(cfg, 4, 2, mrla_act_cfg=RELU if name == "dla-base" else None)
    compare(made, expected, torch.randn(3, 8, *size))


class Both(nn.Module):
    """Two stages: what is carried goes on from one to the next."""

    def __init__(self, cfg: dict, blocks: tuple[int, int], spans: bool = True, **kwargs) -> None:
        super().__init__()
        self.first, self.second = (
            stage(cfg, blocks[0], 1, **kwargs),
            stage(cfg, blocks[1], 2, follows=True, **kwargs),
        )
        self.spans = spans
        block = self.second[0]  # 16 channels come in, where `stage` has 8
        if spans and cfg["type"] == "KCLA":
            block.mrla.cross(16, 2, nn.BatchNorm2d)
        block.conv1 = nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False)
        block.downsample[0] = nn.Conv2d(16, 16, 1, stride=2, bias=False)
        filled(self)

    def forward(self, x):
        carried = [None]
        out = self.second(self.first(x, carried), carried if self.spans else None)
        return (out, carried[0]) if self.spans else out


def split(w: dict) -> list[dict]:
    return [{k.removeprefix(f"{name}."): v for k, v in w.items() if k.startswith(name)}
            for name in ("first", "second")]  # fmt: skip


@pytest.mark.parametrize("size", [(9, 7), (8, 12)])
def test_rla_is_the_equation_across_stages(size):
    """The hidden map is pooled, and read through one concatenation."""

    def expected(x, w):
        first, second = split(w)
        x, h = reference.rla_stage(x, x.new_zeros(x.shape[0], 6, *x.shape[2:]), first, 2, 1)
        return reference.rla_stage(x, h, second, 3, 2)

    compare(Both(RLA, (2, 3)), expected, torch.randn(2, 8, *size))


@pytest.mark.parametrize("backend", ["fused", "naive"])
@pytest.mark.parametrize(
    ("d", "size", "spans"),
    [(4, (9, 7), True), (8, (6, 5), True), (16, (4, 5), True), (1, (3, 5), True),
     (4, (5, 8), False)],
)  # fmt: skip
def test_kcla_is_the_equation_across_stages(d, size, spans, backend, monkeypatch):
    """Outputs, the state and every gradient, through the lean end of a block and not."""
    monkeypatch.setenv("MMRLA_BACKEND", backend)
    cfg = dict(type="KCLA", head_channels=d, spans_stages=spans)
    both = Both(cfg, (2, 3), spans, mrla_act_cfg=RELU)
    block = both.first[0]
    fuses = block.mrla.fuses_tail(torch.zeros(()).double(), block.bn2, block.bn_mrla, OpenReLU)
    assert fuses is (backend == "fused")

    def expected(x, w):
        first, second = split(w)
        x, carried = reference.kcla_stage(x, first, 2, 1, d)
        x, (u, z) = reference.kcla_stage(x, second, 3, 2, d, carried if spans else None)
        return (x, u / z, z[:, ::d, 0, 0]) if spans else x

    compare(both, expected, torch.randn(3, 8, *size))
    # The running statistics moved once.
    moved = [m.num_batches_tracked.item() for m in both.modules() if hasattr(m, "running_mean")]
    assert set(moved) == {1}


@pytest.mark.parametrize("name", INTERACTIONS)
def test_state_dict_holds_shared_parts_once(name):
    model = MRLAResNet(18, **SMALL, layer_attention=INTERACTIONS[name])
    shared = model.layer1[0].mrla.shared
    owners = {
        k.split(".")[1] for k in model.state_dict() if any(f".mrla.{part}." in k for part in shared)
    }
    assert owners == ({"0"} if shared else set())
    for part in shared:
        for net, other in ((model, model.layer2), (copy.deepcopy(model), model.layer1)):
            own = getattr(net.layer1[1].mrla, part)
            assert own is getattr(net.layer1[0].mrla, part)
            assert own is not getattr(other[1].mrla, part)


def test_detectors_leave_rlas_last_map_out():
    """As released: no more channels; what only serves them is frozen, and keys stay."""
    model, whole = (
        filled(MRLAResNet(18, **SMALL, layer_attention=cfg)).train()
        for cfg in (dict(RLA, concat_output=False), RLA)
    )
    assert model.feat_dim == 64
    assert model.state_dict().keys() == whole.state_dict().keys()
    outs = model(torch.randn(2, 3, 32, 48))
    assert [o.shape[1] for o in outs] == [8, 16, 32, 64]
    sum(o.square().sum() for o in outs).backward()
    unused = {k for k, p in model.named_parameters() if p.grad is None}
    assert unused == {k for k, p in model.named_parameters() if not p.requires_grad}
    assert all(k.startswith(("mrla_output", "layer4.1.mrla.norm")) for k in unused)
    assert len(unused) == 4


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(layer_attention=DIA, mrla_drop_path_rate=0.2), "mrla_drop_path_rate.*DIAUnit.*0.2"),
        (dict(layer_attention=RLA, mrla_act_cfg=RELU), "mrla_act_cfg.*RecurrentLayer"),
        (dict(layer_attention=dict(DIA, reduction=0)), "reduction must be at least 1, got 0"),
        (dict(layer_attention=dict(RLA, hidden_channels=0)), "hidden_channels must be at least 1"),
        (dict(layer_attention=dict(LIGHT, head_channels=3)), "head_channels=3"),
        (dict(layer_attention=dict(BASE, reduction=99)), "reduction=99"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MRLAResNet(18, **SMALL, **kwargs)
