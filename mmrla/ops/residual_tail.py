"""The parts that the tails of residual blocks share, whatever the layer attention.

``y = relu(norm(z) + shortcut)``, ``o = attention(y)``, ``out = y + scale * out_norm(o)``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrla.ops import passes
from mmrla.ops.batch_norm import BatchNorm, UsedNorm, statistics, used_norm
from mmrla.ops.memory import autocast_dtype, why_not_fused
from mmrla.ops.query_key import accumulation_dtype, check_feature_map

NORM_SCHEMA = ", ".join(
    f"Tensor? {p}weight, Tensor? {p}bias, Tensor? {p}mean, Tensor? {p}var, float {p}eps"
    for p in ("", "out_")
)
"""Schema of the arguments that :func:`flat_norms` makes."""


class TailOutput(NamedTuple):
    """What a tail returns: its output ``[B, C, H, W]`` and the batch's statistics.

    Mean and biased variance, ``[C]``, are for the running ones; empty where a norm took those.
    """

    out: Tensor
    mean: Tensor
    var: Tensor
    out_mean: Tensor
    out_var: Tensor


def flat_norms(norm: BatchNorm, out_norm: BatchNorm) -> tuple[Any, ...]:
    """Both norms as the arguments of a registered operation."""
    return (*norm, *out_norm)


def norms_of(flat: tuple[Any, ...]) -> tuple[BatchNorm, BatchNorm]:
    """The inverse of :func:`flat_norms`."""
    return BatchNorm(*flat[:5]), BatchNorm(*flat[5:])


def residual_relu_naive(
    z: Tensor, shortcut: Tensor, norm: BatchNorm
) -> tuple[Tensor, Tensor, Tensor]:
    """``relu(norm(z) + shortcut)`` in plain torch, and the statistics it used."""
    y, mean, var = norm(z)
    return torch.relu_(y.add_(shortcut)), mean, var


def output_naive(
    y: Tensor, o: Tensor, out_norm: BatchNorm, scale: Tensor | None, used: tuple[Tensor, Tensor]
) -> TailOutput:
    """``y + scale * out_norm(o)`` in plain torch; ``used`` are the first norm's statistics."""
    retrieved, mean, var = out_norm(o)
    if scale is not None:
        retrieved = retrieved * scale.to(retrieved.dtype)[:, None, None, None]
    return TailOutput(y + retrieved, *used, mean, var)


def resolve(norm: BatchNorm, x: Tensor) -> tuple[UsedNorm, tuple[Tensor, Tensor]]:
    """The norm with the statistics it uses on ``x``, and the batch's if it uses them."""
    if norm.mean is None or norm.var is None:
        mean, var = statistics(x)
        return used_norm(norm, mean, var, True), (mean, var)
    unused = [x.new_empty(0, dtype=accumulation_dtype(x.dtype)) for _ in range(2)]
    return used_norm(norm, norm.mean, norm.var, False), (unused[0], unused[1])


def residual_relu(
    z: Tensor, shortcut: Tensor, norm: BatchNorm
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """``y = relu(norm(z) + shortcut)``, its mean over pixels, and the batch's statistics if used.

    On a CPU the batch's statistics come from torch's own batch norm, so that ``y`` is, bit for bit,
    the plain block's.
    """
    if not norm.uses_batch or z.device.type != "cpu":
        used, statistics = resolve(norm, z)
        return *passes.residual_relu(z, shortcut, used), statistics
    mean, var = (z.new_zeros(z.shape[1], dtype=accumulation_dtype(z.dtype)) for _ in range(2))
    weight, bias = (None if p is None else p.to(mean.dtype) for p in (norm.weight, norm.bias))
    # With a momentum of 1 its running statistics become those of the batch.
    y = F.batch_norm(z, mean, var, weight, bias, True, 1.0, norm.eps)
    count = z.numel() // z.shape[1]
    return *passes.add_relu_(y, shortcut, z), (mean, var * ((count - 1) / count))


def fake_statistics(flat: tuple[Any, ...], x: Tensor) -> list[Tensor]:
    """Empty results for the four statistics of a tail."""
    dtype = accumulation_dtype(x.dtype)
    sizes = (0 if norm.mean is not None else x.shape[1] for norm in norms_of(flat))
    return [x.new_empty(size, dtype=dtype) for size in sizes for _ in range(2)]


def saved_norms(flat: tuple[Any, ...], used: tuple[Tensor, ...]) -> tuple[list[Any], list[Any]]:
    """What backward needs of the norms: tensors, with the statistics that were used, and numbers.

    Args:
        flat: As :func:`flat_norms` makes them.
        used: The four statistics that the operation returned.
    """
    tensors: list[Any] = []
    numbers: list[Any] = []
    for norm, mean, var in zip(norms_of(flat), used[::2], used[1::2], strict=True):
        taken = (mean, var) if norm.uses_batch else (norm.mean, norm.var)
        tensors += [norm.weight, norm.bias, *taken]
        numbers += [norm.eps, norm.uses_batch]
    return tensors, numbers


SAVED_SCHEMA = (
    ", ".join(
        f"Tensor? {p}weight, Tensor? {p}bias, Tensor {p}mean, Tensor {p}var" for p in ("", "out_")
    )
    + ", float eps, bool uses_batch, float out_eps, bool out_uses_batch"
)
"""Schema of what :func:`saved_norms` makes."""


def restored_norms(saved: tuple[Any, ...]) -> tuple[UsedNorm, UsedNorm]:
    """Both norms from what :func:`saved_norms` made."""
    tensors, (eps, uses_batch, out_eps, out_uses_batch) = saved[:8], saved[8:]
    first = BatchNorm(*tensors[:4], eps)  # type: ignore[call-arg]
    second = BatchNorm(*tensors[4:], out_eps)  # type: ignore[call-arg]
    return (
        used_norm(first, tensors[2], tensors[3], uses_batch),
        used_norm(second, tensors[6], tensors[7], out_uses_batch),
    )


def residual_relu_backward(
    grad: Tensor, y: Tensor, z: Tensor, norm: UsedNorm
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``y = relu(norm(z) + shortcut)``; ``grad`` is written over.

    Returns:
        Those of ``z``, the shortcut, the norm's weight and its bias.
    """
    grad = passes.relu_backward_(grad, y)
    grad_z, grad_weight, grad_bias = passes.norm_backward(z, grad, norm)
    return grad_z, grad, grad_weight, grad_bias


def frozen_norm_grads(
    with_o: Tensor, grad: Tensor, norm: UsedNorm, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias of ``scale_b * norm(o)`` with running statistics.

    Args:
        with_o: ``sum_hw grad * o``, ``[B, C]``.
        grad: The result's gradient.
        norm: The norm.
        scale: ``[B]``, or None for 1.
    """
    total = grad.sum(dim=(2, 3), dtype=with_o.dtype)
    if scale is not None:
        with_o, total = scale[:, None] * with_o, scale[:, None] * total
    grad_bias = total.sum(0)
    inverse_std = torch.rsqrt(norm.var + norm.eps)
    return (with_o.sum(0) - norm.mean * grad_bias) * inverse_std, grad_bias


def check_tail(
    z: Tensor, shortcut: Tensor, norm: BatchNorm, out_norm: BatchNorm, scale: Tensor | None
) -> None:
    """Raise unless the arguments that all tails share fit each other."""
    check_feature_map("z", z)
    check_feature_map("shortcut", shortcut)
    if shortcut.shape != z.shape:
        raise ValueError(
            "shortcut must have the shape of z, got "
            f"shortcut.shape={tuple(shortcut.shape)} and z.shape={tuple(z.shape)}"
        )
    if shortcut.dtype != z.dtype:
        raise TypeError(
            f"shortcut must have the dtype of z, got {shortcut.dtype} and z.dtype={z.dtype}"
        )
    norm.check("norm", z)
    out_norm.check("out_norm", z)
    if scale is not None and scale.shape != z.shape[:1]:
        raise ValueError(f"scale must be [{z.shape[0]}], got {tuple(scale.shape)}")


def why_not_tail(z: Tensor, *args: Any, **kwargs: Any) -> str | None:
    """Why no fused tail can run, or None."""
    if autocast_dtype(z) != z.dtype:
        return f"under autocast to {autocast_dtype(z)} z must have that dtype, got {z.dtype}"
    return why_not_fused(z)


def factors(scale: Tensor | None, x: Tensor) -> Tensor | None:
    """Drop path's factors in the accumulation dtype, without a gradient."""
    return None if scale is None else scale.detach().to(accumulation_dtype(x.dtype))


def norm_grads(grads: list[Tensor], saved: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of what :func:`flat_norms` makes.

    Args:
        grads: Those of weight and bias of both norms, in the accumulation dtype.
        saved: The tensors of :func:`saved_norms`.
    """
    flat: list[Tensor | None] = []
    for first in (0, 1):
        own = zip(grads[2 * first : 2 * first + 2], saved[4 * first : 4 * first + 2], strict=True)
        flat += [None if p is None else g.to(p.dtype) for g, p in own]
        flat += [None, None, None]
    return tuple(flat)
