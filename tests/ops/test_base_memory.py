"""MRLA-base along depth: what backward allocates, and values that it computes again."""

from __future__ import annotations

import pytest
import torch
from mmrla.ops.mrla_base import recompute
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from mmrla.ops import BatchNorm, mrla_base, mrla_base_tail
from tests.ops.fused_cases import Tail, base_args, close

SHAPE = (2, 4, 24, 24)
MAP = 2 * 4 * 24 * 24 * 8


def group(tails, zs, again, backend="fused", running=False):
    """The outputs of a group of base tails, and the values as later layers get them.

    The view sets these apart from what a layer retrieves from its own value, in every backend.
    """
    recipes = () if again and backend == "fused" else None
    keys, values, outs = [], [], []
    shortcut = tails[0].maps[1]
    for z, tail in zip(zs, tails, strict=True):
        w1, b1, w2, b2 = tail.norms
        used = [torch.zeros_like(w1), torch.ones_like(w1)] if running else [None, None]
        found = mrla_base_tail(
            z, shortcut, BatchNorm(w1, b1, *used, 1e-5), *tail.weights, keys, values, 2,
            BatchNorm(w2, b2, *used, 1e-5), tail.scale, recipes, backend=backend,
        )  # fmt: skip
        keys, values = [*keys, found.key], [*values, found.value.view_as(found.value)]
        if recipes is not None:
            recipes = (*recipes, found.recipe)
        shortcut = found.tail.out
        outs.append(shortcut)
    return outs, values


def make(layers, shape=SHAPE, **kwargs):
    tails = [Tail("base", shape, 2, layers=1, **kwargs) for _ in range(layers)]
    zs = [tail.maps[0] for tail in tails]
    return tails, zs, [*zs, *(p for tail in tails for p in (*tail.norms, *tail.weights))]


def allocated(step):
    """Feature maps of SHAPE that ``step`` has alive at most, and how often autograd adds."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    if not events or not hasattr(events[0], "start_ns"):
        pytest.skip("this torch's profiler tells no order of allocations")
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / MAP, {e.key: e.count for e in found.key_averages()}


@pytest.mark.parametrize("again", [False, True])
def test_backward_of_tails_takes_memory_linear_in_depth(again):
    peaks = []
    for layers in (6, 12, 24):
        tails, zs, _ = make(layers)
        loss = group(tails, zs, again)[0][-1].sum()
        peak, calls = allocated(loss.backward)
        peaks.append(peak)
        # Two gradients a value, with each layer's z and each value that is made again.
        assert peak < (3 if again else 2) * layers + 10
        # Every layer's gradient of an earlier value but the first is added in place.
        assert calls["aten::add_"] >= (layers - 1) * (layers - 2) / 2
        assert calls.get("aten::add", 0) < 8 * layers
    # Three points on a line.
    assert peaks[2] - peaks[1] == pytest.approx(2 * (peaks[1] - peaks[0]), rel=0.1)


def test_backward_of_the_operation_takes_memory_linear_in_depth():
    for layers in (8, 16):
        query, keys, values = base_args(layers, SHAPE)
        outs = [
            mrla_base(query, keys[: t + 1], values[: t + 1], 2, backend="fused")
            for t in range(layers)
        ]
        grads = [torch.ones_like(o) for o in outs]
        peak, calls = allocated(lambda: torch.autograd.backward(outs, grads))  # noqa: B023
        assert peak < 2 * layers + 4
        assert calls["aten::add_"] >= layers * (layers - 1) / 2


@pytest.mark.parametrize("again", [False, True])
def test_gradients_that_are_looked_at_are_left_alone(again):
    """Hooks, values used elsewhere, gradients of values themselves, graphs that are kept."""
    tails, zs, leaves = make(4, (2, 4, 5, 3))
    found = []
    for backend in ("fused", "naive"):
        outs, values = group(tails, zs, again, backend)
        seen = []
        values[1].register_hook(lambda g, seen=seen: seen.append((g, g.clone())))
        values[0].retain_grad()
        loss = outs[-1].square().sum() + values[0].pow(3).sum() + outs[1].sum()
        some = torch.autograd.grad(loss, [values[0], values[2], zs[1]], retain_graph=True)
        copies = [g.clone() for g in some]
        seen.clear()
        whole = torch.autograd.grad(loss, leaves, retain_graph=True)
        twice = torch.autograd.grad(loss, leaves, retain_graph=True)
        close(twice, whole, 0)
        assert all(torch.equal(g, copy) for g, copy in (*seen, *zip(some, copies, strict=True)))
        assert len(seen) == 2
        seen = seen[:2]
        loss.backward(inputs=[values[0]], retain_graph=True)
        given = torch.ones_like(outs[-1])
        torch.autograd.backward(outs[-1:], [given])
        assert torch.equal(given, torch.ones_like(given))
        for leaf in leaves:
            leaf.grad = None
        found.append([*some, *whole, *(g for g, _ in seen), values[0].grad])
    close(*found, 1e-9)


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "mixed"])
def test_values_computed_again(layout, running, monkeypatch):
    computed = []
    own = recompute.Again.__call__

    def spy(self, sources):
        computed.append(self.value is None)
        return own(self, sources)

    monkeypatch.setattr(recompute.Again, "__call__", spy)
    tails, zs, leaves = make(5, (2, 4, 5, 3), layout=layout, scale=True)
    outs, values = group(tails, zs, True, running=running)
    expected, expected_values = group(tails, zs, False, "naive", running)
    close([*outs, *values], [*expected, *expected_values], 1e-12)
    wanted = torch.autograd.grad(sum_of(expected), leaves)
    for keep in (True, True, False):
        computed.clear()
        found = torch.autograd.grad(
            sum_of(outs), leaves, retain_graph=keep, allow_unused=True
        )  # fmt: skip
        assert sum(computed) == 4  # each value but the last layer's, once
    assert computed.count(False) == 6
    close(found, wanted, 1e-9)
    again = checkpoint(lambda *z: tuple(group(tails, z, True, running=running)[0]), *zs,
                       use_reentrant=False)  # fmt: skip
    close(torch.autograd.grad(sum_of(again), leaves), wanted, 1e-9)
    # Part of the graph, twice: what the first left behind does no harm.
    for _ in range(2):
        outs = group(tails, zs, True, running=running)[0]
        got = torch.autograd.grad(outs[-1].sum(), zs[3:], retain_graph=True)
        close(got, torch.autograd.grad(outs[-1].sum(), zs[3:]), 0)


def sum_of(outs):
    return sum(o.square().sum() * (i + 1) for i, o in enumerate(outs))


def test_values_computed_again_are_not_kept():
    kept = []
    for again in (False, True):
        tails, zs, _ = make(6)
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (seen.setdefault(t.untyped_storage().data_ptr(), t), t)[1],  # noqa: B023
            lambda t: t,
        ):
            outs = group(tails, zs, again)[0]
        del outs
        kept.append(sum(t.untyped_storage().nbytes() for t in seen.values()) / MAP)
    # z and a shortcut a layer, and a value.
    assert kept[0] == pytest.approx(18, abs=0.5)
    assert kept[1] == pytest.approx(12, abs=0.5)


def test_a_change_of_what_values_come_from_is_noticed():
    tails, zs, _ = make(3, (2, 4, 5, 3))
    outs, _ = group(tails, zs, True)
    with torch.no_grad():
        tails[0].weights[2].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outs[-1].sum().backward()


def test_one_recipe_a_value():
    tail = Tail("base", (2, 4, 5, 3), 2, layers=3)
    w1, b1, w2, b2 = tail.norms
    norms = BatchNorm(w1, b1, None, None, 1e-5), BatchNorm(w2, b2, None, None, 1e-5)
    with pytest.raises(ValueError, match="one recipe a value, got 0 and 2 values"):
        mrla_base_tail(*tail.maps, norms[0], *tail.weights, *tail.group, 2, norms[1], None, ())
