"""MRLA-base's Triton kernels against float64, compiled as for a GPU and run on the CPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mmrla.ops.reference import BaseGroup, BaseWeights, Norm, base_tail_reference

ttir = pytest.importorskip("tests.ops.ttir", exc_type=ImportError)
from mmrla.ops import fused, kernels_base  # noqa: E402
from mmrla.ops.kernels_base import base_backward, base_forward  # noqa: E402

CHANNELS_LAST, NCHW = torch.channels_last, torch.contiguous_format


class Layer(NamedTuple):
    """Inputs of one layer, and the gradient of its output."""

    z: Tensor
    s: Tensor
    norm: Norm
    weights: BaseWeights
    out_norm: Norm
    drop: Tensor | None
    grad: Tensor


class Case(NamedTuple):
    """A group of layers to compare."""

    shape: tuple[int, int, int, int]
    layers: int
    head_channels: int
    layout: torch.memory_format = CHANNELS_LAST
    dtype: torch.dtype = torch.float32
    batch: tuple[bool, bool] = (True, True)
    drop: bool = False
    parameters: torch.dtype | None = torch.float32
    kernel_sizes: tuple[int, int] = (3, 3)


def norm_of(channels: int, batch: bool, dtype: torch.dtype | None) -> Norm:
    weight, bias = torch.rand(channels) + 0.5, torch.randn(channels)
    mean, var = torch.randn(channels) * 0.3, torch.rand(channels) + 0.5
    if dtype is None:
        return Norm(None, None, None if batch else mean, None if batch else var, batch=batch)
    return Norm(weight.to(dtype), bias.to(dtype), mean, var, 0.3, 1e-5, batch)


def layers_of(case: Case) -> list[Layer]:
    torch.manual_seed(0)
    channels = case.shape[1]

    def a_map() -> Tensor:
        return torch.randn(case.shape).to(case.dtype).contiguous(memory_format=case.layout)

    layers = []
    for _ in range(case.layers):
        query, key = (torch.randn(1, 1, k) for k in case.kernel_sizes)
        weights = (w.to(case.parameters or torch.float32) for w in
                   (query, key, torch.randn(channels, 1, 3, 3) * 0.3))  # fmt: skip
        drop = torch.tensor([1.25, 0.0, 1.25])[: case.shape[0]] if case.drop else None
        layers.append(
            Layer(
                a_map(),
                a_map(),
                norm_of(channels, case.batch[0], case.parameters),
                BaseWeights(*weights, case.head_channels),
                norm_of(channels, case.batch[1], case.parameters),
                drop,
                a_map(),
            )
        )
    return layers


def wide(tensors: tuple[Any, ...]) -> list[Any]:
    return [t.double() if isinstance(t, Tensor) else t for t in tensors]


def reference(layers: list[Layer]) -> dict[str, Tensor]:
    """Outputs, running statistics and gradients by name, in float64."""
    group, found, inputs = BaseGroup(), {}, {}
    loss: Any = 0
    for k, layer in enumerate(layers):
        z, s, drop, grad = wide((layer.z, layer.s, layer.drop, layer.grad))
        norm, out_norm = (Norm(*wide(n)) for n in (layer.norm, layer.out_norm))
        norm, out_norm = (
            n._replace(**{f: getattr(n, f).clone() for f in ("running_mean", "running_var")
                          if getattr(n, f) is not None})
            for n in (norm, out_norm)
        )  # fmt: skip
        weights = BaseWeights(*wide(layer.weights))
        leaves = dict(
            z=z, s=s, norm_weight=norm.weight, norm_bias=norm.bias, query=weights.query,
            key=weights.key, value=weights.value, out_weight=out_norm.weight,
            out_bias=out_norm.bias,
        )  # fmt: skip
        for name, leaf in leaves.items():
            if leaf is not None:
                inputs[f"{k}.grad_{name}"] = leaf.requires_grad_()
        out, group = base_tail_reference(z, s, norm, weights, out_norm, drop, group)
        found |= {f"{k}.out": out, f"{k}.key": group.keys[-1], f"{k}.value": group.values[-1]}
        inputs |= {f"{k}.grad_of_key": group.keys[-1], f"{k}.grad_of_value": group.values[-1]}
        found |= running(k, norm, out_norm)
        loss = loss + (out * grad).sum()
    grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    found |= dict(zip(inputs, grads, strict=True))
    return {n: t.detach() for n, t in found.items() if t is not None}


def running(k: int, norm: Norm, out_norm: Norm) -> dict[str, Tensor]:
    named = dict(
        running_mean=norm.running_mean, running_var=norm.running_var,
        out_running_mean=out_norm.running_mean, out_running_var=out_norm.running_var,
    )  # fmt: skip
    return {f"{k}.{n}": t.clone() for n, t in named.items() if t is not None}


NAMES = ("z", "s", "norm_weight", "norm_bias", "query", "key", "value", "out_weight", "out_bias")


def from_kernels(layers: list[Layer]) -> tuple[dict[str, Tensor], Any]:
    """As :func:`reference`, from the kernels, with a log of their launches."""
    found: dict[str, Tensor] = {}
    keys, values, saved = [], [], []
    with ttir.launches_on_cpu(strict=True) as log:
        for k, (z, s, norm, weights, out_norm, drop, _) in enumerate(layers):
            out, key, value, kept = base_forward(
                z, s, norm, weights, out_norm, drop, keys, values, True
            )
            keys, values, saved = [*keys, key], [*values, value], [*saved, kept]
            found |= {f"{k}.out": out, f"{k}.key": key, f"{k}.value": value}
            found |= running(k, norm, out_norm)
        grad_keys: list[Tensor | None] = [None] * len(layers)
        left: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
        for k in reversed(range(len(layers))):
            z, s, norm, weights, out_norm, drop, grad = layers[k]
            t = k + 1
            *small, to_keys, grad_o, factors = base_backward(
                grad, grad_keys[k], z, s, norm, weights, out_norm, drop, keys[:t], values[:t],
                left[k], saved[k],
            )  # fmt: skip
            found |= {f"{k}.grad_{n}": g for n, g in zip(NAMES, small, strict=True)}
            if k == 0 and len(layers) > 1:  # whose own softmax gives its key no gradient
                found[f"{k}.grad_of_key"] = grad_keys[k]
            terms = left[k] + ([(grad_o, factors[k])] if grad_o is not None else [])
            total = sum(m.double() * f.double()[:, :, None, None] for m, f in terms)
            if t > 1:
                found[f"{k}.grad_of_value"] = total
            for n in range(k):
                left[n].append((grad_o, factors[n]))
                before = grad_keys[n]
                grad_keys[n] = to_keys[n] if before is None else before + to_keys[n]
    return found, log


def error(got: Tensor, want: Tensor) -> float:
    """The largest, relative to the largest value; gradients that all but cancel are below 1."""
    scale = want.abs().max().clamp(min=1.0)
    return float((got.double() - want).abs().max() / scale)


def compare(layers: list[Layer], tolerance: float, parameters: float | None = None) -> Any:
    """Everything against float64; ``parameters``: the tolerance of what is no map."""
    want = reference(layers)
    got, log = from_kernels(layers)
    wrong = {}
    for name, value in want.items():
        if name not in got:
            assert "grad_of" in name, f"{name} is missing"
            continue
        assert got[name].shape == value.shape, name
        small = value.dim() < 4 or value.shape[-2:] == (3, 3)
        limit = (parameters or tolerance) if small else tolerance
        if not error(got[name], value) <= limit:
            wrong[name] = f"{error(got[name], value):.1e}"
    assert not wrong, wrong
    for name in ("0.out", "0.value", "0.grad_z", "0.grad_s"):
        assert got[name].dtype == layers[0].z.dtype
        assert got[name].stride() == layers[0].z.stride()
    return log


ODD = (2, 24, 5, 17)
"""Nothing divides, and steps are cut into strips."""
EXACT = (8, 32, 8, 8)
"""Blocks cover it without remainders."""
LAUNCHES = {
    (True, True): (5, 5),
    (True, False): (4, 5),
    (False, True): (4, 5),
    (False, False): (3, 5),
}
"""Of forward and backward, by whether each norm takes the batch's statistics."""
USUAL = Case(ODD, 3, 8, drop=True, kernel_sizes=(5, 3))


@pytest.mark.parametrize("batch", LAUNCHES)
def test_three_layers(batch: tuple[bool, bool]) -> None:
    log = compare(layers_of(USUAL._replace(batch=batch)), 1e-5, 2e-5)
    assert sum(log.kernels.values()) == 3 * sum(LAUNCHES[batch])


def test_nchw() -> None:
    """Of odd size; the other test of NCHW has groups of columns as one access."""
    compare(layers_of(USUAL._replace(layout=NCHW, layers=2, batch=(False, False))), 1e-5, 2e-5)


@pytest.mark.parametrize(
    ("dtype", "layout"), [(torch.bfloat16, CHANNELS_LAST), (torch.float16, NCHW)]
)
def test_half_precision(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Maps and parameters."""
    case = Case(EXACT, 3, 8, layout, dtype, parameters=dtype)
    eps = torch.finfo(dtype).eps
    compare(layers_of(case), 2 * eps, 4 * eps)


def test_a_long_group() -> None:
    """Tables of addresses take 8 layers per launch."""
    log = compare(layers_of(USUAL._replace(shape=(1, *ODD[1:]), layers=10)), 2e-5, 1e-4)
    forward, backward = 2, 10 + 2 + 2  # t > 8; all, t > 8, and more than 8 later layers
    assert log.kernels["fill_tables"] == forward + backward - 1


def test_a_layer_after_many() -> None:
    """The softmax makes room for more than 16 layers; heads may have any width."""
    case = Case((2, 24, 3, 3), 1, 3)
    layer = layers_of(case)[0]
    keys = [torch.randn(2, 24) for _ in range(19)]
    values = [torch.randn_like(layer.z) for _ in keys]
    group = BaseGroup(tuple(wide(keys)), tuple(wide(values)), (None,) * 19)
    with ttir.launches_on_cpu(strict=True):
        out, _, _, saved = base_forward(*layer[:6], keys, values, False)
    norms = [n._replace(running_mean=None, running_var=None) for n in (layer.norm, layer.out_norm)]
    weights = BaseWeights(*wide(layer.weights))
    want, _ = base_tail_reference(
        *wide(layer[:2]), Norm(*wide(norms[0])), weights, Norm(*wide(norms[1])), None, group
    )
    assert error(out, want) < 1e-5
    assert saved == ()


def test_few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program has several tiles, several blocks per sum and several samples."""
    monkeypatch.setattr(kernels_base, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(kernels_base, "SUMS_WARPS", 4)
    monkeypatch.setattr(kernels_base, "SUMS_PIXELS", 8)
    monkeypatch.setattr(kernels_base, "HEAD_PROGRAMS", 4)
    kernels_base.base_plan.cache_clear()
    try:
        log = compare(layers_of(Case((9, 24, 9, 17), 2, 8)), 1e-5, 2e-5)
    finally:
        kernels_base.base_plan.cache_clear()
    programs = {name: n // log.kernels[name] for name, n in log.programs.items()}
    assert programs["retrieval_sums"] <= 4
    assert programs["softmax_backward"] <= 5
    assert programs["input_grads"] <= 3


def test_no_parameters_no_running_statistics() -> None:
    compare(layers_of(USUAL._replace(parameters=None, layers=2)), 1e-5, 2e-5)


def test_mean_of_100_deviations() -> None:
    """Variances do not cancel, though the first norm's running mean is far off."""
    layers = [
        layer._replace(z=layer.z + 100, norm=layer.norm._replace(bias=layer.norm.bias + 100))
        for layer in layers_of(USUAL._replace(layers=2))
    ]
    compare(layers, 1e-4, 1e-3)


def test_maps_at_odd_addresses() -> None:
    """Tables hold addresses that loads of 16 bytes may use."""

    def moved(x: Tensor) -> Tensor:
        flat = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
        return flat.as_strided(x.shape, x.stride()).copy_(x)

    case = USUAL._replace(layers=2, batch=(False, False))
    layers = [layer._replace(grad=moved(layer.grad)) for layer in layers_of(case)]
    assert all(layer.grad.data_ptr() % 16 for layer in layers)
    compare(layers, 1e-5, 2e-5)


def test_nan_spreads_as_in_torch() -> None:
    for name in ("z", "s", "grad"):
        layers = layers_of(USUAL._replace(layers=2, batch=(False, False)))
        layer = layers[1 if name == "grad" else 0]  # a first layer's softmax gets no gradient
        getattr(layer, name)[1, 5, 2, 7] = torch.nan
        want, (got, _) = reference(layers), from_kernels(layers)
        for found in ("0.out", "1.out", "0.value", "0.grad_z", "0.grad_s", "1.grad_z"):
            assert torch.equal(got[found].isnan(), want[found].isnan()), (name, found)


@pytest.mark.parametrize("recompute", [False, True])
def test_in_autograd(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operation as layers call it, values kept or made again."""
    monkeypatch.setattr(fused, "uses_triton", lambda z: True)
    layers = layers_of(USUAL)
    want, group, loss = reference(layers), BaseGroup(), torch.zeros(())
    maps = [(layer.z.clone().requires_grad_(), layer.s) for layer in layers]
    with ttir.launches_on_cpu(strict=True):
        for layer, (z, s) in zip(layers, maps, strict=True):
            out, group = fused.base_tail(z, s, *layer[2:6], group, recompute)
            loss = loss + (out * layer.grad).sum()
        grads = torch.autograd.grad(loss, [z for z, _ in maps])
    for k, grad in enumerate(grads):
        assert error(grad, want[f"{k}.grad_z"]) < 1e-5, k


def test_nothing_else_runs_on_the_device() -> None:
    layer = layers_of(USUAL)[0]
    with ttir.launches_on_cpu(), ttir.DeviceOperations() as others:
        out, key, value, saved = base_forward(*layer[:6], [], [], True)
        base_backward(layer.grad, None, *layer[:6], [key], [value], [], saved)
        again, *_, nothing = base_forward(*layer[:6], [], [], False)
    assert others.seen == []
    assert nothing == ()
    assert torch.equal(out, again)
