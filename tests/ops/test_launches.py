"""How many operations a GPU is given for a block's end, counted without one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmrla.layers import MRLABase, MRLALight
from mmrla.ops import fused, verify

ttir = pytest.importorskip("tests.ops.ttir", exc_type=ImportError)


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.delenv("MMRLA_BACKEND", raising=False)
    monkeypatch.setattr(fused, "uses_triton", lambda z: z.dtype != torch.float64)
    monkeypatch.setattr(verify, "reason_against", lambda *args, **kwargs: None)


def norms(mode):
    found = [nn.BatchNorm2d(8).train(mode == "train") for _ in range(2)]
    if mode == "coco":  # the pretrained norm is frozen, the new one learns statistics
        found[1].train()
    if mode == "late":
        found[0].train()
    return found


def count(step):
    """Kernels of Triton, and operations of torch, in one call of ``step``."""
    with ttir.launches_on_cpu() as log, ttir.DeviceOperations() as seen:
        step()
    return sum(log.kernels.values()), seen.seen


def maps():
    return [
        torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
        for _ in range(2)
    ]


def plain_end(norm, grad):
    def step():
        z, s = maps_[0], maps_[1]
        out = torch.relu_(norm(z).add_(s))
        if grad:
            torch.autograd.grad(out, [z, s, norm.weight, norm.bias], ones)

    maps_, ones = maps(), torch.ones(2, 8, 4, 4)
    return step


def end_of(layer, mode, grad, layers=1):
    """A group of block ends with a layer attention."""
    parts = [(maps(), norms(mode)) for _ in range(layers)]
    ones = torch.ones(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    leaves = [p for (z, s), pair in parts for p in (z, s, *pair[0].parameters(),
                                                    *pair[1].parameters())]  # fmt: skip
    leaves += list(layer.parameters())
    drop = torch.ones(2) if mode == "train" else None

    def step():
        with torch.set_grad_enabled(grad):
            state, outs = None, []
            for (z, s), (norm, out_norm) in parts:
                assert layer.fuses_tail(z, norm, out_norm)
                out, state = layer.tail(z, s, state, norm, out_norm, drop)
                outs.append(out)
        if grad:
            torch.autograd.grad(outs, leaves, [ones] * layers, allow_unused=True)

    return step


# Launches of Triton per layer, of MRLA-light and MRLA-base.
STEPS = [("train", True, 10, 10), ("eval", False, 3, 3), ("eval", True, 7, 8), ("coco", True, 9, 9),
         ("late", True, 8, 9)]  # fmt: skip
# A norm in training counts its batches, as everywhere.
COUNTS = {"train": 2, "coco": 1, "late": 1, "eval": 0}


@pytest.mark.parametrize(("mode", "grad", "expected", "_"), STEPS)
def test_light(mode, grad, expected, _, on_a_gpu):
    """At most 6 more than the plain block's end, whose operations of torch are 1 launch or more."""
    kernels, others = count(end_of(MRLALight(8, head_channels=4), mode, grad))
    assert kernels == expected
    assert others == ["aten.add_.Tensor"] * COUNTS[mode]
    _, plain = count(plain_end(norms(mode)[0], grad))
    assert kernels + len(others) <= len(plain) + 6, (kernels, others, plain)


@pytest.mark.parametrize(("mode", "grad", "_", "expected"), STEPS)
@pytest.mark.parametrize("layers", [1, 3])
def test_base(layers, mode, grad, _, expected, on_a_gpu):
    """Per layer; the gradients of keys, ``[B, C]``, are added up by autograd."""
    layer = MRLABase(8, head_channels=4)
    kernels, others = count(end_of(layer, mode, grad, layers))
    assert kernels == expected * layers
    shared = 3 * (layers - 1) if grad else 0  # this test's layers share their weights
    keys = sum(range(layers - 1)) if grad else 0
    assert len(others) <= shared + keys + COUNTS[mode] * layers, others


def test_the_count_sees_what_a_gpu_would_be_given():
    _, seen = count(lambda: torch.ones(2, 3).mul(2).sum(0).to(torch.bfloat16))
    assert len(seen) == 4
