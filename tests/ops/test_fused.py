"""The fused operations on the CPU, against naive."""

from __future__ import annotations

import pytest
import torch
from mmrla.ops.mrla_base import fused as base_fused
from mmrla.ops.mrla_light import fused as light_fused
from mmrla.ops.query_key import query_key_of
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from mmrla.ops import (
    BatchNorm,
    custom_op,
    mrla_base,
    mrla_base_tail,
    mrla_light,
    mrla_light_tail,
    passes,
)
from tests.conftest import stable_id
from tests.ops.fused_cases import (
    LAYOUTS,
    SHAPES,
    Tail,
    base_args,
    close,
    feature_map,
    gradients,
    light_args,
)

HALVES = [torch.bfloat16, torch.float16]


def tensors(args):
    return [a for a in args if isinstance(a, torch.Tensor)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("previous", "value_act"), [(True, None), (False, None), (True, "gelu")])
def test_light(shape, layout, previous, value_act):
    *dims, head_channels = shape
    args = light_args(dims, head_channels, layout, previous=previous)
    outs = [mrla_light(*args, value_act, backend=b) for b in ("fused", "naive")]
    close(outs[:1], outs[1:], 1e-12)
    close(*(gradients([o], tensors(args)) for o in outs), 1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, *SHAPES[0]), (20, 1, 12, 13, 17, 4), (1, *SHAPES[1])])
def test_base(shape, layout):
    layers, *dims, head_channels = shape
    query, keys, values = base_args(layers, dims, layout)
    outs = [mrla_base(query, keys, values, head_channels, backend=b) for b in ("fused", "naive")]
    close(outs[:1], outs[1:], 1e-12)
    close(*(gradients([o], [query, *keys, *values]) for o in outs), 1e-10)


TAILS = [
    *((kind, SHAPES[0], layout, {}) for kind in ("light", "base") for layout in LAYOUTS),
    *(
        (kind, shape, "nchw", dict(running=running, scale=True))
        for kind in ("light", "base")
        for shape, running in [
            (SHAPES[1], (True, True)),
            (SHAPES[2], (False, True)),
            (SHAPES[3], (True, False)),
        ]
    ),
    ("base", SHAPES[2], "channels_last", dict(layers=20)),
    ("base", SHAPES[2], "nchw", dict(layers=1)),
    *(
        (kind, SHAPES[0], layout, dict(running=(False, True), scale=scale, layers=10))
        for kind in ("light", "base")
        for layout in LAYOUTS
        for scale in (False, True)
    ),
]


@pytest.mark.parametrize(("kind", "shape", "layout", "kwargs"), TAILS, ids=stable_id)
def test_tail(kind, shape, layout, kwargs):
    *dims, head_channels = shape
    tail = Tail(kind, dims, head_channels, layout, **kwargs)
    found = [tail.run(b) for b in ("fused", "naive")]
    close(*(outs + statistics for outs, statistics in found), 1e-12)
    close(*(gradients(outs, tail.leaves) for outs, _ in found), 1e-9)


@pytest.mark.parametrize("kind", ["light", "base"])
def test_a_frozen_norm_takes_no_pass_of_its_own(kind, monkeypatch):
    def forbidden(*args):
        raise AssertionError("the norm has a pass of its own")

    monkeypatch.setattr(passes, "add_norm_", forbidden)
    Tail(kind, (2, 8, 4, 4), 4, running=(False, True)).run("fused")
    with pytest.raises(AssertionError, match="pass of its own"):
        Tail(kind, (2, 8, 4, 4), 4).run("fused")


def test_query_and_key_keep_no_memory_of_each_other():
    """Also what fake kernels say: strides and storages of their own."""
    for found in query_key_of(torch.randn(2, 8), torch.randn(1, 1, 3), torch.randn(1, 1, 5)):
        assert found.is_contiguous()
        assert found.untyped_storage().nbytes() == found.numel() * found.element_size()


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision(dtype):
    """Against naive in float64 on the same numbers; accumulation in float32 shows in sums."""
    if dtype == torch.float16 and torch.__version__.startswith("2.1."):
        pytest.skip("torch 2.1 has no batch norm for float16 on the CPU")
    shape, head_channels = (2, 16, 9, 11), 8
    args = light_args(shape, head_channels, dtype=dtype)
    wide = [a.detach().double().requires_grad_() if torch.is_tensor(a) else a for a in args]
    out, expected = mrla_light(*args, backend="fused"), mrla_light(*wide, backend="naive")
    assert out.dtype == dtype
    close([out.double()], [expected], 1e-2)
    grads = gradients([out], tensors(args)), gradients([expected], tensors(wide))
    assert all(g.dtype == dtype for g in grads[0])
    close([g.double() for g in grads[0]], grads[1], 2e-2)
    for kind in ("light", "base"):
        tail = Tail(kind, shape, head_channels, dtype=dtype)
        outs, _ = tail.run("fused")
        wide = [leaf.detach().double().requires_grad_() for leaf in tail.leaves]
        expected, _ = tail.run("naive", wide)
        close([o.double() for o in outs], expected, 2e-2)
        # Rounding moves a few values across the ReLU's zero, so not the largest difference.
        got, expected = gradients(outs, tail.leaves), gradients(expected, wide)
        for mine, theirs in zip(got, expected, strict=True):
            assert (mine.double() - theirs).norm() < 5e-2 * theirs.norm() + 1e-2


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast(dtype):
    if dtype == torch.float16 and torch.__version__.startswith("2.1."):
        pytest.skip("this torch has no float16 autocast on the CPU")
    args = light_args((2, 16, 9, 11), 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        outs = [mrla_light(*args, backend=b) for b in ("fused", "naive")]
        tail = Tail("light", (2, 16, 5, 5), 8, dtype=torch.float32)
        # The convolution in front would have given dtype: in float32 the tail is not for fused.
        assert mrla_light_tail.select(tail.maps[0]).backend.name == "naive"
    assert outs[0].dtype == dtype
    close(outs[:1], outs[1:], 2e-2)
    close(*(gradients([o], tensors(args)) for o in outs), 4e-2)


def test_gradcheck():
    args = light_args((2, 4, 3, 2), 2)
    for value_act in (None, "gelu"):
        leaves = tensors(args)
        run = lambda *a: mrla_light(*a, 2, value_act, backend="fused")  # noqa: B023, E731
        assert gradcheck(run, leaves)
    query, keys, values = base_args(3, (2, 4, 2, 3))
    assert gradcheck(
        lambda q, *kv: mrla_base(q, kv[:3], kv[3:], 2, backend="fused"), (query, *keys, *values)
    )
    for kind in ("light", "base"):
        for running in ((False, False), (True, True)):
            tail = Tail(kind, (2, 4, 3, 2), 2, running=running, scale=True)
            assert gradcheck(lambda *leaves: tail.run("fused", leaves)[0], tail.leaves)  # noqa: B023


def test_fresh_memory_is_written_before_it_is_read():
    """Fresh memory is filled with nan while deterministic algorithms are on."""
    if not hasattr(torch.utils, "deterministic"):
        pytest.skip("this torch cannot fill fresh memory")
    cases = []
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        for layout in ("nchw", "channels_last"):
            for value_act in (None, "gelu"):
                args = light_args((2, 24, 7, 7), 8, layout)
                cases.append(([mrla_light(*args, value_act, backend="fused")], tensors(args)))
            query, keys, values = base_args(4, (2, 24, 7, 7), layout)
            out = mrla_base(query, keys, values, 8, backend="fused")
            cases.append(([out], [query, *keys, *values]))
            for kind in ("light", "base"):
                tail = Tail(kind, (2, 24, 7, 7), 8, layout, scale=True)
                cases.append((tail.run("fused")[0], tail.leaves))
        for outs, leaves in cases:
            for t in (*outs, *gradients(outs, leaves)):
                assert torch.isfinite(t).all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_large_means_do_not_cancel():
    """Batch statistics and their gradients where the mean is 1000 times the spread."""
    tail = Tail("light", (2, 8, 6, 6), 4, dtype=torch.float32)
    with torch.no_grad():
        tail.maps[0].add_(1e3)
    outs, statistics = tail.run("fused")
    wide = [leaf.detach().double().requires_grad_() for leaf in tail.leaves]
    expected, expected_statistics = tail.run("naive", wide)
    close([s.double() for s in statistics], expected_statistics, 1e-4)
    close([o.double() for o in outs], expected, 1e-3)


@pytest.mark.parametrize("op", [mrla_light, mrla_base, mrla_light_tail, mrla_base_tail])
def test_spy_on_the_backend(op, monkeypatch):
    monkeypatch.delenv("MMRLA_BACKEND", raising=False)
    ran = []

    def spy(name, fn):
        return lambda *a, **k: (ran.append(name), fn(*a, **k))[1]

    for name, backend in list(op.backends.items()):
        patched = type(backend)(name, spy(name, backend.fn), backend.why_not)
        monkeypatch.setitem(op.backends, name, patched)
    if op is mrla_light:
        run = lambda b: op(*light_args((1, 4, 3, 3), 2), backend=b)  # noqa: E731
    elif op is mrla_base:
        run = lambda b: op(*base_args(2, (1, 4, 3, 3)), 2, backend=b)  # noqa: E731
    else:
        run = Tail("light" if op is mrla_light_tail else "base", (1, 4, 3, 3), 2).run
    run(None)
    run("naive")
    monkeypatch.setenv("MMRLA_BACKEND", "naive")
    run(None)
    run("fused")
    assert ran == ["fused", "naive", "naive", "fused"]


def test_tracing_takes_naive_and_refuses_a_forced_fused():
    args = light_args((1, 4, 3, 3), 2, dtype=torch.float32)
    args = [a.detach() if torch.is_tensor(a) else a for a in args]

    def run(backend):
        return torch.jit.trace(lambda x: mrla_light(x, *args[1:], backend=backend), args[0])

    assert "mmrla::" not in str(run(None).graph)
    with pytest.raises(RuntimeError, match="forces 'fused', which cannot run here: torch.jit"):
        run("fused")


def test_second_derivative_raises():
    args = light_args((1, 4, 3, 3), 2)
    (grad,) = torch.autograd.grad(mrla_light(*args).sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="light_backward"):
        torch.autograd.grad(grad.sum(), args[0])
    tail = Tail("base", (1, 4, 3, 3), 2)
    loss = tail.run("fused")[0][0].sum()
    (grad,) = torch.autograd.grad(loss, tail.maps[0], create_graph=True)
    with pytest.raises(RuntimeError, match="base_tail_backward"):
        torch.autograd.grad(grad.sum(), tail.maps[0])


def group(zs, tails, backend):
    """A group of base tails; returns every layer's output."""
    keys, values, outs = [], [], []
    shortcut = tails[0].maps[1]
    for z, tail in zip(zs, tails, strict=True):
        w1, b1, w2, b2 = tail.norms
        found = mrla_base_tail(
            z, shortcut, BatchNorm(w1, b1, None, None, 1e-5), *tail.weights, keys, values, 2,
            BatchNorm(w2, b2, None, None, 1e-5), backend=backend,
        )  # fmt: skip
        keys, values = [*keys, found.key], [*values, found.value]
        shortcut = found.tail.out
        outs.append(shortcut)
    return outs


def test_group_of_tails_in_every_use():
    """Part of the outputs, part of the inputs, a second backward, checkpointing, no gradient."""
    tails = [Tail("base", (2, 4, 5, 3), 2) for _ in range(4)]
    zs = [tail.maps[0] for tail in tails]
    leaves = [*zs, *(p for tail in tails for p in (*tail.norms, *tail.weights))]
    fused, naive = (group(zs, tails, b) for b in ("fused", "naive"))
    close(fused, naive, 1e-12)
    expected = gradients(naive, leaves)
    for keep in (True, False):
        close(gradients_keeping(fused, leaves, keep), expected, 1e-9)
    for used in ((1,), (0, 2)):
        some = [[group(zs, tails, b)[i] for i in used] for b in ("fused", "naive")]
        close(*(gradients(outs, zs[:2]) for outs in some), 1e-9)
    again = checkpoint(lambda *z: tuple(group(z, tails, "fused")), *zs, use_reentrant=False)
    close(gradients(list(again), leaves), expected, 1e-9)
    with torch.no_grad():
        close(group(zs, tails, "fused"), naive, 1e-12)
    # Nothing but the first layer's z wants a gradient.
    frozen = [zs[0], *(z.detach() for z in zs[1:])]
    close(gradients(group(frozen, tails, "fused")[-1:], zs[:1]),
          gradients(group(frozen, tails, "naive")[-1:], zs[:1]), 1e-9)  # fmt: skip


def gradients_keeping(outs, leaves, keep):
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outs]
    return torch.autograd.grad(outs, leaves, grads, retain_graph=keep)


def test_memory_kept_for_backward():
    """Light keeps x and previous, base its values; the tails z and shortcut, and a value."""
    shape = (2, 16, 24, 24)
    size = 2 * 16 * 24 * 24 * 8

    def kept(run):
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (seen.setdefault(t.untyped_storage().data_ptr(), t), t)[1], lambda t: t
        ):
            out = run()
        del out
        return sum(t.untyped_storage().nbytes() for t in seen.values()) / size

    args = light_args(shape, 4)
    assert kept(lambda: mrla_light(*args)) < 2.1
    query, keys, values = base_args(6, shape)
    assert kept(lambda: mrla_base(query, keys, values, 4)) < 6.2
    for kind, maps in (("light", 2), ("base", 2 + 5)):
        tail = Tail(kind, shape, 4, layers=5)
        assert kept(lambda: tail.run("fused")) < maps + 0.2  # noqa: B023


def test_plain_functions_where_torch_has_no_custom_operations(monkeypatch):
    """What torch 2.1 gets: the same forward and backward in an autograd.Function."""
    for module, backward in ((light_fused, "light"), (base_fused, "base")):
        once = custom_op.without_gradient(f"{backward}_backward", module._backward)
        monkeypatch.setattr(module, "_backward_op", once)
        function = custom_op.as_function(
            backward, module._forward, module._setup_context, module._grads
        )
        monkeypatch.setattr(module, "_op", function)
    args = light_args((2, 8, 5, 4), 4)
    outs = [mrla_light(*args, backend=b) for b in ("fused", "naive")]
    assert "GeneratedBackward" not in outs[0].grad_fn.name()
    close(outs[:1], outs[1:], 1e-12)
    close(*(gradients([o], tensors(args)) for o in outs), 1e-10)
    query, keys, values = base_args(3, (2, 8, 5, 4))
    outs = [mrla_base(query, keys, values, 4, backend=b) for b in ("fused", "naive")]
    close(*(gradients([o], [query, *keys, *values]) for o in outs), 1e-10)
    test_second_derivative_raises()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(shortcut=torch.zeros(2, 8, 4, 3)), r"shortcut.shape=\(2, 8, 4, 3\) and z.shape"),
        (dict(shortcut=torch.zeros(2, 8, 4, 4).half()), r"dtype of z, got torch.float16"),
        (dict(norm=BatchNorm(torch.ones(4), None, None, None, 1e-5)), r"norm.weight must be \[8\]"),
        (
            dict(out_norm=BatchNorm(None, None, torch.ones(8), None, 1e-5)),
            "out_norm.mean and out_norm.var come together",
        ),
        (dict(scale=torch.ones(3)), r"scale must be \[2\], got \(3,\)"),
        (dict(scale=torch.ones(2, device="meta")), r"one device, got \['cpu', 'meta'\]"),
        (dict(value_weight=torch.zeros(8, 1, 3, 3).double()), "got torch.float64 and x.dtype="),
        (dict(value_weight=torch.zeros(8, 1, 5, 5)), r"value_weight must be \[8, 1, 3, 3\]"),
        (dict(head_channels=3), "head_channels=3 with channels=8; allowed: 1, 2, 4, 8"),
        (
            dict(z=torch.zeros(1, 8, 1, 1), shortcut=torch.zeros(1, 8, 1, 1)),
            "Expected more than 1 value per channel when training, got input size",
        ),
    ],
    ids=stable_id,
)
def test_bad_arguments_of_tails_are_named(change, message):
    norm = BatchNorm(torch.ones(8), torch.zeros(8), None, None, 1e-5)
    shared = dict(
        z=torch.zeros(2, 8, 4, 4),
        shortcut=torch.zeros(2, 8, 4, 4),
        norm=norm,
        query_weight=torch.zeros(1, 1, 3),
        key_weight=torch.zeros(1, 1, 3),
        value_weight=torch.zeros(8, 1, 3, 3),
        head_channels=4,
        out_norm=norm,
        scale=None,
    )
    extra = [(mrla_light_tail, dict(lambda_t=torch.zeros(8))),
             (mrla_base_tail, dict(keys=[], values=[]))]  # fmt: skip
    for op, own in extra:
        op(**shared, **own)
        with pytest.raises((ValueError, TypeError), match=message):
            op(**{**shared, **own, **change})


def test_mixed_dtypes_are_named():
    args = light_args((2, 8, 4, 4), 4, dtype=torch.float32)
    with pytest.raises(TypeError, match="value_weight must have the dtype of x, got torch.float16"):
        mrla_light(*args[:4], args[4].half(), *args[5:])
    key = torch.zeros(2, 8)
    z = feature_map((2, 8, 4, 4), dtype=torch.float32)
    norm = BatchNorm(None, None, None, None, 1e-5)
    weights = [torch.zeros(1, 1, 3)] * 2 + [torch.zeros(8, 1, 3, 3)]
    with pytest.raises(
        ValueError, match=r"keys\[0\] must be .* value \(2, 8, 4, 4\) torch.float64"
    ):
        mrla_base_tail(z, z, norm, *weights, [key], [torch.zeros(2, 8, 4, 4).double()], 4, norm)
