"""Ends of residual blocks as one operation, on the CPU, against plain torch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import gradcheck

from mmrla.ops import (
    BaseGroup,
    BaseWeights,
    LightWeights,
    Norm,
    fused,
    mrla_base_tail,
    mrla_light_tail,
    reference,
    whole_map,
)
from mmrla.ops.verify import Case
from tests.conftest import HALVES, relative_error, stable_id

CPU = torch.device("cpu")
SHAPES = [((2, 24, 7, 7), 8), ((2, 16, 1, 1), 16), ((2, 12, 13, 17), 4), ((3, 8, 1, 5), 1)]
KINDS = [(LightWeights, 1), (BaseWeights, 1), (BaseWeights, 4)]


@pytest.mark.parametrize("batch", list(itertools.product((True, False), repeat=2)), ids=str)
@pytest.mark.parametrize(("kind", "layers"), KINDS, ids=stable_id)
def test_equal_plain_torch(kind, layers, batch):
    """Outputs, running statistics and every gradient, in both layouts and odd shapes."""
    for (shape, head_channels), last in itertools.product(SHAPES, (False, True)):
        case = Case(
            kind, shape, head_channels, torch.float64, CPU, last, batch, last, layers, (3, 5)
        )
        errors = case.errors(fused.light_tail, fused.base_tail)
        assert max(errors.values()) < 1e-9, errors
        if kind is BaseWeights:
            again = case.errors(None, lambda *a: fused.base_tail(*a, recompute=True))
            assert max(again.values()) < 1e-9, again


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("kind", "layers"), KINDS, ids=stable_id)
def test_narrow_dtypes(kind, layers, dtype):
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 3e-2}[dtype]
    for last in (False, True):
        case = Case(kind, (2, 16, 9, 11), 8, dtype, CPU, last, drop=last, layers=layers)
        errors = case.errors(fused.light_tail, fused.base_tail)
        assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("kind", "layers"), KINDS, ids=stable_id)
def test_inference(kind, layers, last):
    """Without a graph: the out norm is part of the factors."""
    wide = [(shape, heads, torch.float64, 1e-9) for shape, heads in SHAPES]
    # The last is large enough that its means are sums of sums.
    for shape, heads, dtype, tolerance in [*wide, ((1, 32, 257, 256), 8, torch.bfloat16, 2e-2)]:
        for drop in (False, True):
            case = Case(kind, shape, heads, dtype, CPU, last, (False, False), drop, layers)
            errors = case.errors(fused.light_tail, fused.base_tail, grad=False)
            assert max(errors.values()) < tolerance, (shape, drop, errors)


def test_a_network_in_bfloat16_alone():
    """Weights and statistics in bfloat16 too, as ``model.bfloat16()`` makes them."""
    case = Case(LightWeights, (2, 16, 9, 11), 8, torch.bfloat16, CPU)
    for tensors in (case.leaves, case.running):
        tensors.update({k: v.bfloat16() for k, v in tensors.items()})
    got = case.run(fused.light_tail, None, False)
    expected = case.run(reference.light_tail_reference, None, True)
    for name, x in expected.items():
        assert got[name].dtype == torch.bfloat16, name
        assert (got[name].double() - x).norm() < 6e-2 * x.norm() + 1e-2, name


def arguments(kind, shape=(2, 4, 5, 3), head_channels=2, batch=(True, True)):
    """Leaves of one tail in float64, by name, and what calls it with them."""
    case = Case(kind, shape, head_channels, torch.float64, CPU, batch=batch)
    leaves = {k: v.clone().requires_grad_() for k, v in case.leaves.items()}

    def call(backend="fused", **changed):
        at = {**leaves, **changed}
        running = [v.clone() for v in case.running.values()]
        norms = [
            Norm(at[f"{n}.weight"], at[f"{n}.bias"], *running[2 * i : 2 * i + 2], batch=b)
            for i, (n, b) in enumerate(zip(("norm", "out_norm"), batch, strict=True))
        ]
        names = ("query", "key", "value", "lambda_t")[: 4 if kind is LightWeights else 3]
        weights = kind(*(at[n] for n in names), head_channels)
        if kind is LightWeights:
            op = mrla_light_tail
            return op(at["z"], at["shortcut"], norms[0], weights, norms[1], backend=backend)
        return mrla_base_tail(
            at["z"], at["shortcut"], norms[0], weights, norms[1],
            group=changed.get("group", BaseGroup()), recompute=changed.get("recompute", False),
            backend=backend,
        )  # fmt: skip

    return leaves, call


@pytest.mark.parametrize("batch", [(True, True), (False, False)], ids=str)
def test_gradcheck(batch):
    for kind in (LightWeights, BaseWeights):
        leaves, call = arguments(kind, (2, 4, 3, 2), batch=batch)

        def run(*tensors, leaves=leaves, call=call):
            out = call(**dict(zip(leaves, tensors, strict=True)))
            return out if torch.is_tensor(out) else (out[0], *out[1].keys, *out[1].values)

        assert gradcheck(run, tuple(leaves.values()))


def test_maps_in_any_layout():
    """Slices, and a shortcut and a gradient that lie in memory otherwise than z."""
    leaves, call = arguments(LightWeights, (3, 6, 7, 8))
    z, s = leaves["z"].detach(), leaves["shortcut"].detach()
    wide = torch.zeros(3, 6, 7, 16, dtype=z.dtype)
    wide[..., ::2] = z
    sliced = wide[..., ::2].requires_grad_()
    last = s.contiguous(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn(3, 6, 8, 7, dtype=z.dtype).transpose(2, 3)
    got = torch.autograd.grad(call(z=sliced, shortcut=last), (sliced, last), grad)
    expected = torch.autograd.grad(call("naive"), (leaves["z"], leaves["shortcut"]), grad)
    for mine, theirs in zip(got, expected, strict=True):
        assert relative_error(mine, theirs) < 1e-9


def test_fresh_memory_is_written_before_it_is_read():
    """Fresh memory is filled with nan while deterministic algorithms are on."""
    if not hasattr(torch.utils, "deterministic"):
        pytest.skip("this torch cannot fill fresh memory")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for kind, layers in KINDS:
            case = Case(kind, (2, 24, 7, 7), 8, torch.float32, CPU, layers=layers)
            for name, x in case.run(fused.light_tail, fused.base_tail, False).items():
                assert torch.isfinite(x).all(), name
    finally:
        torch.use_deterministic_algorithms(False)


def test_large_means_do_not_cancel():
    """Batch statistics and their gradients if the mean is 1000 times the spread."""
    case = Case(LightWeights, (2, 8, 6, 6), 4, torch.float32, CPU)
    case.leaves["z"] += 1e3
    errors = case.errors(fused.light_tail, None)
    assert max(errors.values()) < 1e-3, errors


def test_which_backend_runs(monkeypatch):
    monkeypatch.delenv("MMRLA_BACKEND", raising=False)
    leaves, call = arguments(LightWeights)
    ran = []
    for name, backend in list(mrla_light_tail.backends.items()):
        spy = lambda *a, name=name, fn=backend.fn, **k: (ran.append(name), fn(*a, **k))[1]  # noqa: E731
        patched = type(backend)(name, spy, backend.unsupported_reason)
        monkeypatch.setitem(mrla_light_tail.backends, name, patched)
    call(None)
    call("naive")
    monkeypatch.setenv("MMRLA_BACKEND", "naive")
    call(None)
    call("fused")
    assert ran == ["fused", "naive", "naive", "fused"]
    monkeypatch.delenv("MMRLA_BACKEND")
    # The convolution in front would have given bfloat16.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = leaves["z"].detach().float()
        assert "under autocast" in mrla_light_tail.select(z).reason
    constant = {k: v.detach() for k, v in leaves.items()}
    trace = lambda name: torch.jit.trace(  # noqa: E731
        lambda z: call(name, **{**constant, "z": z}), constant["z"], check_trace=False
    )
    assert "LightTail" not in str(trace(None).graph)
    with pytest.raises(RuntimeError, match="forces 'fused', which cannot run here: torch.jit"):
        trace("fused")


def test_second_derivative_raises():
    for kind in (LightWeights, BaseWeights):
        leaves, call = arguments(kind)
        out = call()
        out = out if torch.is_tensor(out) else out[0]
        (grad,) = torch.autograd.grad(out.sum(), leaves["z"], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated twice"):
            torch.autograd.grad(grad.sum(), leaves["z"])


NO_NORM, MAP, C = Norm(None, None, None, None), torch.zeros(2, 8, 4, 4), torch.zeros(8)
PAIR = torch.zeros(1, 1, 3), torch.zeros(1, 1, 3)
WEIGHTS = LightWeights(*PAIR, torch.zeros(8, 1, 3, 3), C, 4)
GOOD = dict(z=MAP, shortcut=MAP, weights=WEIGHTS, norm=NO_NORM, out_norm=NO_NORM)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(shortcut=MAP[..., :3]), r"shortcut.shape=\(2, 8, 4, 3\) and z.shape"),
        (dict(shortcut=MAP.half()), r"dtype of z, got torch.float16"),
        (dict(norm=NO_NORM._replace(weight=torch.ones(4))), r"norm.weight must be \[8\]"),
        (
            dict(out_norm=NO_NORM._replace(running_mean=C)),
            "running_mean and running_var come togeth",
        ),
        (dict(norm=NO_NORM._replace(batch=False)), "needs running statistics, got none"),
        (dict(drop=torch.ones(3)), r"drop must be \[2\], got \(3,\)"),
        (dict(weights=WEIGHTS._replace(head_channels=3)), "allowed: 1, 2, 4, 8"),
        (dict(weights=WEIGHTS._replace(key=torch.zeros(1, 1, 2))), r"\[1, 1, odd\]"),
        (dict(weights=WEIGHTS._replace(lambda_t=torch.zeros(4))), r"lambda_t must be \[8\]"),
        (dict(z=MAP[:1, :, :1, :1], shortcut=MAP[:1, :, :1, :1]), "more than 1 value"),
        (dict(z=MAP.to("meta")), "one device, got \\['cpu', 'meta'\\]"),
    ],
    ids=range(11),
)
def test_messages(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        mrla_light_tail(**{**GOOD, **change})


def test_messages_of_groups():
    given = GOOD | dict(weights=BaseWeights(*WEIGHTS[:3], 4))
    key, value = torch.zeros(2, 8), MAP
    for group, message in (
        (BaseGroup((key,), (value,), ()), "1 keys, 1 values, 0 links"),
        (
            BaseGroup((key,), (value[:, :4],), (None,)),
            r"keys\[0\] must be \[B, C\] and values\[0\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            mrla_base_tail(**given, group=group)


def test_statistics_of_a_network_without_triton_are_torch_s_own():
    """On a CPU the output of a plain block's part, y, is the plain block's bit for bit."""
    case = Case(LightWeights, (2, 8, 6, 6), 4, torch.float32, CPU)
    z, s = case.leaves["z"], case.leaves["shortcut"]
    norm = Norm(case.leaves["norm.weight"], case.leaves["norm.bias"], None, None)
    y, *_ = whole_map.start(z, s, norm)
    plain = torch.nn.functional.batch_norm(z, None, None, *norm[:2], True)
    assert torch.equal(y, (plain + s).relu())
