"""The layer attentions of the paper against their equations, written as loops over layers."""

from __future__ import annotations

from itertools import pairwise, product
from math import sqrt

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import prune

from mmrla.layers import KCLA, MLA, DLABase, DLALight, DWConv, LinearRLA, MRLABase, MRLALight
from mmrla.ops import linear_rla, mla
from mmrla.ops.linear_rla import feature_map_of
from tests.conftest import relative_error
from tests.reference import convolved, gated, heads, linear_kernel, projected, retrieved
from tests.reference import softmax_kernel as softmax

# B, C, H, W, layers, d_k
SHAPES = [(2, 12, 5, 7, 4, 4), (1, 8, 1, 3, 3, 8), (3, 6, 4, 1, 2, 1), (2, 10, 3, 3, 1, 5)]


def assert_same(got, expected, leaves, floor=1e-3) -> None:
    """Outputs to 1e-12 and gradients of all leaves to 1e-10."""
    got, expected = torch.stack(got), torch.stack(expected)
    assert relative_error(got, expected.detach()) < 1e-12
    grad = torch.randn_like(got)
    mine = torch.autograd.grad(got, leaves, grad)
    # The first lambda of Eq. 8 has nothing to weigh.
    theirs = torch.autograd.grad(expected, leaves, grad, allow_unused=True)
    for a, b in zip(mine, theirs, strict=True):
        b = torch.zeros_like(a) if b is None else b
        # What is zero but for rounding (a lone layer's query) has no scale of its own.
        assert (a - b).abs().max().item() <= 1e-10 * max(b.abs().max().item(), floor)


@pytest.mark.parametrize("options", [{}, dict(projection="fc"), dict(value_conv=False)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [MLA, LinearRLA, MRLABase])
def test_outputs_and_every_gradient(kind, shape, options):
    b, c, height, width, count, d = shape
    layers = [kind(c, head_channels=d, **options).double() for _ in range(count)]
    xs = [torch.randn(b, c, height, width).double().requires_grad_() for _ in layers]
    state, got, expected = None, [], []
    for t, (layer, x) in enumerate(zip(layers, xs, strict=True)):
        # A shortcut would show itself.
        o, state = layer(x, torch.full_like(x, float("nan")), state)
        got.append(o)
        # MLA derives keys and values anew by its own functions; the others reuse what there is.
        makers = [layer] * (t + 1) if kind is MLA else layers[: t + 1]
        keys = [projected(y, m.key.weight) for y, m in zip(xs[: t + 1], makers, strict=True)]
        values = [convolved(y, m.value_weight) for y, m in zip(xs[: t + 1], makers, strict=True)]
        kernel = linear_kernel if kind is LinearRLA else softmax
        expected.append(retrieved(projected(x, layer.query.weight), keys, values, d, kernel))
    assert_same(got, expected, [*xs, *(p for layer in layers for p in layer.parameters())])


def test_mla_with_one_set_of_functions_is_base():
    """Eq. 5: where all f_K^t and f_V^t are the same, deriving them anew changes nothing."""
    layers = [MLA(8, head_channels=2).double() for _ in range(3)]
    bases = [MRLABase(8, head_channels=2).double() for _ in range(3)]
    states = [None, None]
    for layer, base in zip(layers, bases, strict=True):
        layer.load_state_dict(layers[0].state_dict())
        base.load_state_dict(layers[0].state_dict())
        x = torch.randn(2, 8, 5, 4, dtype=torch.float64)
        mine, states[0] = layer(x, x, states[0])
        other, states[1] = base(x, x, states[1])
        assert relative_error(mine, other.detach()) < 1e-12
    assert [x.shape for x in states[0]] == [(2, 8, 5, 4)] * 3


@pytest.mark.parametrize("head_channels", ["all", 4, 1])
def test_state_of_linear_rla_does_not_grow(head_channels):
    layers = [LinearRLA(8, head_channels=head_channels) for _ in range(5)]
    d, state = layers[0].head_channels, None
    for layer in layers:
        _, state = layer(x := torch.randn(2, 8, 3, 4), x, state)
        assert state[0].shape == (2, 8 // d, d, d, 3, 4)
        assert state[1].shape == (2, 8 // d, d)


def test_linear_rla_stays_finite_where_elu_rounds_to_minus_one():
    query, key = (torch.tensor([[-30.0, -40.0]], requires_grad=True) for _ in range(2))
    value = torch.randn(1, 2, 2, 2, requires_grad=True)
    assert (F.elu(query) + 1 == 0).all()
    o, _ = linear_rla(query, key, value, None, 2)
    assert relative_error(o, value.detach()) < 1e-6
    for grad in torch.autograd.grad(o.sum(), (query, key, value)):
        assert grad.isfinite().all()
    x = torch.randn(1000, dtype=torch.float64)
    assert torch.allclose(feature_map_of(x), F.elu(x) + 1, rtol=1e-14)


def test_linear_rla_of_features_far_below_zero_is_finite():
    """Where all of phi underflows there is nothing to retrieve, not 0 / 0."""
    layer = LinearRLA(8, head_channels=4)
    for conv in (layer.query, layer.key):
        torch.nn.init.ones_(conv.weight)
    x = torch.full((1, 8, 3, 3), -6e3, requires_grad=True)
    o, state = layer(x, x, None)
    o, _ = layer(x, x, state)
    o.sum().backward()
    assert not o.any()
    assert x.grad.isfinite().all()
    assert layer.retrieval(x, x, None).scores.isfinite().all()


# MRLA-light: Eq. 7, 8 and the options of Table 4.


def gated_by(layer, x):
    value = convolved(x, layer.value_weight)
    value = F.gelu(value) if layer.value_act == "gelu" else value
    query, key = projected(x, layer.query.weight), projected(x, layer.key.weight)
    return gated(query, key, value, layer.head_channels)


@pytest.mark.parametrize("value_act", [None, "gelu"])
@pytest.mark.parametrize("recurrence", ["shortcut", "output", None])
@pytest.mark.parametrize(
    "options",
    [
        dict(head_channels=1),
        dict(head_channels="all"),
        dict(head_channels=4, projection="fc"),
        dict(head_channels=4, value_conv=False),
        dict(head_channels=4, fixed_lambda=1),
        dict(head_channels=2, fixed_lambda=0.5, projection="fc", value_conv=False),
    ],
)
def test_light_with_the_options_of_its_ablations(options, recurrence, value_act):
    """Outputs and gradients of three layers, at an odd size."""
    if recurrence is None:
        options = {k: v for k, v in options.items() if k != "fixed_lambda"}
    make = dict(recurrence=recurrence, value_act=value_act, **options)
    layers = [MRLALight(8, **make).double() for _ in range(3)]
    xs, shortcuts = torch.randn(2, 3, 2, 8, 5, 3, dtype=torch.float64)
    leaves = [xs.requires_grad_(), *(p for layer in layers for p in layer.parameters())]
    if recurrence == "shortcut":
        leaves.append(shortcuts.requires_grad_())
    state, got, expected = None, [], []
    for layer, x, shortcut in zip(layers, xs, shortcuts, strict=True):
        o, state = layer(x, shortcut, state)
        got.append(o)
        previous = shortcut if recurrence == "shortcut" else expected[-1] if expected else None
        o = gated_by(layer, x)
        if recurrence is not None and previous is not None:
            fixed = options.get("fixed_lambda")
            o = o + (layer.lambda_t[:, None, None] if fixed is None else fixed) * previous
        expected.append(o)
    assert_same(got, expected, leaves)
    assert (state is None) == (recurrence != "output")


def test_what_is_fixed_or_absent_is_no_parameter():
    def names(**options):
        layer = MRLALight(8, head_channels=4, **options)
        assert set(layer.state_dict()) == {k for k, _ in layer.named_parameters()}
        return set(layer.state_dict())

    whole = {"lambda_t", "query.weight", "key.weight", "value.weight"}
    assert names() == names(recurrence="output") == names(projection="fc") == whole
    assert names(fixed_lambda=1) == names(recurrence=None) == whole - {"lambda_t"}
    assert names(value_conv=False) == whole - {"value.weight"}
    fc = MRLALight(8, head_channels=4, projection="fc")
    assert fc.query.weight.shape == fc.key.weight.shape == (8, 8)


@pytest.mark.parametrize(("d", "exact"), [(4, True), (1, True), (4, False)])
def test_eq_7_is_exact_where_queries_of_a_head_are_proportional(d, exact, monkeypatch):
    """MRLA-light with lambda = c is RLA, if q_t = c_h * q_{t-1} in each head; with d_k = 1, always.

    Without what makes weights of the logits: the sigmoid, as in the paper's derivation.
    """
    monkeypatch.setattr(torch, "sigmoid", lambda x: x * sqrt(d))
    make = dict(recurrence="output", projection="fc")
    layers = [MRLALight(8, d, **make).double() for _ in range(4)]
    for before, layer in pairwise(layers):
        if d > 1 and exact:
            ratios = torch.randn(8 // d, dtype=torch.float64).repeat_interleave(d)
            layer.query.weight.data = ratios[:, None] * before.query.weight.data
    # One image, because the ratio of queries may differ from image to image when d_k = 1; and maps
    # that differ in all but their means.
    xs = torch.randn(4, 1, 8, 5, 6, dtype=torch.float64)
    xs = xs - xs.mean((3, 4), keepdim=True) + xs[:1].mean((3, 4), keepdim=True)
    pairs = list(zip(layers, xs, strict=True))
    queries, keys = (
        [projected(x, getattr(layer, name).weight).detach() for layer, x in pairs]
        for name in ("query", "key")
    )
    state, errors = None, []
    for t, (layer, x) in enumerate(pairs):
        if t:
            layer.lambda_t.data = (queries[t] / queries[t - 1])[0]
        o, state = layer(x, x, state)
        # Eq. 6 without softmax and scale.
        logits = [(heads(queries[t], d) * heads(key, d)).sum(2) for key in keys[: t + 1]]
        expected = sum(
            logit.repeat_interleave(d, 1)[..., None, None] * convolved(y, other.value.weight)
            for logit, (other, y) in zip(logits, pairs[: t + 1], strict=True)
        )
        errors.append(relative_error(o, expected.detach()))
    assert errors[0] < 1e-9
    assert max(errors) < 1e-9 if exact else min(errors[1:]) > 1e-2


def test_eq_8_is_a_weighted_sum_over_all_earlier_layers():
    """``O_t = sum_l beta_l * gate * V_{t-l}``, with beta_l = lambda_t * ... * lambda_{t-l+1}.

    For every t, each d_k of Table 4 (f), and through its Jacobian: the weight with which the value
    of layer s enters O_t.
    """
    for d in (1, 2, "all"):
        layers = [MRLALight(4, d, recurrence="output").double() for _ in range(4)]
        xs = torch.randn(4, 2, 4, 3, 5, dtype=torch.float64)
        state = None
        for t, (layer, x) in enumerate(zip(layers, xs, strict=True)):
            o, state = layer(x, x, state)
            expected = torch.zeros_like(o)
            for ell in range(t + 1):
                beta = torch.ones(4, dtype=torch.float64)
                for later in layers[t - ell + 1 : t + 1]:
                    beta = beta * later.lambda_t
                expected = expected + beta[:, None, None] * gated_by(layers[t - ell], xs[t - ell])
            assert relative_error(o, expected.detach()) < 1e-12
            if t:
                first = layers[0].value.weight
                mine = torch.autograd.grad(o.sum(), first, retain_graph=True)[0]
                theirs = torch.autograd.grad(expected.sum(), first)[0]
                assert relative_error(mine, theirs) < 1e-11


@pytest.mark.parametrize("cls", [MRLALight, MRLABase, MLA, LinearRLA, DLALight, DLABase, KCLA])
def test_hooks_of_the_parts_run(cls):
    """``torch.nn.utils.prune`` makes weights in hooks: after loading, stale ones are left else."""
    first, second = cls(16, 8), cls(16, 8)
    for layer, name in product((first, second), ("query", "key", "value")):
        prune.random_unstructured(getattr(layer, name), "weight", 1)
    second.load_state_dict(first.state_dict())
    maps = torch.randn(2, 2, 16, 5, 6)
    for layer in (first, second):
        _, layer.state = layer(*maps, None)
    expected, got = (layer(*maps.flip(0), layer.state)[0] for layer in (first, second))
    assert torch.equal(got, expected)


def test_dwconv_is_the_value_alone():
    layer = DWConv(6).double()
    x = torch.randn(2, 6, 5, 3, dtype=torch.float64, requires_grad=True)
    o, state = layer(x, torch.full_like(x, float("nan")), None)
    assert state is None
    assert_same([o], [convolved(x, layer.value.weight)], (x, layer.value.weight))


def test_initialisation():
    """Value: Kaiming normal, fan_out; lambda: N(0, 1); Conv1D: torch's default."""
    layer = MRLALight(1024, head_channels=32)
    assert layer.value.weight.std().item() == pytest.approx((2 / (1024 * 9)) ** 0.5, rel=0.05)
    assert layer.lambda_t.std().item() == pytest.approx(1, rel=0.1)
    assert abs(layer.lambda_t.mean().item()) < 0.1
    for conv in (layer.query, layer.key):
        assert conv.weight.shape == (1, 1, 5)
        assert conv.bias is None
        assert conv.weight.abs().max() <= 5**-0.5


PAIR, MAP = [torch.zeros(1, 1, 3)] * 2, torch.zeros(1, 4, 2, 2)
GROWN = torch.zeros(1, 2, 2, 2, 2, 2), torch.zeros(1, 4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        *(
            (lambda cls=cls, more=more: cls(64, **more), error, message)
            for cls in (MRLALight, MRLABase)
            for more, error, message in (
                (dict(head_channels=48), ValueError, "=48 with channels=64; allowed: 1, 2, 4, 8"),
                (dict(head_channels=8.0), TypeError, "head_channels must be an int, got 8.0"),
                (dict(kernel_size=4), ValueError, "kernel_size=4"),
            )
        ),
        (lambda: MRLALight(64, recurrence="input"), ValueError,
         r"one of \('shortcut', 'output', None\), got 'input'"),
        (lambda: MLA(8, head_channels="one"), TypeError, "an int or 'all', got 'one'"),
        (lambda: LinearRLA(8, head_channels=3), ValueError, "head_channels=3 with channels=8"),
        (lambda: MRLABase(8, 4, projection="mlp"), ValueError, r"'fc'\), got 'mlp'"),
        (lambda: MLA(8, 4, kernel_size=3, projection="fc"), ValueError, "no kernel_size, got"),
        (lambda: MRLALight(8, 4, value_conv="no"), TypeError, "must be a bool, got 'no'"),
        (lambda: MRLALight(8, 4, fixed_lambda="1"), TypeError, "fixed_lambda must be .*got '1'"),
        (lambda: MRLALight(8, 4, fixed_lambda=1, recurrence=None), ValueError,
         "fixed_lambda=1 with recurrence=None"),
        (lambda: mla([], *PAIR, None, 1), ValueError, "at least one"),
        (lambda: mla([MAP, MAP[:, :, :1]], *PAIR, None, 1), ValueError,
         r"features\[0\].shape=\(1, 4, 2, 2\)"),
        (lambda: mla([MAP], *[torch.zeros(4, 3)] * 2, None, 1), ValueError,
         r"query_weight must be .*\[4, 4\].*got shape \(4, 3\)"),
        (lambda: linear_rla(*torch.zeros(2, 1, 4), torch.zeros(1, 6, 2, 2), None, 2), ValueError,
         r"query must be \[B, C\].*got \(1, 4\)"),
        (lambda: linear_rla(*torch.zeros(2, 1, 4), MAP, GROWN, 2), ValueError,
         r"Z of the state must be \[1, 2, 2\]"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
