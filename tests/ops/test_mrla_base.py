"""MRLA-base's retrieval against its equation, written as loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from mmrla.ops import mrla_base
from tests.conftest import relative_error


def arguments(layers, b, c, h, w):
    def make(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    return (
        make(b, c),
        [make(b, c) for _ in range(layers)],
        [make(b, c, h, w) for _ in range(layers)],
    )


def reference(query, keys, values, head_channels):
    """Eq. 9, one sample and one head at a time."""
    out = torch.zeros_like(values[0])
    for sample in range(query.shape[0]):
        for head in range(0, query.shape[1], head_channels):
            part = slice(head, head + head_channels)
            logits = [(query[sample, part] * k[sample, part]).sum() for k in keys]
            exps = [torch.exp(logit / math.sqrt(head_channels)) for logit in logits]
            for exp, value in zip(exps, values, strict=True):
                out[sample, part] = out[sample, part] + exp / sum(exps) * value[sample, part]
    return out


@pytest.mark.parametrize(
    "shape", [(1, 2, 8, 3, 4, 4), (3, 2, 24, 7, 7, 8), (20, 1, 6, 1, 1, 3), (4, 3, 4, 13, 2, 1)]
)
def test_output_and_every_gradient(shape):
    *dims, head_channels = shape
    query, keys, values = arguments(*dims)
    leaves = [query, *keys, *values]
    out = mrla_base(query, keys, values, head_channels)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, grad)
    expected_out = reference(query, keys, values, head_channels)
    expected = torch.autograd.grad(expected_out, leaves, grad)
    assert relative_error(out, expected_out.detach()) < 1e-12
    for mine, theirs in zip(got, expected, strict=True):
        # With one layer the softmax is 1 and nothing flows to query and key.
        assert (mine - theirs).abs().max() < 1e-11


def test_gradcheck():
    query, keys, values = arguments(3, 2, 4, 2, 3)
    assert gradcheck(
        lambda q, *kv: mrla_base(q, kv[:3], kv[3:], 2),
        (query, *keys, *values),
    )


def test_memory_kept_for_backward_does_not_copy_values():
    """Saved storages are the values themselves: linear in depth over a group, not quadratic."""
    query, keys, values = arguments(8, 2, 16, 9, 9)
    given = {t.untyped_storage().data_ptr() for t in values}
    extra = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in given:
            extra[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        mrla_base(query, keys, values, 4)
    assert sum(extra.values()) < values[0].untyped_storage().nbytes() / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(keys=[], values=[]), "at least one, got 0 keys and 0 values"),
        (dict(keys=[torch.zeros(2, 8)]), "got 1 keys and 2 values"),
        (dict(query=torch.zeros(2, 8, 1)), r"query must be \[B, C\], got \(2, 8, 1\)"),
        (dict(head_channels=3), "head_channels=3 with channels=8"),
        (
            dict(values=[torch.zeros(2, 8, 4, 4), torch.zeros(2, 8, 2, 2)]),
            r"one shape, got values\[0\].shape=\(2, 8, 4, 4\)",
        ),
        (dict(keys=[torch.zeros(2, 8), torch.zeros(2, 4)]), r"keys\[1\] must be"),
    ],
)
def test_bad_arguments_are_named(change, message):
    good = dict(
        query=torch.zeros(2, 8),
        keys=[torch.zeros(2, 8)] * 2,
        values=[torch.zeros(2, 8, 4, 4)] * 2,
        head_channels=4,
    )
    mrla_base(*good.values())
    with pytest.raises(ValueError, match=message):
        mrla_base(*{**good, **change}.values())
