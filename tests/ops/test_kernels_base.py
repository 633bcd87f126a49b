"""MRLA-base's Triton kernels against float64, compiled as for a GPU and run on the CPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from mmrla.ops.kernels_base import base_backward, base_forward
from mmrla.ops.reference import BaseGroup, BaseWeights, Norm, base_tail_reference
from tests.ops.ttir import launches_on_cpu

MAPS = ("z", "s")
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
            )  # fmt: skip
        )
    return layers


def wide(tensors: tuple[Any, ...]) -> list[Any]:
    return [t.double() if isinstance(t, Tensor) else t for t in tensors]


def reference(layers: list[Layer]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
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
    found |= {n: g for n, g in zip(inputs, grads, strict=True)}
    return {n: t.detach() for n, t in found.items() if t is not None}


def running(k: int, norm: Norm, out_norm: Norm) -> dict[str, Tensor]:
    named = dict(
        running_mean=norm.running_mean, running_var=norm.running_var,
        out_running_mean=out_norm.running_mean, out_running_var=out_norm.running_var,
    )  # fmt: skip
    return {f"{k}.{n}": t.clone() for n, t in named.items() if t is not None}


NAMES = "z s norm_weight norm_bias query key value out_weight out_bias".split()


def from_kernels(layers: list[Layer]) -> tuple[dict[str, Tensor], Any]:
    """As :func:`reference`, from the kernels, with a log of their launches."""
    found: dict[str, Tensor] = {}
    keys, values, saved = [], [], []
    with launches_on_cpu(strict=True) as log:
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


def compare(case: Case, tolerance: float) -> Any:
    layers = layers_of(case)
    want = reference(layers)
    got, log = from_kernels(layers)
    errors = {}
    for name, value in want.items():
        if name not in got:
            assert "grad_of" in name, f"{name} is missing"
            continue
        assert got[name].shape == value.shape, name
        scale = value.abs().max().clamp(min=1e-2)
        errors[name] = float((got[name].double() - value).abs().max() / scale)
    wrong = {n: f"{e:.1e}" for n, e in errors.items() if not e <= tolerance}
    assert not wrong, wrong
    for name in ("0.out", "0.value", "0.grad_z", "0.grad_s"):
        assert got[name].dtype == case.dtype
        assert got[name].stride() == layers[0].z.stride()
    return log
