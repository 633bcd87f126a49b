"""Any arguments of hosts and layer attentions: a network that learns, or an error that names one.

Arguments are drawn from what each may be and from what it may not; each example changes one to
three of a small network that works. Deterministic, so that it fails everywhere or nowhere.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmrla.layers import (
    KCLA,
    MLA,
    DIAUnit,
    DLABase,
    DLALight,
    DWConv,
    LinearRLA,
    MRLABase,
    MRLALight,
    RecurrentLayerAggregation,
)
from mmrla.models import (
    MRLACeiT,
    MRLADistilledVisionTransformer,
    MRLAEfficientNet,
    MRLAPyramidVisionTransformerV2,
    MRLAResNet,
    MRLAResNetCIFAR,
    MRLAResNeXt,
    MRLAVisionTransformer,
)
from tests.conftest import flat

COMMON = dict(derandomize=True, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
NAN = float("nan")
LAYERS = (
    MRLALight, MRLABase, MLA, LinearRLA, DWConv, DIAUnit, DLALight, DLABase,
    RecurrentLayerAggregation, KCLA,
)  # fmt: skip


SIMPLE = ("MRLALight", "MRLABase", "MLA", "LinearRLA")


def one_of(*values: Any) -> st.SearchStrategy:
    return st.sampled_from(values)


junk = one_of(None, "x", "", (), [1], {}, {"type": 3}, NAN, 1.5, -1, 0, True, object)
integers = st.integers(-3, 9) | one_of(1003)
counts = integers | junk
rates = st.floats(-0.5, 1.5) | one_of(0, 1, 0.0, 0.2, 1.0) | junk
bools = st.booleans() | junk
norms = one_of(
    dict(type="BN"), dict(type="GN", num_groups=2), dict(type="GN", num_groups=3),
    dict(type="None such"), dict(type="BN", no_such=1), dict(type="BN", momentum=0.01),
) | junk  # fmt: skip
indices = st.lists(st.integers(-4, 5), max_size=4) | st.lists(junk, max_size=2) | junk
per_stage = st.lists(st.integers(-1, 3), min_size=2, max_size=5) | junk

LAYER_ARGUMENTS: dict[str, st.SearchStrategy] = {
    "head_channels": counts | one_of("all", 4, 8),
    "kernel_size": counts,
    "projection": one_of("conv1d", "fc", "linear") | junk,
    "value_conv": bools,
    "recurrence": one_of("shortcut", "output") | junk,
    "value_act": one_of("gelu", "relu") | junk,
    "fixed_lambda": st.floats(-2, 2) | one_of(1, math.inf) | junk,
    "reduction": counts,
    "hidden_channels": counts,
    "concat_output": bools,
    "recompute_values": bools,
    "spans_stages": bools,
    "no_such_argument": junk,
}


def choices_of(cls: type) -> dict[str, st.SearchStrategy]:
    known = [n for n in inspect.signature(cls).parameters if n != "channels"]
    missing = [name for name in known if name not in LAYER_ARGUMENTS]
    assert not missing, f"{cls.__name__}: no values to try for {missing}"
    return {name: LAYER_ARGUMENTS[name] for name in (*known, "no_such_argument")}


def small_of(choices: dict[str, Any]) -> dict[str, Any]:
    """What makes a layer fit few channels, of the arguments that it has."""
    small = dict(head_channels=4, reduction=2, hidden_channels=4)
    return {name: value for name, value in small.items() if name in choices}


def drawn(data: st.DataObject, choices: dict[str, st.SearchStrategy], most: int) -> dict[str, Any]:
    names = data.draw(st.lists(one_of(*choices), unique=True, max_size=most))
    return {name: data.draw(choices[name], label=name) for name in names}


def layer_attentions(data: st.DataObject) -> Any:
    """A config: often a right one, or of a known type with up to two arguments drawn."""
    if data.draw(st.booleans()):
        return data.draw(one_of(None, *({"type": name, "head_channels": 4} for name in SIMPLE)))
    if data.draw(st.integers(0, 9)) == 0:
        return data.draw(junk | one_of(dict(type="MRLAHeavy"), dict(type=nn.ReLU)))
    cls = data.draw(one_of(*LAYERS))
    choices = choices_of(cls)
    return {"type": cls.__name__, **small_of(choices), **drawn(data, choices, 2)}


def assert_clear(error: Exception, names: list[str], drawn: Any) -> None:
    """A line or two that name an argument."""
    text = str(error)
    assert any(name in text for name in names), f"{drawn}: {error!r}"
    assert len(text) < 1500, f"{drawn}: {error!r}"


def assert_learns(network: nn.Module, images: torch.Tensor, count: int | None = None) -> None:
    network.train()
    images = images.requires_grad_()
    result = network(images)
    if count is not None:
        assert len(result) == count
    tensors = flat(result)
    assert tensors
    assert all(tensor.isfinite().all() for tensor in tensors)
    sum((tensor * tensor.detach().sin()).sum() for tensor in tensors).backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert gradients or not any(p.requires_grad for p in network.parameters())
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    "cls", [c for c in LAYERS if c.placement == "after"], ids=lambda cls: cls.__name__
)
def test_layer_attentions(cls):
    choices = choices_of(cls) | {"channels": st.sampled_from([8, 16]) | junk}
    learned: list[bool] = []

    @settings(max_examples=50, **COMMON)
    @given(data=st.data())
    def check(data):
        kwargs = {"channels": 8, **small_of(choices), **drawn(data, choices, 3)}
        try:
            layer = cls(**kwargs)
        except (ValueError, TypeError) as error:
            assert_clear(error, list(kwargs), kwargs)
            learned.append(False)
            return
        x = torch.rand(2, kwargs["channels"], 3, 2, requires_grad=True)
        state, total = None, 0
        for _ in range(2):
            o, state = layer(x, x, state)
            assert o.shape == x.shape
            total = total + (o * o.detach()).sum()
        total.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
        assert x.grad.isfinite().all()
        learned.append(True)

    check()
    # Each was built, and each was refused.
    assert 2 < sum(learned) < len(learned) - 2


VIT = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)
ANY_HOST: dict[str, st.SearchStrategy] = {
    "mrla_drop_path_rate": rates,
    "out_indices": indices,
    "norm_cfg": norms,
    "drop_path_rate": rates,
    "init_cfg": one_of(dict(type="Kaiming", layer="Conv2d"), [], dict(type="None such")) | junk,
    "no_such_argument": junk,
}
CONVOLUTIONAL = ANY_HOST | {
    "frozen_stages": counts,
    "norm_eval": bools,
    "with_cp": bools,
    "conv_cfg": one_of(dict(type="Conv2d"), dict(type="None such")) | junk,
}
RESNET = CONVOLUTIONAL | {
    "mrla_act_cfg": one_of(dict(type="ReLU"), dict(type="None such")) | junk,
    "plugins": one_of(
        [dict(cfg=dict(type="mmrla.ECA"))],
        [dict(cfg=dict(type="mmrla.ECA", kernel_size=2))],
        [dict(cfg=dict(type="mmrla.None such"))],
        [dict(cfg=dict(type="mmrla.ECA"), position="before")],
        [dict(cfg=dict(type="mmrla.ECA"), stages=(True, False))],
    ) | junk,
    "depth": st.sampled_from([18, 20, 42]) | junk,
    "stem_channels": one_of(4, 0, -2) | junk,
    "base_channels": one_of(4, 16, 0, -2) | junk,
    "num_stages": counts,
    "strides": per_stage,
    "dilations": per_stage,
    "style": one_of("pytorch", "caffe", "mxnet") | junk,
    "deep_stem": bools,
    "avg_down": bools,
    "zero_init_residual": bools,
    "expansion": one_of(1, 2) | junk,
}  # fmt: skip
TRANSFORMER = ANY_HOST | {
    "mrla_group_size": counts,
    "frozen_stages": counts,
    "arch": one_of(
        VIT, VIT | dict(num_heads=3), VIT | dict(num_layers=0), dict(embed_dims=16), "huge one"
    ) | junk,
    "img_size": one_of(32, (32, 32), (32, 48), 4, 0) | junk,
    "patch_size": one_of(8, 16, 64, 0) | junk,
    "drop_rate": rates,
    "qkv_bias": bools,
    "final_norm": bools,
    "out_type": one_of("featmap", "avg_featmap", "raw", "cls_token", "none such") | junk,
    "interpolate_mode": one_of("bicubic", "bilinear", "none such") | junk,
    "with_cls_token": bools,
}  # fmt: skip
PVT = ANY_HOST | {
    "arch": one_of("b9") | junk,
    "embed_dims": one_of(8, 16, 0) | junk,
    "num_layers": per_stage,
    "num_heads": per_stage,
    "sr_ratios": per_stage,
    "mlp_ratios": per_stage,
    "num_stages": counts,
    "drop_rate": rates,
    "attn_drop_rate": rates,
    "qkv_bias": bools,
}
NARROW = dict(stem_channels=8, base_channels=8)
SMALL_VIT = dict(arch=VIT, img_size=32, patch_size=8)
HOSTS: dict[str, tuple[type, dict[str, Any], dict[str, st.SearchStrategy]]] = {
    cls.__name__: (cls, small, choices)
    for cls, small, choices in (
        (MRLAResNet, dict(depth=18, **NARROW), RESNET),
        (MRLAResNeXt, dict(depth=50, groups=2, width_per_group=2, **NARROW),
         CONVOLUTIONAL | {"groups": counts, "width_per_group": one_of(2, 0, -2) | junk}),
        (MRLAResNetCIFAR, dict(depth=20), RESNET),
        (MRLAEfficientNet, dict(arch="b0"),
         CONVOLUTIONAL | {"arch": one_of("b0", "lite0", "b99") | junk}),
        (MRLAVisionTransformer, SMALL_VIT, TRANSFORMER),
        (MRLADistilledVisionTransformer, SMALL_VIT, TRANSFORMER),
        (MRLACeiT, SMALL_VIT | dict(patch_size=4), TRANSFORMER),
        (MRLAPyramidVisionTransformerV2, dict(embed_dims=8, num_layers=(1, 1, 1, 1)), PVT),
    )
}  # fmt: skip


def check_host(name: str, data: st.DataObject) -> bool:
    """Whether there was a network, which learned; else there was a clear error."""
    cls, small, choices = HOSTS[name]
    given = drawn(data, choices, 3)
    attention = layer_attentions(data)
    torch.manual_seed(0)
    try:
        host = cls(**{**small, "layer_attention": attention, **given})
        host.init_weights()
    except (ValueError, TypeError) as error:
        names = ["layer_attention", *given, *(attention if isinstance(attention, dict) else ())]
        assert_clear(error, names, (given, attention))
        return False
    size = given.get("img_size", 32)
    # Two images: a batch norm cannot learn from one value a channel.
    height, width = (size, size) if isinstance(size, int) else size
    indices = given.get("out_indices")
    count = len(indices) if isinstance(indices, (list, tuple)) else None
    assert_learns(host, torch.rand(2, 3, max(height, 32), max(width, 32)), count)
    return True


def check_hosts(name: str, examples: int) -> None:
    learned: list[bool] = []

    @settings(max_examples=examples, **COMMON)
    @given(data=st.data())
    def check(data):
        learned.append(check_host(name, data))

    check()
    # Else the draws would be too wild, or too tame, to show anything.
    assert 0.1 < sum(learned) / len(learned) < 0.9


@pytest.mark.parametrize("name", HOSTS)
def test_hosts(name):
    check_hosts(name, 16)


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTS)
def test_hosts_at_length(name):
    check_hosts(name, 400)
