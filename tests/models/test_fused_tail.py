"""Residual blocks that end in one operation, against the same blocks module by module."""

from __future__ import annotations

import copy

import pytest
import torch
from mmpretrain.models import ResNet as PlainResNet
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmrla.layers import MRLABase, MRLALight
from mmrla.models import MRLAResNet
from mmrla.ops.dispatch import forced_backend
from tests.conftest import (
    HALVES,
    filled,
    kept_for_backward,
    needs_new_compiler,
    relative_error,
    stable_id,
)
from tests.models.zoo import BASE, LIGHT, SMALL, after_step, assert_same

ATTENTIONS = [LIGHT, BASE]
AGAIN = dict(BASE, recompute_values=True)
TWO_STAGES = dict(num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(1,))


@pytest.fixture
def tails(monkeypatch):
    """Counts the tails that run."""
    count = []
    for cls in (MRLALight, MRLABase):
        own = cls.tail
        monkeypatch.setattr(cls, "tail", lambda *a, own=own: (count.append(1), own(*a))[1])
    return count


def network(depth=18, mode="train", edit=None, **kwargs):
    model = filled(MRLAResNet(depth, **{**SMALL, **kwargs})).double()
    model.train(mode == "train")
    if edit is not None:
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                edit(norm)
    return model


def momentum(value):
    def edit(norm):
        norm.momentum = value

    return edit


def freeze(norm):
    norm.requires_grad_(False)


def alternate(norm):
    """Batch statistics in evaluation, as without running statistics."""
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    norm.track_running_stats = False


def switch_off(norm):
    """Batch statistics that leave the running ones as they are."""
    norm.track_running_stats = False


@pytest.mark.parametrize("layer_attention", [*ATTENTIONS, AGAIN], ids=lambda c: str(c)[10:])
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(),
        dict(depth=50),
        dict(mode="eval"),
        dict(norm_eval=True),
        dict(frozen_stages=2),
        dict(mrla_drop_path_rate=0.5),
        dict(edit=momentum(None)),
        dict(edit=momentum(0.3)),
        dict(edit=freeze),
        dict(edit=alternate, mode="eval"),
        dict(edit=switch_off),
        dict(with_cp=True),
    ],
    ids=stable_id,
)
def test_the_same_network(kwargs, layer_attention, tails, monkeypatch):
    monkeypatch.delenv("MMRLA_BACKEND", raising=False)
    fused = network(layer_attention=layer_attention, **kwargs)
    plain = copy.deepcopy(fused)
    x = torch.randn(3, 3, 33, 47, dtype=torch.float64)
    got = after_step(fused, x)
    assert len(tails) >= (16 if kwargs.get("depth") == 50 else 8)
    tails.clear()
    monkeypatch.setenv("MMRLA_BACKEND", "naive")
    expected = after_step(plain, x)
    assert not tails
    # What is computed again for backward ends earlier: fewer norms move twice.
    moved = ("running", "num_batches") if kwargs.get("with_cp") else ()
    assert_same(got, expected, 1e-7, without=moved)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(norm_cfg=dict(type="GN", num_groups=4)),
        dict(mrla_act_cfg=dict(type="ReLU")),
        dict(layer_attention=dict(type="MRLALight", head_channels=8, recurrence="output")),
        dict(layer_attention=dict(type="MRLALight", head_channels=8, value_act="gelu")),
    ],
    ids=stable_id,
)
def test_blocks_that_keep_their_modules(kwargs, tails):
    model = network(**{"layer_attention": ATTENTIONS[0], **kwargs})
    after_step(model, torch.randn(2, 3, 33, 33, dtype=torch.float64))
    assert not tails


def test_a_hook_sees_its_module(tails):
    model = network(layer_attention=ATTENTIONS[0])
    seen = []
    model.layer1[0].bn_mrla.register_forward_hook(lambda *a: seen.append(1))
    model.layer2[1].mrla.register_forward_hook(lambda *a: seen.append(1))
    model.layer3[0].relu.register_forward_hook(lambda *a: seen.append(1))  # called twice
    model(torch.randn(2, 3, 33, 33, dtype=torch.float64))
    assert len(seen) == 4
    assert len(tails) == 5


def test_drop_path_follows_its_own_mode(tails):
    """A frozen stage is in eval; its layer attention, new beside plain weights, may train."""
    model = network(layer_attention=LIGHT, mrla_drop_path_rate=0.5, mode="eval")
    x = torch.randn(4, 3, 33, 33, dtype=torch.float64)
    whole = model(x)
    for block in (block for block in model.modules() if hasattr(block, "mrla_drop_path")):
        block.mrla_drop_path.train()
    dropped = []
    for backend in ("fused", "naive"):
        torch.manual_seed(0)
        with forced_backend(backend):
            dropped.append(model(x))
    assert len(tails) == 16
    assert relative_error(dropped[0][-1], dropped[1][-1]) < 1e-9
    assert relative_error(dropped[0][-1], whole[-1]) > 1e-2


def test_empty_batches_and_function_transforms():
    model = network(layer_attention=LIGHT, mode="eval")
    assert model(torch.zeros(0, 3, 32, 32).double())[-1].shape == (0, 64, 1, 1)
    parameters = dict(model.named_parameters())

    def loss(values, x):
        return torch.func.functional_call(model, values, (x[None],))[-1].sum()

    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    model(x)[-1].sum().backward()
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            assert relative_error(per_sample[name].sum(0), parameter.grad) < 1e-9, name


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast(dtype, tails):
    for layer_attention in ATTENTIONS:
        model = network(layer_attention=layer_attention).float()
        x = torch.randn(2, 3, 33, 47)
        with torch.no_grad():
            expected = copy.deepcopy(model)(x)
        with torch.autocast("cpu", dtype=dtype):
            outs = model(x)
        sum(o.float().square().mean() for o in outs).backward()
        for out, wide in zip(outs, expected, strict=True):
            assert out.dtype == dtype
            assert (out.float() - wide).norm() < 0.1 * wide.norm()
        for key, parameter in model.named_parameters():
            assert parameter.grad.dtype == torch.float32, key
            assert torch.isfinite(parameter.grad).all(), key
    assert tails


def kept(model, x):
    """Bytes of distinct storages kept for backward, parameters left out."""
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = kept_for_backward(lambda: model(x))
    return sum(size for address, size in found.items() if address not in mine)


def test_memory_kept_for_backward():
    """The targets on a CPU; the small size moves the ratios little."""
    x = torch.randn(2, 3, 64, 64)
    plain = {depth: kept(PlainResNet(depth), x) for depth in (50, 101)}
    for depth, kind, target in ((50, "MRLALight", 1.35), (50, "MRLABase", 1.60),
                                (101, "MRLABase", 1.60)):  # fmt: skip
        model = MRLAResNet(depth, layer_attention=dict(type=kind))
        assert kept(model, x) <= target * plain[depth], (depth, kind)
    model = MRLAResNet(101, layer_attention=dict(type="MRLABase", recompute_values=True))
    assert kept(model, x) <= 1.08 * plain[101]


def test_a_group_with_a_layer_that_runs_otherwise(tails):
    """Its value has no recipe: the layers behind it keep theirs."""
    model = network(layer_attention=AGAIN, depth=50)
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    expected = after_step(copy.deepcopy(model), x)
    tails.clear()
    model.layer3[2].bn_mrla.register_forward_hook(lambda *a: None)
    got = after_step(model, x)
    assert len(tails) == 15
    assert_same(got, expected, 1e-7)


@needs_new_compiler
@pytest.mark.parametrize(
    ("layer_attention", "train"),
    [(LIGHT, True), (LIGHT, False), (BASE, True), (BASE, False), (AGAIN, True)],
    ids=stable_id,
)
def test_compiles_to_one_graph(layer_attention, train, monkeypatch):
    monkeypatch.delenv("MMRLA_BACKEND", raising=False)
    model = network(layer_attention=layer_attention, mrla_drop_path_rate=0.3, **TWO_STAGES)
    model.float().train(train)
    expected = after_step(copy.deepcopy(model), x := torch.randn(2, 3, 33, 47))
    torch._dynamo.reset()
    got = after_step(torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    assert_same(got, expected, 1e-4)


@needs_new_compiler
@pytest.mark.slow
@pytest.mark.parametrize("layer_attention", ATTENTIONS, ids=lambda c: c["type"])
def test_compiles_with_inductor(layer_attention):
    model = network(layer_attention=layer_attention, **TWO_STAGES).float()
    expected = after_step(copy.deepcopy(model), x := torch.randn(2, 3, 33, 47))
    torch._dynamo.reset()
    got = after_step(torch.compile(model, fullgraph=True), x)
    for key in ("out0", "x"):
        assert relative_error(got[key], expected[key]) < 1e-2, key


@needs_new_compiler
def test_exports():
    x = torch.randn(2, 3, 33, 47)
    for layer_attention in ATTENTIONS:
        model = network(layer_attention=layer_attention, mode="eval").float()
        program = torch.export.export(model, (x,))
        for got, expected in zip(program.module()(x), model(x), strict=True):
            assert relative_error(got, expected.detach()) < 1e-5


@pytest.mark.usefixtures("process_group")
def test_under_ddp():
    x = torch.randn(2, 3, 33, 47, dtype=torch.float64)
    for layer_attention in ATTENTIONS:
        model = network(layer_attention=layer_attention)
        expected = after_step(copy.deepcopy(model), x)
        assert_same(after_step(DistributedDataParallel(model), x), expected, 1e-9)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_recomputing_counts_a_batch_twice_in_all_norms(attention, tails):
    """As docs/semantics.md writes: from zero, momentum 0.1 gives 0.19 of the mean for 0.1."""
    found = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = MRLAResNet(18, **SMALL, with_cp=with_cp, layer_attention=attention).train()
        sum(out.sum() for out in model(torch.randn(2, 3, 64, 64))).backward()
        block = model.layer2[1]
        found.append([norm.running_mean for norm in (block.bn1, block.bn2, block.bn_mrla)])
    assert tails
    for once, twice in zip(*found, strict=True):
        torch.testing.assert_close(twice, 1.9 * once, rtol=1e-4, atol=1e-6)
