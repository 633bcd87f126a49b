"""MRLA-light's and MRLA-base's operations against their equations."""

from __future__ import annotations

import pytest
import torch

from mmrla.ops import eca_kernel_size, mrla_base, mrla_light, reference
from tests.conftest import HALVES, golden, kept_for_backward, relative_error
from tests.reference import convolved, gated, projected, retrieved


def made(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def light_arguments(b, c, h, w, kernel):
    """x, previous, query, key, value and lambda."""
    shapes = (b, c, h, w), (b, c, h, w), (1, 1, kernel), (1, 1, kernel), (c, 1, 3, 3), (c,)
    return [made(*shape) for shape in shapes]


def light_reference(x, previous, query, key, value, scale, d):
    o = gated(projected(x, query), projected(x, key), convolved(x, value), d)
    return o + scale[:, None, None] * previous


def base_arguments(layers, b, c, h, w):
    """Query, keys and values."""
    return [made(b, c), *(made(b, c) for _ in range(layers)),
            *(made(b, c, h, w) for _ in range(layers))]  # fmt: skip


def of_lists(function):
    """A function of query, keys, values and d_k for the arguments one after the other."""

    def run(query, *rest):
        *tensors, d = rest
        count = len(tensors) // 2
        return function(query, tensors[:count], tensors[count:], d)

    return run


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "shape",  # B, C, H, W, d_k, k; layers, B, C, H, W, d_k
    [
        ("light", 2, 64, 9, 11, 32, 3), ("light", 1, 24, 7, 7, 8, 3), ("light", 3, 16, 1, 1, 16, 3),
        ("light", 2, 12, 13, 17, 1, 1), ("light", 1, 32, 1, 5, 4, 5),
        ("base", 1, 2, 8, 3, 4, 4), ("base", 3, 2, 24, 7, 7, 8), ("base", 20, 1, 6, 1, 1, 3),
        ("base", 4, 3, 4, 13, 2, 1),
    ],
    ids=str,
)  # fmt: skip
def test_output_and_every_gradient(shape, channels_last):
    kind, *dims = shape
    if kind == "light":
        *dims, d, kernel = dims
        args, ours, theirs = light_arguments(*dims, kernel), mrla_light, light_reference
    else:
        *dims, d = dims
        args, ours, theirs = base_arguments(*dims), of_lists(mrla_base), of_lists(retrieved)
    given = args
    if channels_last:
        last = dict(memory_format=torch.channels_last)
        # A weight is no map.
        given = [a.contiguous(**last) if a.dim() == 4 and a.shape[1] > 1 else a for a in args]
    got, expected = ours(*given, d), theirs(*args, d)
    assert relative_error(got, expected.detach()) < 1e-12
    grad = torch.randn_like(expected)
    found = torch.autograd.grad(got, args, grad)
    for mine, want in zip(found, torch.autograd.grad(expected, args, grad), strict=True):
        # With one layer the softmax is 1 and nothing flows to query and key.
        assert (mine - want).abs().max() < 1e-11 * (want.abs().max() if kind == "light" else 1)


def test_memory_kept_for_backward_does_not_copy_values():
    """Saved storages are the values themselves: linear in depth over a group, not quadratic."""
    query, *rest = base_arguments(8, 2, 16, 9, 9)
    keys, values = rest[:8], rest[8:]
    given = {t.untyped_storage().data_ptr() for t in values}
    found = kept_for_backward(lambda: mrla_base(query, keys, values, 4))
    extra = sum(size for address, size in found.items() if address not in given)
    assert extra < values[0].untyped_storage().nbytes() / 2


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


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_keeps_logits_in_float32(dtype):
    """With means of about 1e3 the logits reach 1e6: infinite in float16, finite in float32."""
    args = [a.detach().float() for a in light_arguments(2, 16, 5, 5, 3)]
    args[0] = args[0] + 1e3
    expected = mrla_light(*args, 8)
    with torch.autocast("cpu", dtype=dtype):
        got = mrla_light(*args, 8)
    assert got.dtype == dtype
    assert torch.isfinite(got).all()
    assert relative_error(got.float(), expected) < 2e-2


@pytest.mark.parametrize("shape", [(1, 1, 3), (16, 16)])
def test_autocast_keeps_projections_in_float32(shape):
    means, weight = torch.randn(2, 16), torch.randn(shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = reference.project(means, weight)
    assert torch.equal(got, reference.project(means, weight))


def test_no_previous_is_a_zero_previous():
    x, previous, *weights, lambda_t = light_arguments(2, 8, 4, 3, 3)
    got = mrla_light(x, None, *weights, None, 4)
    assert torch.equal(got, mrla_light(x, torch.zeros_like(previous), *weights, lambda_t, 4))


def test_eca_kernel_size():
    """The values of ECA-Net's rule for the widths of ResNet."""
    widths = (1, 16, 64, 128, 256, 512, 1024, 2048)
    assert [eca_kernel_size(c) for c in widths] == [1, 3, 3, 5, 5, 5, 5, 7]


ZEROS, KEY = torch.zeros(2, 16, 4, 4), torch.zeros(2, 8)
LIGHT = dict(x=ZEROS, previous=ZEROS, query_weight=torch.zeros(1, 1, 3),
             key_weight=torch.zeros(1, 1, 3), value_weight=torch.zeros(16, 1, 3, 3),
             lambda_t=torch.zeros(16), head_channels=8)  # fmt: skip
BASE = dict(query=KEY, keys=[KEY] * 2, values=[torch.zeros(2, 8, 4, 4)] * 2, head_channels=4)


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
        (dict(keys=[], values=[]), "at least one, got 0 keys and 0 values"),
        (dict(keys=[KEY]), "got 1 keys and 2 values"),
        (dict(query=torch.zeros(2, 8, 1)), r"query must be \[B, C\], got \(2, 8, 1\)"),
        (dict(keys=[KEY, KEY], head_channels=3), "head_channels=3 with channels=8"),
        (dict(values=[torch.zeros(2, 8, 4, 4), torch.zeros(2, 8, 2, 2)]),
         r"one shape, got values\[0\].shape=\(2, 8, 4, 4\)"),
        (dict(keys=[KEY, torch.zeros(2, 4)]), r"keys\[1\] must be"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, message):
    of_base = change.keys() & {"query", "keys", "values"}
    op, good = (mrla_base, BASE) if of_base else (mrla_light, LIGHT)
    op(*good.values())
    with pytest.raises((ValueError, TypeError), match=message):
        op(*{**good, **change}.values())
