"""Ends of residual blocks as one operation, on the CPU, against plain torch."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
from torch.autograd import gradcheck
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

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
from tests.conftest import relative_error, stable_id

CPU = torch.device("cpu")
SHAPES = [((2, 24, 7, 7), 8), ((2, 16, 1, 1), 16), ((2, 12, 13, 17), 4), ((3, 8, 1, 5), 1)]
KINDS = [(LightWeights, 1), (BaseWeights, 1), (BaseWeights, 4)]


def fused_base(*args, recompute=False):
    return fused.base_tail(*args, recompute=recompute)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "layers"), KINDS, ids=stable_id)
def test_narrow_dtypes(kind, layers, dtype):
    if dtype == torch.float16 and torch.__version__.startswith("2.1."):
        pytest.skip("torch 2.1 has no batch norm for float16 on the CPU")
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


# MRLA-base's groups


class Group:
    """A group of tails whose shortcut is the output before."""

    def __init__(self, layers, shape=(2, 4, 5, 3), batch=(True, True)) -> None:
        self.tails = [arguments(BaseWeights, shape, batch=batch) for _ in range(layers)]
        generator = torch.Generator().manual_seed(1)
        for leaves, _ in self.tails:
            for leaf in leaves.values():
                noise = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
                leaf.data.add_(noise.mul_(0.3))
        self.zs = [leaves["z"] for leaves, _ in self.tails]
        self.leaves = [
            leaf for i, (leaves, _) in enumerate(self.tails)
            for name, leaf in leaves.items() if i == 0 or name != "shortcut"
        ]  # fmt: skip

    def run(self, *zs, backend="fused", recompute=False, change=None):
        """Outputs and the group; ``change`` maps the state that layer t gets."""
        out, group, outs = self.tails[0][0]["shortcut"], BaseGroup(), []
        for t, (z, (_, call)) in enumerate(zip(zs or self.zs, self.tails, strict=True)):
            group = group if change is None else change(t, group)
            out, group = call(backend, z=z, shortcut=out, group=group, recompute=recompute)
            outs.append(out)
        return outs, group


def loss_of(outs, group):
    """Every output counts, and two values and a key besides."""
    terms = [o.square().sum() * (i + 1) for i, o in enumerate(outs)]
    more = group.values[0].pow(3).sum() + group.values[2].sin().sum() + group.keys[1].cos().sum()
    return sum(terms) + more


def close(got, expected, tolerance=1e-9):
    for mine, theirs in zip(got, expected, strict=True):
        assert relative_error(mine, theirs) <= tolerance


@pytest.fixture
def left(monkeypatch):
    """What was left with earlier layers."""
    found = []
    own = fused._Inbox.leave
    monkeypatch.setattr(
        fused._Inbox, "leave", lambda self, g, f: (found.append(g.shape), own(self, g, f))[1]
    )
    return found


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("batch", [(True, True), (False, False)], ids=str)
def test_groups_in_every_use(batch, recompute, left):
    """Twice through one graph, for some leaves, of some outputs, in checkpointed parts."""
    group = Group(5, batch=batch)
    wanted = torch.autograd.grad(loss_of(*group.run(backend="naive")), group.leaves)
    loss = loss_of(*group.run(recompute=recompute))
    for keep in (True, False):
        left.clear()
        close(torch.autograd.grad(loss, group.leaves, retain_graph=keep), wanted)
        assert len(left) == 4 + 3 + 2 + 1
    loss = loss_of(*group.run(recompute=recompute))
    at = {id(leaf): g for leaf, g in zip(group.leaves, wanted, strict=True)}
    some = torch.autograd.grad(loss, [group.zs[4], group.zs[2]], retain_graph=True)
    close(some, [at[id(group.zs[4])], at[id(group.zs[2])]])
    close(torch.autograd.grad(loss, group.leaves), wanted)
    for used in ((1,), (0, 2)):
        both = [group.run(backend=b, recompute=recompute)[0] for b in ("fused", "naive")]
        sums = [sum(outs[i].sin().sum() for i in used) for outs in both]
        close(*(torch.autograd.grad(s, group.zs[:1]) for s in sums))
    for reentrant in (False, True):
        found = checkpoint(
            lambda *zs: loss_of(*group.run(*zs, recompute=recompute)), *group.zs,
            use_reentrant=reentrant,
        )  # fmt: skip
        for leaf in group.leaves:
            leaf.grad = None
        found.backward()
        close([leaf.grad for leaf in group.leaves], wanted)


@pytest.mark.parametrize("how", ["detached", "viewed"])
def test_values_that_were_touched_go_through_autograd(how, left):
    """A detached value no longer makes the first layer wait; a view is another node's."""
    group = Group(4)

    def change(t, state):
        if how == "viewed":
            return state._replace(values=tuple(v.view_as(v) for v in state.values))
        if t != 2:
            return state
        return state._replace(values=(state.values[0].detach(), *state.values[1:]))

    wanted = torch.autograd.grad(loss_of(*group.run(backend="naive", change=change)), group.leaves)
    close(torch.autograd.grad(loss_of(*group.run(change=change)), group.leaves), wanted)
    # Layer 2 to 1; layer 3 to 2; layer 4 to 2 and 3.
    assert len(left) == (0 if how == "viewed" else 4)


def test_a_backward_that_raised_leaves_nothing():
    group = Group(4)
    outs, state = group.run()
    loss = loss_of(outs, state)
    wanted = torch.autograd.grad(loss, group.leaves, retain_graph=True)

    def fail(grad):
        raise ArithmeticError("stop here")

    handle = outs[1].register_hook(fail)
    with pytest.raises(ArithmeticError, match="stop here"):
        torch.autograd.grad(loss, group.leaves, retain_graph=True)
    handle.remove()
    close(torch.autograd.grad(loss, group.leaves), wanted, 0)


def test_gradients_that_are_looked_at_are_left_alone():
    """By hooks, and as the given gradient of the output."""
    for batch in ((True, True), (False, False)):
        group = Group(4, batch=batch)
        outs, _ = group.run()
        seen = []
        for out in outs:
            out.register_hook(lambda g, seen=seen: seen.append((g, g.clone())))
        given = torch.ones_like(outs[-1])
        torch.autograd.grad(outs[-1], group.leaves, given)
        assert len(seen) == 4
        assert torch.equal(given, torch.ones_like(given))
        assert all(torch.equal(g, copy) for g, copy in seen)


def test_the_graph_is_freed_with_its_outputs():
    """No cycle: memory goes when the last output does, not when Python's collector runs."""
    for recompute in (False, True):
        group = Group(3)
        gc.collect()
        gc.disable()
        try:
            outs, state = group.run(recompute=recompute)
            node = weakref.ref(outs[0].grad_fn)
            loss = loss_of(outs, state)
            loss.backward(retain_graph=True)
            assert node() is not None
            del outs, state, loss
            assert node() is None
        finally:
            gc.enable()


def test_nothing_is_kept_without_a_graph():
    group = Group(2)
    with torch.no_grad():
        outs, state = group.run(recompute=True)
    assert state.links == (None, None)
    close(outs, group.run(backend="naive")[0], 1e-12)


def test_a_change_of_what_values_come_from_is_noticed():
    group = Group(3)
    for recompute in (False, True):
        outs, _ = group.run(recompute=recompute)
        with torch.no_grad():
            group.tails[0][0]["value"].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outs[-1].sum().backward()


def kept_maps(run, size):
    """Distinct storages kept for backward, in maps."""
    seen = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (seen.setdefault(t.untyped_storage().data_ptr(), t), t)[1], lambda t: t
    ):
        out = run()
    del out
    return sum(t.untyped_storage().nbytes() for t in seen.values()) / (8 * size)


def test_memory():
    """What is kept, and what backward takes: both linear in depth."""
    shape = (2, 4, 24, 24)
    size = 2 * 4 * 24 * 24
    assert kept_maps(arguments(LightWeights, shape)[1], size) < 3.3  # z, shortcut, o
    # z, a shortcut and a value per layer, and o except in the first; then none of the last two.
    assert kept_maps(Group(6, shape).run, size) < 4 * 6 + 0.5
    assert kept_maps(lambda: Group(6, shape).run(recompute=True), size) < 2 * 6 + 1.5
    peaks = []
    for layers in (6, 12, 24):
        loss = Group(layers, shape).run()[0][-1].sum()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            loss.backward()
        events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
        if not events or not hasattr(events[0], "start_ns"):
            pytest.skip("this torch's profiler tells no order of allocations")
        live = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        peaks.append(peak / (8 * size))
        assert peaks[-1] < 2 * layers + 10
    assert peaks[2] - peaks[1] == pytest.approx(2 * (peaks[1] - peaks[0]), rel=0.15)


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
    y, *_ = whole_map._start(z, s, norm)
    assert torch.equal(y, reference.residual_relu(z, s, norm))
