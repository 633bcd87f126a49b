"""Groups of MRLA-base: gradients between layers, and what is kept."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from mmrla.ops import BaseGroup, BaseWeights, LightWeights, fused
from tests.conftest import kept_for_backward, relative_error
from tests.ops.test_tails import arguments


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
    return sum(kept_for_backward(run).values()) / (8 * size)


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
