"""MRLA-light against its equation, written as loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from mmrla.ops import eca_kernel_size, mrla_light
from tests.conftest import golden, relative_error

SHAPES = [  # B, C, H, W, d_k, k
    (2, 64, 9, 11, 32, 3),
    (1, 24, 7, 7, 8, 3),
    (3, 16, 1, 1, 16, 3),
    (2, 12, 13, 17, 1, 1),
    (1, 32, 1, 5, 4, 5),
]


def arguments(b, c, h, w, kernel, dtype=torch.float64):
    def make(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    return [make(b, c, h, w), make(b, c, h, w), make(1, 1, kernel), make(1, 1, kernel),
            make(c, 1, 3, 3), make(c)]  # fmt: skip


def reference(x, previous, query_weight, key_weight, value_weight, lambda_t, head_channels):
    """Eq. 10, one channel and one tap at a time."""
    b, c, h, w = x.shape
    kernel = query_weight.numel()

    def slide(y, weight):
        padded = torch.cat([y.new_zeros(b, kernel // 2), y, y.new_zeros(b, kernel // 2)], dim=1)
        return sum(weight[0, 0, i] * padded[:, i : i + c] for i in range(kernel))

    summary = x.sum(dim=(2, 3)) / (h * w)
    q, k = slide(summary, query_weight), slide(summary, key_weight)
    framed = x.new_zeros(b, c, h + 2, w + 2)
    framed[:, :, 1:-1, 1:-1] = x
    channels = []
    for channel in range(c):
        head = channel // head_channels * head_channels
        logit = (q[:, head : head + head_channels] * k[:, head : head + head_channels]).sum(1)
        gate = 1 / (1 + torch.exp(-logit / math.sqrt(head_channels)))
        value = sum(
            value_weight[channel, 0, i, j] * framed[:, channel, i : i + h, j : j + w]
            for i in range(3)
            for j in range(3)
        )
        channels.append(lambda_t[channel] * previous[:, channel] + gate[:, None, None] * value)
    return torch.stack(channels, dim=1)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_every_gradient(shape, channels_last):
    b, c, h, w, head_channels, kernel = shape
    args = arguments(b, c, h, w, kernel)
    ours = [a.detach().clone().requires_grad_() for a in args]
    expected = reference(*args, head_channels)
    fed = list(ours)
    if channels_last:
        fed[:2] = [a.contiguous(memory_format=torch.channels_last) for a in ours[:2]]
    got = mrla_light(*fed, head_channels)
    assert relative_error(got, expected.detach()) < 1e-12
    grad = torch.randn_like(expected)
    expected.backward(grad)
    got.backward(grad)
    for theirs, mine in zip(args, ours, strict=True):
        assert relative_error(mine.grad, theirs.grad) < 1e-11


def test_gradcheck():
    args = arguments(2, 4, 3, 2, 3)
    assert gradcheck(lambda *a: mrla_light(*a, 2), args)


@pytest.mark.parametrize("source", ["fixture", "shared"])
def test_golden(source):
    g = golden("light_layer", source)
    x = g["x"].clone().requires_grad_()
    weights = [g[f"param:W{name}.weight"].clone().requires_grad_() for name in "qkv"]
    out = mrla_light(x, None, *weights, None, 32)
    out.backward(g["grad_out"])
    assert g.error("out", out) < 1e-5
    assert g.error("grad_x", x.grad) < 1e-5
    for name, weight in zip("qkv", weights, strict=True):
        assert g.error(f"grad:W{name}.weight", weight.grad) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_logits_in_float32(dtype):
    """With means of about 1e3 the logits reach 1e6: infinite in float16, finite in float32."""
    args = [a.detach().float() for a in arguments(2, 16, 5, 5, 3)]
    args[0] = args[0] + 1e3
    if dtype == torch.float16 and torch.__version__.startswith("2.1."):
        pytest.skip("this torch has no float16 autocast on the CPU")
    expected = mrla_light(*args, 8)
    with torch.autocast("cpu", dtype=dtype):
        got = mrla_light(*args, 8)
    assert got.dtype == dtype
    assert torch.isfinite(got).all()
    assert relative_error(got.float(), expected) < 2e-2


def test_no_previous_is_a_zero_previous():
    x, previous, *weights, lambda_t = arguments(2, 8, 4, 3, 3)
    got = mrla_light(x, None, *weights, None, 4)
    assert torch.equal(got, mrla_light(x, torch.zeros_like(previous), *weights, lambda_t, 4))


def test_eca_kernel_size():
    """The values of ECA-Net's rule for the widths of ResNet."""
    widths = (1, 16, 64, 128, 256, 512, 1024, 2048)
    assert [eca_kernel_size(c) for c in widths] == [1, 3, 3, 5, 5, 5, 5, 7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(head_channels=5), r"head_channels=5 with channels=16; allowed: 1, 2, 4, 8, 16"),
        (dict(head_channels=0), r"head_channels=0"),
        (dict(x=torch.zeros(2, 16, 4)), r"x must be \[B, C, H, W\], got x.shape=\(2, 16, 4\)"),
        (dict(x=torch.zeros(2, 16, 0, 4)), r"x has no pixels"),
        (dict(x=torch.zeros(2, 16, 4, 4).int()), r"floating point, got x.dtype=torch.int32"),
        (dict(previous=torch.zeros(2, 16, 4, 3)), r"previous.shape=\(2, 16, 4, 3\)"),
        (dict(previous=None), r"previous and lambda_t come together"),
        (dict(query_weight=torch.zeros(1, 1, 4)), r"query_weight must be \[1, 1, odd\]"),
        (dict(value_weight=torch.zeros(8, 1, 3, 3)), r"value_weight must be \[16, 1, 3, 3\]"),
        (dict(lambda_t=torch.zeros(16, 1, 1)), r"lambda_t must be \[16\]"),
        (dict(lambda_t=torch.zeros(16, device="meta")), r"one device, got \['cpu', 'meta'\]"),
    ],
)
def test_bad_arguments_are_named(change, message):
    good = dict(
        x=torch.zeros(2, 16, 4, 4),
        previous=torch.zeros(2, 16, 4, 4),
        query_weight=torch.zeros(1, 1, 3),
        key_weight=torch.zeros(1, 1, 3),
        value_weight=torch.zeros(16, 1, 3, 3),
        lambda_t=torch.zeros(16),
        head_channels=8,
    )
    mrla_light(*good.values())
    with pytest.raises((ValueError, TypeError), match=message):
        mrla_light(*{**good, **change}.values())
