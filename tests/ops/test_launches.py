"""How many operations a GPU is given for a block's end, counted without one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmrla.layers import MRLABase, MRLALight
from mmrla.ops import fused, verify

triton = pytest.importorskip("triton", reason="no Triton")
ttir = pytest.importorskip("tests.ops.ttir", reason="another Triton", exc_type=ImportError)
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

# Views, allocations, and what the runner itself does to tensors of the CPU.
FREE = ("empty", "split", "view", "slice", "select", "as_strided", "detach", "alias", "expand",
        "unsqueeze", "unbind", "set_", "promote_types")  # fmt: skip


class DeviceOperations(TorchDispatchMode):
    """Counts what is neither a view nor an allocation. One operation may be several launches."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(word in func.__name__ for word in FREE):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.delenv("MMRLA_BACKEND", raising=False)
    monkeypatch.setattr(fused, "uses_triton", lambda z: z.dtype != torch.float64)
    monkeypatch.setattr(verify, "reason_against", lambda *args, **kwargs: None)


def norms(mode):
    found = [nn.BatchNorm2d(8).train(mode == "train") for _ in range(2)]
    if mode == "coco":  # the pretrained norm is frozen, the new one learns statistics
        found[1].train()
    return found


def count(step):
    """Kernels of Triton, and operations of torch, in one call of ``step``."""
    with ttir.launches_on_cpu() as log, DeviceOperations() as seen:
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


@pytest.mark.parametrize(
    ("mode", "grad", "most"),
    [("train", True, 10), ("eval", False, 4), ("eval", True, 8), ("coco", True, 10)],
)
def test_light(mode, grad, most, on_a_gpu):
    """At most 6 more than the plain block's end, whose operations of torch are 1 launch or more."""
    kernels, others = count(end_of(MRLALight(8, head_channels=4), mode, grad))
    assert kernels <= most
    # A norm in training counts its batches, as everywhere.
    assert others == ["aten.add_.Tensor"] * {"train": 2, "coco": 1, "eval": 0}[mode]
    norm = norms(mode)[0]
    _, plain = count(plain_end(norm, grad))
    assert kernels + len(others) <= len(plain) + 6, (kernels, others, plain)


@pytest.mark.parametrize(
    ("mode", "grad", "most"),
    [("train", True, 10), ("eval", False, 4), ("eval", True, 9), ("coco", True, 10)],
)
@pytest.mark.parametrize("layers", [1, 3])
def test_base(layers, mode, grad, most, on_a_gpu):
    """Per layer; the gradients of keys, ``[B, C]``, are added up by autograd."""
    layer = MRLABase(8, head_channels=4)
    kernels, others = count(end_of(layer, mode, grad, layers))
    assert kernels <= most * layers
    shared = 3 * (layers - 1) if grad else 0  # this test's layers share their weights
    keys = sum(range(layers - 1)) if grad else 0
    batches = {"train": 2, "coco": 1, "eval": 0}[mode] * layers
    assert len(others) <= shared + keys + batches, others


def test_the_count_sees_what_a_gpu_would_be_given():
    _, seen = count(lambda: torch.ones(2, 3).mul(2).sum(0).to(torch.bfloat16))
    assert len(seen) == 4
