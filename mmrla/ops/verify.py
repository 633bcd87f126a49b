"""Compares kernels with plain torch on the device, the first time a process needs them.

A kernel that compiles, and that is correct in Triton's interpreter, can still be wrong on a GPU. So
before a compiled variant is used, its operation runs once on generated tensors of the call's dtype,
layout and shape, with the smallest batch that uses the same variants, and the output and every
gradient are compared with the reference in float64. With generated tensors no gradient is zero by
chance, as after a norm that starts with gamma = 0. It takes a few milliseconds per variant in
addition to compiling.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mmrla.ops import reference
from mmrla.ops.reference import BaseGroup, BaseWeights, LightWeights, Norm

TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 5e-2}
"""Norm of the difference over the norm of the expected value; a wrong tap gives 0.3 and more."""
LARGEST = 1 << 25
"""Maximum elements of a generated map, unless one sample has more."""
WEIGHT_NAMES = {LightWeights: ("query", "key", "value", "lambda_t"),
                BaseWeights: ("query", "key", "value")}  # fmt: skip

_reasons: dict[tuple[Any, ...], str | None] = {}
_failed: dict[tuple[type, torch.device], str] = {}


def reason_against(
    z: Tensor,
    shortcut: Tensor,
    norm: Norm,
    weights: LightWeights | BaseWeights,
    out_norm: Norm,
    drop: Tensor | None = None,
    group: BaseGroup | None = None,
    recompute: bool = False,
) -> str | None:
    """Why the kernels of a tail must not run these arguments, or None if they are correct.

    Warns once per operation and device if they are wrong.
    """
    kind = type(weights)
    if (kind, z.device) in _failed:
        return _failed[kind, z.device]
    layers = 1 if group is None else min(len(group.keys), 2) + 1
    tensors = (z, shortcut, *norm[:2], *weights[:-1], *out_norm[:2])
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    channels_last = z.is_contiguous(memory_format=torch.channels_last) and not z.is_contiguous()
    key = (
        kind, z.device, z.dtype, z.shape[1:], _variant(z.shape, channels_last, z.device),
        weights.head_channels, weights.query.numel(), weights.key.numel(), norm.batch,
        out_norm.batch, drop is None, grad, layers,
    )  # fmt: skip
    if key in _reasons:
        return _reasons[key]
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is captured and its kernels were never checked: run a step before that"

    def case_of(shape: tuple[int, ...]) -> Case:
        return Case(
            kind, shape, weights.head_channels, z.dtype, z.device, channels_last,
            (norm.batch, out_norm.batch), drop is not None, layers,
            (weights.query.numel(), weights.key.numel()),
        )  # fmt: skip

    shape = _part(z.shape, channels_last, z.device)
    try:
        reason = _compare(case_of(shape), grad)
    except torch.cuda.OutOfMemoryError:  # then perhaps another variant of the same kernels
        reason = _compare(case_of((min(2, len(z)), *z.shape[1:])), grad)
    _reasons[key] = reason
    if reason is not None:
        _failed[kind, z.device] = reason
        warnings.warn(f"{reason}. Plain torch runs instead; please report this.", stacklevel=2)
    return reason


def _variant(shape: tuple[int, ...], channels_last: bool, device: torch.device) -> Any:
    """Compile-time constants that follow from the shape."""
    from mmrla.ops import blocks

    return blocks.variants(tuple(shape), channels_last, blocks.multiprocessors(device))


def _part(shape: torch.Size, channels_last: bool, device: torch.device) -> tuple[int, ...]:
    """The shape with the smallest batch for its kernels' variants, if memory allows."""
    from mmrla.ops import blocks

    rest = shape[1:]
    fewer = blocks.small_batch(shape, channels_last, blocks.multiprocessors(device))
    least = 2 if tuple(rest[1:]) == (1, 1) else 1  # a batch norm needs two values
    return (max(least, min(fewer, LARGEST // math.prod(rest))), *rest)


class Case:
    """Generated arguments of a tail, also in float64.

    Args:
        kind: :class:`LightWeights` or :class:`BaseWeights`.
        shape: ``[B, C, H, W]``.
        head_channels: d_k.
        dtype: Of the maps; weights are float32 or wider.
        device: Of all tensors.
        channels_last: Layout of the maps; NCHW otherwise.
        batch: Whether each norm uses the batch's statistics.
        drop: Whether there are drop path factors; every third is 0.
        layers: Layers of the group, MRLA-base.
        kernel_sizes: Of query and key.
    """

    def __init__(
        self, kind: type, shape: tuple[int, ...], head_channels: int,
        dtype: torch.dtype, device: torch.device, channels_last: bool = False,
        batch: tuple[bool, bool] = (True, True), drop: bool = False, layers: int = 1,
        kernel_sizes: tuple[int, int] = (3, 3),
    ) -> None:  # fmt: skip
        self.kind, self.shape, self.head_channels, self.batch = kind, shape, head_channels, batch
        generator = torch.Generator().manual_seed(0)  # the global one stays as it is
        layout = torch.channels_last if channels_last else torch.contiguous_format
        channels = shape[1]
        wide = reference.accumulation_dtype(dtype)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(device, wide)

        def draw_map() -> Tensor:
            return draw(*shape).to(dtype).contiguous(memory_format=layout)

        names = WEIGHT_NAMES[kind]
        sizes = dict(query=(1, 1, kernel_sizes[0]), key=(1, 1, kernel_sizes[1]),
                     value=(channels, 1, 3, 3), lambda_t=(channels,))  # fmt: skip
        self.drop = None
        if drop:
            self.drop = (torch.arange(shape[0]) % 3 != 1).float().mul(1.25).to(device)
        self.leaves: dict[str, Tensor] = {}
        self.running: dict[str, Tensor] = {}
        self.grads: list[Tensor] = []
        for t in range(layers):
            at = f"[{t}]" if layers > 1 else ""
            self.leaves |= {f"z{at}": draw_map(), f"shortcut{at}": draw_map().relu_()}
            for name in ("norm", "out_norm"):
                self.leaves[f"{name}.weight{at}"] = draw(channels).abs() + 0.5
                self.leaves[f"{name}.bias{at}"] = draw(channels) * 0.5
                self.running[f"{name}.running_mean{at}"] = draw(channels) * 0.5
                self.running[f"{name}.running_var{at}"] = draw(channels).abs() + 0.5
            for name in names:  # small queries and keys: a saturated softmax has noisy gradients
                scale = 0.125 if name in ("query", "key") else 0.5
                self.leaves[f"{name}{at}"] = draw(*sizes[name]) * scale
            self.grads.append(draw_map())
        self.layers = layers

    def run(self, light: Any, base: Any, wide: bool, grad: bool = True) -> dict[str, Tensor]:
        """Outputs, updated statistics and gradients by name.

        Args:
            light: MRLA-light's tail.
            base: MRLA-base's tail.
            wide: In float64.
            grad: Whether gradients are wanted.
        """
        dtype = torch.float64 if wide else None
        leaves = {
            k: v.detach().to(dtype or v.dtype).clone(memory_format=torch.preserve_format)
            .requires_grad_(grad) for k, v in self.leaves.items()
        }  # fmt: skip
        running = {k: v.to(dtype or v.dtype, copy=True) for k, v in self.running.items()}
        drop = None if self.drop is None else self.drop.to(dtype or self.drop.dtype)
        found: dict[str, Tensor] = {}
        outs, group = [], BaseGroup()
        with torch.set_grad_enabled(grad), torch.autocast(self.grads[0].device.type, enabled=False):
            for t in range(self.layers):
                at = f"[{t}]" if self.layers > 1 else ""
                norms = [
                    Norm(leaves[f"{n}.weight{at}"], leaves[f"{n}.bias{at}"],
                         running[f"{n}.running_mean{at}"], running[f"{n}.running_var{at}"],
                         0.1, 1e-5, batch)
                    for n, batch in zip(("norm", "out_norm"), self.batch, strict=True)
                ]  # fmt: skip
                own = [leaves[f"{n}{at}"] for n in WEIGHT_NAMES[self.kind]]
                weights = self.kind(*own, self.head_channels)
                maps = (leaves[f"z{at}"], leaves[f"shortcut{at}"])
                if self.kind is LightWeights:
                    out = light(*maps, norms[0], weights, norms[1], drop)
                else:
                    out, group = base(*maps, norms[0], weights, norms[1], drop, group)
                found[f"out{at}"] = out.detach()
                outs.append(out)
        if any(self.batch):
            found |= running
        if grad:
            grads = [g.to(o.dtype) for g, o in zip(self.grads, outs, strict=True)]
            tensors = torch.autograd.grad(outs, list(leaves.values()), grads, allow_unused=True)
            for (name, leaf), g in zip(leaves.items(), tensors, strict=True):
                found[f"grad of {name}"] = torch.zeros_like(leaf) if g is None else g
        return found

    def errors(self, light: Any, base: Any, grad: bool = True) -> dict[str, float]:
        """Relative errors of tails against the reference in float64, by name."""
        got = self.run(light, base, False, grad)
        expected = self.run(
            reference.light_tail_reference, reference.base_tail_reference, True, grad
        )
        return {name: _error(got[name].double(), x) for name, x in expected.items()}


def _error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of what is expected; nan if there is one in ``got``."""
    # Rounding is all there is if the exact result is 0, as of a query in a group's first layer.
    floor = 1e-3 * math.sqrt(expected.numel())
    return ((got - expected).norm() / expected.norm().clamp(min=floor)).item()


def _compare(case: Case, grad: bool) -> str | None:
    """Describe the errors of the fused tail of a case; None if it is correct."""
    from mmrla.ops import fused

    name = "mrla_light_tail" if case.kind is LightWeights else "mrla_base_tail"
    try:
        errors = case.errors(fused.light_tail, fused.base_tail, grad)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler or a launch may raise
        return f"{name}: its kernels fail {_where(case)}: {type(error).__name__}: {error}"
    tolerance = TOLERANCES[case.grads[0].dtype]
    wrong = {k: e for k, e in errors.items() if not e <= tolerance}
    if not wrong:
        return None
    listed = ", ".join(f"{k} {e:.2g}" for k, e in wrong.items())
    return (
        f"{name}: its kernels differ from plain torch {_where(case)}; relative errors above "
        f"{tolerance}: {listed} (kernels to look at: {', '.join(kernels_behind(case.kind, wrong))})"
    )


def _where(case: Case) -> str:
    """Device, versions and arguments of a case."""
    device = case.grads[0].device
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "none"
    return (
        f"on {hardware} (torch {torch.__version__}, Triton {triton}, "
        f"{case.grads[0].dtype}, shape {case.shape}, {case.head_channels} channels per head)"
    )


SUSPECTS = {
    LightWeights: {
        "out": "attention",
        "running": "channel_sums, attention",
        "grad of value": "attention, parameter_grads",
        "grad of lambda": "attention, parameter_grads",
        "grad of query": "gate_backward",
        "grad of key": "gate_backward",
        "grad of": "input_grads, input_norm_grads",
    },
    BaseWeights: {
        "out": "make_value, retrieve, add_retrieved",
        "running": "channel_sums, make_value, retrieve",
        "grad of value": "input_grads",
        "grad of query": "softmax_backward",
        "grad of key": "softmax_backward",
        "grad of": "retrieval_sums, input_grads",
    },
}
"""Kernels that compute a result, by the prefix of its name; the first match counts."""


def kernels_behind(kind: type, names: Iterable[str]) -> list[str]:
    """The kernels that compute the named results, to look at first."""
    found = (
        next((kernels for start, kernels in SUSPECTS[kind].items() if start in name), "")
        for name in names
    )
    return list(dict.fromkeys(", ".join(filter(None, found)).split(", ")))
