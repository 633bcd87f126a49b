"""MRLA-light's kernels as compiled for sm_90 (tests/ops/ttir.py), against float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mmrla.ops.reference import LightWeights, Norm, light_tail_reference
from tests.conftest import relative_error

ttir = pytest.importorskip("tests.ops.ttir", exc_type=ImportError)
from mmrla.ops.kernels_light import light_backward, light_forward  # noqa: E402

LAYOUTS = {"last": torch.channels_last, "first": torch.contiguous_format}
NORMS = [(True, True), (True, False), (False, True), (False, False)]
NAMES = ("z", "s", "w1", "b1", "query", "key", "value", "lambda_t", "w2", "b2")
EXACT = (8, 32, 8, 8)
"""Blocks cover it without remainders."""
ODD = (3, 12, 13, 17)
"""Nothing divides, and a batch so small that steps are cut into strips."""


class Case(NamedTuple):
    """Arguments of a layer's end."""

    z: Tensor
    s: Tensor
    norm: Norm
    weights: LightWeights
    out_norm: Norm
    drop: Tensor | None
    grad: Tensor

    @property
    def inputs(self) -> tuple:
        return self[:6]


def a_case(
    shape: tuple[int, int, int, int],
    heads: int = 4,
    layout: str = "last",
    batch: tuple[bool, bool] = (True, True),
    dtype: torch.dtype = torch.float32,
    query: int = 3,
    key: int = 3,
    mean: float = 0.0,
    drop: bool = True,
) -> Case:
    C = shape[1]
    z, s, grad = (
        (torch.randn(shape) + at).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        for at in (mean, 0.0, 0.0)
    )

    def norm(mean: float, momentum: float, batch: bool) -> Norm:
        weight, bias = torch.rand(C) + 0.5, torch.randn(C)
        running = 0.1 * torch.randn(C) + mean, torch.rand(C) + 0.5
        return Norm(weight, bias, *running, momentum, 1e-5, batch)

    taps = torch.randn(1, 1, query), torch.randn(1, 1, key)
    weights = LightWeights(*taps, torch.randn(C, 1, 3, 3), torch.randn(C), C // heads)
    factors = torch.tensor([1.25, 0.0, *[1.25] * shape[0]])[: shape[0]] if drop else None
    return Case(z, s, norm(mean, 0.1, batch[0]), weights, norm(0, 0.3, batch[1]), factors, grad)


def in_float64(case: Case) -> Case:
    """Copies, the parameters and maps with gradients."""

    def copied(x: object, grad: bool = False) -> object:
        return x.double().clone().requires_grad_(grad) if isinstance(x, Tensor) else x

    def of_norm(norm: Norm) -> Norm:
        affine = (copied(x, True) for x in norm[:2])
        return Norm(*affine, *(copied(x) for x in norm[2:]))

    z, s = copied(case.z, True), copied(case.s, True)
    weights = LightWeights(*(copied(x, True) for x in case.weights))
    norms = of_norm(case.norm), of_norm(case.out_norm)
    return Case(z, s, norms[0], weights, norms[1], copied(case.drop), copied(case.grad))


def expected(case: Case) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Output, gradients and running statistics in float64."""
    exact = in_float64(case)
    out = light_tail_reference(*exact.inputs)
    leaves = [exact.z, exact.s, *exact.norm[:2], *exact.weights[:4], *exact.out_norm[:2]]
    grads = torch.autograd.grad(out, leaves, exact.grad)
    return out.detach(), list(grads), [*exact.norm[2:4], *exact.out_norm[2:4]]


def compare(case: Case, map_tolerance: float = 2e-5, tolerance: float | None = None) -> None:
    """Outputs, running statistics and gradients; parameters sum over rounded maps."""
    tolerance = tolerance or map_tolerance
    out, grads, running = expected(case)
    with ttir.launches_on_cpu(strict=True):
        got, saved = light_forward(*case.inputs, keep=True)
        got_grads = light_backward(case.grad, *case.inputs, saved)
    assert got.stride() == case.z.stride()
    assert got.dtype == case.z.dtype
    assert relative_error(got, out) < map_tolerance, "out"
    own = [*case.norm[2:4], *case.out_norm[2:4]]
    for n, (ours, theirs) in enumerate(zip(own, running, strict=True)):
        assert relative_error(ours, theirs) < 2e-5, f"running statistics {n}"
    for name, ours, theirs in zip(NAMES, got_grads, grads, strict=True):
        limit = map_tolerance if name in "zs" else tolerance
        assert relative_error(ours, theirs) < limit, name
        assert ours.dtype == (case.z.dtype if name in "zs" else torch.float32), name
    assert got_grads[0].stride() == got_grads[1].stride() == case.z.stride()


@pytest.mark.parametrize(
    ("layout", "batch"),
    [*(("last", batch) for batch in NORMS), ("first", NORMS[0]), ("first", NORMS[3])],
)
def test_exact_blocks(layout: str, batch: tuple[bool, bool]) -> None:
    compare(a_case(EXACT, layout=layout, batch=batch))


@pytest.mark.parametrize(
    ("layout", "batch"),
    [("last", (True, True)), ("last", (False, False)), ("first", (True, True))],
)
def test_odd_sizes(layout: str, batch: tuple[bool, bool]) -> None:
    compare(a_case(ODD, heads=3, layout=layout, batch=batch, query=5, key=1))


@pytest.mark.parametrize(("layout", "dtype"), [("last", torch.float16), ("first", torch.bfloat16)])
def test_half_precision(layout: str, dtype: torch.dtype) -> None:
    """Maps and parameters."""
    case = a_case(ODD, heads=3, layout=layout, dtype=dtype, query=5, key=1)
    weights = LightWeights(*(x.to(dtype) for x in case.weights[:4]), case.weights.head_channels)
    affine = dict(weight=case.norm.weight.to(dtype), bias=case.norm.bias.to(dtype))
    eps = torch.finfo(dtype).eps
    compare(case._replace(weights=weights, norm=case.norm._replace(**affine)), eps, 2 * eps)


@pytest.mark.parametrize(
    ("shape", "heads"),
    [((2, 136, 1, 2), 1), ((3, 1, 5, 1), 1), ((2, 24, 7, 7), 24)],
    ids=["one head", "one channel", "a head per channel"],
)
def test_extreme_shapes(shape: tuple[int, int, int, int], heads: int) -> None:
    compare(a_case(shape, heads, drop=False), 5e-5)


@pytest.mark.parametrize(
    ("layout", "dtype", "limit"),
    [("last", torch.float32, 5e-5), ("first", torch.bfloat16, 8e-3)],
)
def test_mean_of_100_deviations(layout: str, dtype: torch.dtype, limit: float) -> None:
    """The sums for the variance do not cancel, though the running mean is far off."""
    case = a_case(ODD, heads=3, layout=layout, dtype=dtype, mean=100.0, query=5, key=1)
    case.norm.running_mean.zero_()
    compare(case, limit, 2 * limit)


def test_norms_without_parameters() -> None:
    case = a_case(ODD, heads=3, query=5, key=1)
    case = case._replace(norm=Norm(None, None, None, None), out_norm=Norm(None, None, None, None))
    one, zero = torch.ones(ODD[1]), torch.zeros(ODD[1])
    same = Norm(one, zero, None, None)
    out, grads, _ = expected(case._replace(norm=same, out_norm=same))
    with ttir.launches_on_cpu(strict=True):
        got, saved = light_forward(*case.inputs, keep=True)
        got_grads = light_backward(case.grad, *case.inputs, saved)
    assert relative_error(got, out) < 1e-5
    assert relative_error(got_grads[0], grads[0]) < 2e-5
    assert relative_error(got_grads[2], grads[2]) < 2e-5


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_momentum(momentum: float) -> None:
    case = a_case(ODD, heads=3, query=5, key=1)
    norms = case.norm._replace(momentum=momentum), case.out_norm._replace(momentum=momentum)
    compare(case._replace(norm=norms[0], out_norm=norms[1]))


def test_gates_near_0_and_1() -> None:
    """``1 - gate`` keeps its digits, and nothing overflows."""
    case = a_case((2, 24, 7, 7), heads=3, batch=(True, False))
    for scale in (2.0, 1e3):
        weights = case.weights
        weights = weights._replace(query=scale * weights.query, key=scale * weights.key)
        compare(case._replace(weights=weights), 2e-5, 1e-4)
    taps = torch.rand(1, 1, 3)
    weights = case.weights._replace(query=2 * taps, key=2 * taps, head_channels=24)
    compare(case._replace(weights=weights), 2e-5, 1e-4)


def test_y_is_zero_outside_for_any_offset() -> None:
    """The norm's offset, here 3e5, may be beyond float16."""
    case = a_case(ODD, heads=3, batch=(False, False), dtype=torch.float16, query=5, key=1)
    case.z.fill_(-1024.0)
    case.norm.running_mean.fill_(-1024.0)
    case.norm.running_var.zero_()
    out, _, _ = expected(case)
    with ttir.launches_on_cpu(strict=True):
        got, _ = light_forward(*case.inputs, keep=False)
    assert relative_error(got, out) < 1e-2


@pytest.mark.parametrize("name", ["z", "s", "grad"])
def test_nan_spreads_as_in_torch(name: str) -> None:
    case = a_case(ODD, heads=3, batch=(False, False), query=5, key=1)
    getattr(case, name)[1, 5, 6, 7] = torch.nan
    out, grads, _ = expected(case)
    with ttir.launches_on_cpu():
        got, saved = light_forward(*case.inputs, keep=True)
        got_grads = light_backward(case.grad, *case.inputs, saved)
    assert torch.equal(got.isnan(), out.isnan())
    assert torch.equal(got_grads[0].isnan(), grads[0].isnan())


def test_without_gradients_nothing_is_kept() -> None:
    case = a_case(EXACT)
    with ttir.launches_on_cpu():
        out, saved = light_forward(*case.inputs, keep=True)
        again, nothing = light_forward(*case.inputs, keep=False)
    assert saved
    assert nothing == ()
    assert torch.equal(out, again)
