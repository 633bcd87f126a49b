"""Gradients of MRLA-base's values that are left with the layer they came from."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from mmrla.ops.mrla_base import deferred as module
from torch.utils.checkpoint import checkpoint

from mmrla.ops import BatchNorm, mrla_base_tail
from tests.ops.fused_cases import Tail, close
from tests.ops.test_base_memory import SHAPE, allocated, make

SMALL = (2, 4, 5, 3)


def group(tails, zs, *, backend="fused", again=False, running=False, cut=None, view=None):
    """Outputs and values of a group of base tails whose gradients are deferred.

    ``cut``: the layer from which on the first layer's key comes detached; ``view``: a function of
    every key on its way.
    """
    fused = backend == "fused"
    recipes, deferred = (() if again and fused else None), (() if fused else None)
    keys, values, outs = [], [], []
    shortcut = tails[0].maps[1]
    for t, (z, tail) in enumerate(zip(zs, tails, strict=True)):
        w1, b1, w2, b2 = tail.norms
        used = [torch.zeros_like(w1), torch.ones_like(w1)] if running else [None, None]
        if t == cut:
            keys = [keys[0].detach(), *keys[1:]]
        found = mrla_base_tail(
            z, shortcut, BatchNorm(w1, b1, *used, 1e-5), *tail.weights, keys, values, 2,
            BatchNorm(w2, b2, *used, 1e-5), tail.scale, recipes, deferred, backend=backend,
        )  # fmt: skip
        keys = [*keys, found.key if view is None else view(found.key)]
        values = [*values, found.value]
        recipes = None if recipes is None else (*recipes, found.recipe)
        if deferred is not None:
            deferred = None if found.deferred is None else (*deferred, found.deferred)
        shortcut = found.tail.out
        outs.append(shortcut)
    return outs, values


def loss_of(outs, values):
    """Every output counts, and two values besides."""
    terms = [o.square().sum() * (i + 1) for i, o in enumerate(outs)]
    return sum(terms) + values[0].pow(3).sum() + values[2].sin().sum()


@pytest.fixture
def left(monkeypatch):
    """How many gradients were left with earlier layers."""
    found = []
    own = module.Terms.leave

    def spy(self, grad, factor):
        found.append(grad.shape)
        own(self, grad, factor)

    monkeypatch.setattr(module.Terms, "leave", spy)
    return found


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "mixed"])
def test_gradients_equal_those_of_autograd(layout, running, again, left):
    """Also twice through one graph, for some leaves, and under both kinds of checkpointing."""
    tails, zs, leaves = make(5, SMALL, layout=layout, scale=True)
    wanted = torch.autograd.grad(
        loss_of(*group(tails, zs, backend="naive", running=running)), leaves
    )
    loss = loss_of(*group(tails, zs, again=again, running=running))
    for keep in (True, False):
        left.clear()
        close(torch.autograd.grad(loss, leaves, retain_graph=keep), wanted, 1e-9)
        assert len(left) == 4 + 3 + 2 + 1
    # Of some leaves, with the leftovers of that in the graph, then of all.
    loss = loss_of(*group(tails, zs, again=again, running=running))
    some = torch.autograd.grad(loss, [zs[4], zs[2]], retain_graph=True)
    close(some, [wanted[4], wanted[2]], 1e-9)
    close(torch.autograd.grad(loss, leaves), wanted, 1e-9)

    if again and layout == "nchw":
        return  # values that are computed again are of no use in a checkpointed part
    for reentrant in (False, True):
        found = checkpoint(
            lambda *z: loss_of(*group(tails, z, running=running)), *zs, use_reentrant=reentrant
        )
        for leaf in leaves:
            leaf.grad = None
        found.backward()
        close([leaf.grad for leaf in leaves], wanted, 1e-9)


@pytest.mark.parametrize("how", ["cut", "view"])
def test_a_key_that_was_touched_leaves_it_to_autograd(how, left):
    """A detached key no longer makes the first layer wait; a view is another node's."""
    tails, zs, leaves = make(4, SMALL)
    changed = dict(cut=2) if how == "cut" else dict(view=lambda key: key.view_as(key))
    wanted = torch.autograd.grad(loss_of(*group(tails, zs, backend="naive", **changed)), leaves)
    found = torch.autograd.grad(loss_of(*group(tails, zs, **changed)), leaves)
    close(found, wanted, 1e-9)
    assert len(left) == (1 if how == "cut" else 0)  # layer 2 to layer 1, before the cut


def test_a_backward_that_raised_leaves_nothing(left):
    tails, zs, leaves = make(4, SMALL)
    outs, values = group(tails, zs)
    loss = loss_of(outs, values)
    wanted = torch.autograd.grad(loss, leaves, retain_graph=True)

    def fail(grad):
        raise ArithmeticError("stop here")

    handle = outs[1].register_hook(fail)
    with pytest.raises(ArithmeticError, match="stop here"):
        torch.autograd.grad(loss, leaves, retain_graph=True)
    handle.remove()
    close(torch.autograd.grad(loss, leaves), wanted, 0)


def test_hooks_that_keep_gradients_see_them_unchanged():
    tails, zs, leaves = make(4, SMALL)
    for running in (False, True):
        outs, _ = group(tails, zs, running=running)
        seen = []
        for out in outs:
            out.register_hook(lambda g, seen=seen: seen.append((g, g.clone())))
        given = torch.ones_like(outs[-1])
        torch.autograd.grad(outs[-1], leaves, given)
        assert len(seen) == 4
        assert torch.equal(given, torch.ones_like(given))
        assert all(torch.equal(g, copy) for g, copy in seen)


def test_a_second_derivative_raises():
    tails, zs, _ = make(3, SMALL)
    outs, values = group(tails, zs)
    (grad,) = torch.autograd.grad(loss_of(outs, values), zs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="autograd formula"):
        grad.sum().backward()


def test_the_graph_is_freed_with_its_outputs():
    """No cycle: memory goes when the last output does, not when Python's collector runs."""
    tails, zs, _ = make(3, SMALL)
    gc.collect()
    gc.disable()
    try:
        outs, values = group(tails, zs)
        node = weakref.ref(outs[0].grad_fn)
        loss = loss_of(outs, values)
        loss.backward(retain_graph=True)
        assert node() is not None
        del outs, values, loss
        assert node() is None
    finally:
        gc.enable()


def test_no_gradient_is_deferred_without_a_graph():
    tails, zs, _ = make(2, SMALL)
    with torch.no_grad():
        tail = tails[0]
        w1, b1, w2, b2 = tail.norms
        found = mrla_base_tail(
            zs[0], tail.maps[1], BatchNorm(w1, b1, None, None, 1e-5), *tail.weights, (), (), 2,
            BatchNorm(w2, b2, None, None, 1e-5), None, None, (), backend="fused",
        )  # fmt: skip
    assert found.deferred is None


def test_backward_takes_memory_linear_in_depth_and_one_pass_a_pair(left):
    peaks = []
    for layers in (6, 12, 24):
        tails, zs, _ = make(layers)
        loss = group(tails, zs)[0][-1].sum()
        peak, calls = allocated(loss.backward)
        peaks.append(peak)
        assert peak < 2 * layers + 10
        # For each pair of layers autograd adds up a key's gradient, [B, C], and no map.
        assert calls["aten::add_"] < (layers - 1) * (layers - 2) / 2 + 4 * layers
    assert peaks[2] - peaks[1] == pytest.approx(2 * (peaks[1] - peaks[0]), rel=0.15)
    assert set(left) == {torch.Size(SHAPE)}


def test_one_place_a_value():
    tail = Tail("base", SMALL, 2, layers=3)
    w1, b1, w2, b2 = tail.norms
    norms = BatchNorm(w1, b1, None, None, 1e-5), BatchNorm(w2, b2, None, None, 1e-5)
    with pytest.raises(ValueError, match="one of deferred a value, got 0 and 2 values"):
        mrla_base_tail(
            *tail.maps, norms[0], *tail.weights, *tail.group, 2, norms[1], None, None, ()
        )
