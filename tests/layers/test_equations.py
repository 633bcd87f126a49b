"""The layer attentions of the paper against their equations, written as loops over layers."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from mmrla.layers import MLA, DWConv, LinearRLA, MRLABase, MRLALight
from mmrla.ops import linear_rla, mla
from mmrla.ops.linear_rla import feature_map_of
from tests.conftest import relative_error

# B, C, H, W, layers, d_k
SHAPES = [(2, 12, 5, 7, 4, 4), (1, 8, 1, 3, 3, 8), (3, 6, 4, 1, 2, 1), (2, 10, 3, 3, 1, 5)]


def projected(x, weight):
    """A Conv1D or a fully connected layer on the mean over pixels, one output at a time."""
    summary = x.sum((2, 3)) / x[0, 0].numel()
    if weight.dim() == 2:
        return torch.stack([(summary * row).sum(1) for row in weight], 1)
    half = weight.numel() // 2
    framed = F.pad(summary, (half, half))
    taps = range(weight.numel())
    return sum(weight[0, 0, i] * framed[:, i : i + x.shape[1]] for i in taps)


def convolved(x, weight):
    if weight is None:
        return x
    framed, (h, w) = F.pad(x, (1, 1, 1, 1)), x.shape[2:]
    return sum(
        weight[:, 0, i, j][:, None, None] * framed[:, :, i : i + h, j : j + w]
        for i in range(3)
        for j in range(3)
    )


def head(x, h, d):
    return x[:, h * d : (h + 1) * d]


def weighted(layers, d, weight_of):
    """``o_t`` of the last of ``layers``, [(query, key, value)], head by head (Eq. 9)."""
    query, parts = layers[-1][0], []
    for h in range(query.shape[1] // d):
        weights = [weight_of(head(query, h, d), head(key, h, d)) for _, key, _ in layers]
        total = sum(weights)
        parts.append(
            sum(
                (weight / total)[:, None, None, None] * head(value, h, d)
                for weight, (_, _, value) in zip(weights, layers, strict=True)
            )
        )
    return torch.cat(parts, 1)


def phi(x):
    return torch.where(x > 0, x + 1, x.exp())


def softmax_kernel(q, k):
    return torch.exp((q * k).sum(1) / sqrt(q.shape[1]))


def linear_kernel(q, k):
    return (phi(q) * phi(k)).sum(1)


def retrieved(kind, weights, xs, d):
    """``o_1 ... o_T`` from ``weights`` [(query, key, value)] of the layers."""
    outs = []
    for t, (query_weight, *_) in enumerate(weights):
        query = projected(xs[t], query_weight)
        layers = []
        for s in range(t + 1):
            # MLA: layer t's own functions; the others reuse what layer s made.
            _, k_weight, v_weight = weights[t] if kind is MLA else weights[s]
            layers.append((query, projected(xs[s], k_weight), convolved(xs[s], v_weight)))
        kernel = linear_kernel if kind is LinearRLA else softmax_kernel
        outs.append(weighted(layers, d, kernel))
    return outs


@pytest.mark.parametrize("options", [{}, dict(projection="fc"), dict(value_conv=False)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [MLA, LinearRLA, MRLABase])
def test_outputs_and_every_gradient(kind, shape, options):
    b, c, height, width, count, d = shape
    layers = [kind(c, head_channels=d, **options).double() for _ in range(count)]
    xs = torch.randn(count, b, c, height, width, dtype=torch.float64)
    grads_out = torch.randn_like(xs)
    ours, theirs = (xs.clone().requires_grad_() for _ in range(2))
    state, got = None, []
    for layer, x in zip(layers, ours, strict=True):
        # A shortcut would show itself.
        o, state = layer(x, torch.full_like(x, float("nan")), state)
        got.append(o)
    weights = [
        tuple(
            None if w is None else w.detach().clone().requires_grad_()
            for w in (layer.query.weight, layer.key.weight, layer.value_weight)
        )
        for layer in layers
    ]
    expected = retrieved(kind, weights, theirs, d)
    assert relative_error(torch.stack(got), torch.stack(expected).detach()) < 1e-12
    torch.stack(got).mul(grads_out).sum().backward()
    torch.stack(expected).mul(grads_out).sum().backward()
    assert relative_error(ours.grad, theirs.grad) < 1e-10
    for layer, copies in zip(layers, weights, strict=True):
        for mine, other in zip(
            (layer.query.weight, layer.key.weight, layer.value_weight), copies, strict=True
        ):
            if other is not None:
                # What is zero but for rounding (a lone layer's query) has no scale of its own.
                scale = max(other.grad.abs().max().item(), 1e-3)
                assert (mine.grad - other.grad).abs().max().item() / scale < 1e-10


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
def test_linear_rla_is_a_mean_of_values_whose_state_does_not_grow(head_channels):
    layers = [LinearRLA(8, head_channels=head_channels) for _ in range(5)]
    d, state, values = layers[0].head_channels, None, []
    for layer in layers:
        x = torch.randn(2, 8, 3, 4)
        o, state = layer(x, x, state)
        values.append(layer.value(x))
        assert state[0].shape == (2, 8 // d, d, d, 3, 4)
        assert state[1].shape == (2, 8 // d, d)
        assert (o <= torch.stack(values).amax(0) + 1e-5).all()
        assert (o >= torch.stack(values).amin(0) - 1e-5).all()


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


def test_gradcheck_of_the_operations():
    def double(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    def step(*args):
        o, (u, z) = linear_rla(*args, 2)
        return o, u, z

    state = (double(1, 2, 2, 2, 2, 3), torch.rand(1, 2, 2, dtype=torch.float64) + 0.5)
    assert gradcheck(
        lambda q, k, v, u: step(q, k, v, (u, state[1])),
        (double(1, 4), double(1, 4), double(1, 4, 2, 3), state[0]),
    )
    args = (*(double(1, 1, 3) for _ in range(2)), double(4, 1, 3, 3))
    xs = [double(1, 4, 2, 3) for _ in range(3)]
    assert gradcheck(lambda *a: mla(a[3:], *a[:3], 2), (*args, *xs))


# MRLA-light: Eq. 7, 8 and the options of Table 4.


def gated(layer, x):
    """``sigmoid(<q, k>_head / sqrt(d_k)) * V`` head by head."""
    query, key = projected(x, layer.query.weight), projected(x, layer.key.weight)
    value, d = convolved(x, layer.value_weight), layer.head_channels
    if layer.value_act == "gelu":
        value = F.gelu(value)
    parts = []
    for h in range(x.shape[1] // d):
        logit = (head(query, h, d) * head(key, h, d)).sum(1) / sqrt(d)
        parts.append((1 / (1 + torch.exp(-logit)))[:, None, None, None] * head(value, h, d))
    return torch.cat(parts, 1)


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
    xs.requires_grad_()
    shortcuts.requires_grad_()
    leaves = [xs, *(p for layer in layers for p in layer.parameters())]
    if recurrence == "shortcut":
        leaves.append(shortcuts)
    state, got, expected = None, [], []
    for layer, x, shortcut in zip(layers, xs, shortcuts, strict=True):
        o, state = layer(x, shortcut, state)
        got.append(o)
        previous = shortcut if recurrence == "shortcut" else expected[-1] if expected else None
        o = gated(layer, x)
        if recurrence is not None and previous is not None:
            lambda_t = options.get("fixed_lambda", layer.lambda_t)
            if isinstance(lambda_t, torch.Tensor):
                lambda_t = lambda_t[:, None, None]
            o = o + lambda_t * previous
        expected.append(o)
    got, expected = torch.stack(got), torch.stack(expected)
    assert relative_error(got, expected.detach()) < 1e-12
    grad = torch.randn_like(got)
    mine = torch.autograd.grad(got, leaves, grad)
    # The first lambda of Eq. 8 has nothing to weigh.
    theirs = torch.autograd.grad(expected, leaves, grad, allow_unused=True)
    for a, b in zip(mine, theirs, strict=True):
        if b is None:
            assert not a.any()
        else:
            assert (a - b).abs().max().item() <= 1e-10 * max(b.abs().max().item(), 1e-3)
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


def attention_sum(queries, keys, values, t, d):
    """Eq. 6 without softmax and scale: ``sum_{s<=t} <q_t, k_s>_head * V_s``."""
    logits = (queries[t] * keys[: t + 1]).unflatten(-1, (-1, d)).sum(-1).repeat_interleave(d, -1)
    return (logits[..., None, None] * values[: t + 1]).sum(0)


@pytest.mark.parametrize(("d", "exact"), [(4, True), (1, True), (4, False)])
def test_eq_7_is_exact_where_queries_of_a_head_are_proportional(d, exact, monkeypatch):
    """MRLA-light with lambda = c is RLA, if q_t = c_h * q_{t-1} in each head; with d_k = 1, always.

    Without what makes weights of the logits: the sigmoid, as in the paper's derivation.
    """
    monkeypatch.setattr(torch, "sigmoid", lambda x: x * sqrt(d))
    channels, count = 8, 4
    layers = [
        MRLALight(channels, d, recurrence="output", projection="fc").double() for _ in range(count)
    ]
    for t in range(1, count):
        if d > 1 and exact:
            ratios = torch.randn(channels // d, dtype=torch.float64).repeat_interleave(d)
            layers[t].query.weight.data = ratios[:, None] * layers[t - 1].query.weight.data
    # One image, because the ratio of queries may differ from image to image when d_k = 1; and maps
    # that differ in all but their means.
    xs = torch.randn(count, 1, channels, 5, 6, dtype=torch.float64)
    xs = xs - xs.mean((3, 4), keepdim=True) + xs[:1].mean((3, 4), keepdim=True)
    queries = torch.stack(
        [projected(x, layer.query.weight) for layer, x in zip(layers, xs, strict=True)]
    )
    keys = torch.stack(
        [projected(x, layer.key.weight) for layer, x in zip(layers, xs, strict=True)]
    )
    values = torch.stack([layer.value(x) for layer, x in zip(layers, xs, strict=True)])
    state, errors = None, []
    for t, (layer, x) in enumerate(zip(layers, xs, strict=True)):
        if t:
            layer.lambda_t.data = (queries[t] / queries[t - 1])[0].detach()
        o, state = layer(x, x, state)
        errors.append(relative_error(o, attention_sum(queries, keys, values, t, d).detach()))
    if exact:
        assert max(errors) < 1e-9
    else:
        assert errors[0] < 1e-9
        assert min(errors[1:]) > 1e-2


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
                expected = expected + beta[:, None, None] * gated(layers[t - ell], xs[t - ell])
            assert relative_error(o, expected.detach()) < 1e-12
            if t:
                first = layers[0].value.weight
                mine = torch.autograd.grad(o.sum(), first, retain_graph=True)[0]
                theirs = torch.autograd.grad(expected.sum(), first)[0]
                assert relative_error(mine, theirs) < 1e-11


def test_dwconv_is_the_value_alone():
    layer = DWConv(6).double()
    x = torch.randn(2, 6, 5, 3, dtype=torch.float64, requires_grad=True)
    o, state = layer(x, torch.full_like(x, float("nan")), None)
    expected = convolved(x, layer.value.weight)
    assert state is None
    assert relative_error(o, expected.detach()) < 1e-12
    grad = torch.randn_like(o)
    leaves = (x, layer.value.weight)
    mine = torch.autograd.grad(o, leaves, grad)
    theirs = torch.autograd.grad(expected, leaves, grad)
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MLA(8, head_channels="one"), TypeError, "an int or 'all', got 'one'"),
        (lambda: LinearRLA(8, head_channels=3), ValueError, "head_channels=3 with channels=8"),
        (lambda: MRLABase(8, 4, projection="mlp"), ValueError, r"'fc'\), got 'mlp'"),
        (lambda: MLA(8, 4, kernel_size=3, projection="fc"), ValueError, "no kernel_size, got"),
        (lambda: MRLALight(8, 4, value_conv="no"), TypeError, "must be a bool, got 'no'"),
        (lambda: MRLALight(8, 4, fixed_lambda="1"), TypeError, "fixed_lambda must be .*got '1'"),
        (
            lambda: MRLALight(8, 4, fixed_lambda=1, recurrence=None),
            ValueError,
            "fixed_lambda=1 with recurrence=None",
        ),
        (lambda: mla([], *[torch.zeros(1, 1, 3)] * 2, None, 1), ValueError, "at least one"),
        (
            lambda: mla(
                [torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 1, 2)],
                *[torch.zeros(1, 1, 3)] * 2, None, 1,
            ),
            ValueError,
            r"features\[0\].shape=\(1, 4, 2, 2\)",
        ),
        (
            lambda: mla([torch.zeros(1, 4, 2, 2)], *[torch.zeros(4, 3)] * 2, None, 1),
            ValueError,
            r"query_weight must be .*\[4, 4\].*got shape \(4, 3\)",
        ),
        (
            lambda: linear_rla(*torch.zeros(2, 1, 4), torch.zeros(1, 6, 2, 2), None, 2),
            ValueError,
            r"query must be \[B, C\].*got \(1, 4\)",
        ),
        (
            lambda: linear_rla(
                *torch.zeros(2, 1, 4), torch.zeros(1, 4, 2, 2),
                (torch.zeros(1, 2, 2, 2, 2, 2), torch.zeros(1, 4)), 2,
            ),
            ValueError,
            r"Z of the state must be \[1, 2, 2\]",
        ),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


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
