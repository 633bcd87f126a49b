"""The end of a residual block with MRLA-base behind it, as one operation.

``y = relu(norm(z) + shortcut)``, ``V_t = DWConv3x3(y)``, ``o = mrla_base(...)`` over the values so
far, ``out = y + scale * out_norm(o)``. The fused version keeps ``z`` and ``shortcut`` for
backward, which the plain block keeps too, and one value a layer; it computes ``y`` and ``o`` again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrla.ops import passes
from mmrla.ops import residual_tail as tail
from mmrla.ops.batch_norm import BatchNorm
from mmrla.ops.custom_op import register, register_differentiable
from mmrla.ops.depthwise import moments, stencil
from mmrla.ops.memory import dense, is_compiling
from mmrla.ops.mrla_base.deferred import Deferred, Terms, can_defer
from mmrla.ops.mrla_base.group import Group, bound_to, current_group
from mmrla.ops.mrla_base.naive import mrla_base_naive
from mmrla.ops.mrla_base.recompute import Again, Recipe, Recomputed
from mmrla.ops.mrla_base.retrieve import weights_backward, weights_of
from mmrla.ops.query_key import (
    accumulation_dtype,
    query_key,
    query_key_backward,
    query_key_of,
)
from mmrla.ops.residual_tail import TailOutput


class BaseTailOutput(NamedTuple):
    """The tail's output, and this layer's key ``[B, C]`` and value ``[B, C, H, W]``.

    With ``recipes``, also how backward computes the value again; with ``deferred``, where later
    layers leave the value's gradient.
    """

    tail: TailOutput
    key: Tensor
    value: Tensor
    recipe: Recipe | None = None
    deferred: Deferred | None = None


def mrla_base_tail_naive(
    z: Tensor,
    shortcut: Tensor,
    norm: BatchNorm,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    head_channels: int,
    out_norm: BatchNorm,
    scale: Tensor | None = None,
    recipes: Sequence[Recipe] | None = None,
    deferred: Sequence[Deferred] | None = None,
) -> BaseTailOutput:
    """The tail in plain torch.

    Args:
        z: The output of the block's last convolution, ``[B, C, H, W]``.
        shortcut: The block's identity branch, shaped like ``z``.
        norm: The norm behind the last convolution.
        query_weight: The query's Conv1D, ``[1, 1, k]``, k odd.
        key_weight: The key's Conv1D, likewise.
        value_weight: The value's depthwise convolution, ``[C, 1, 3, 3]``.
        keys: The keys of the group's earlier layers, each ``[B, C]``; may be empty.
        values: Their values, each shaped like ``z``.
        head_channels: d_k; divides C.
        out_norm: The norm behind the attention.
        scale: ``[B]``, drop path's factor of the attention branch; None for 1.
        recipes: One for each of ``values``, as earlier tails returned them, so that the fused
            version keeps no values; None: it keeps them. This version keeps them always.
        deferred: One for each of ``values``, as earlier tails returned them, so that the fused
            version leaves the values' gradients there, see :mod:`mmrla.ops.mrla_base.deferred`.
            Autograd then sees no use of the values in it. None: autograd takes them, as always in
            this version.

    Returns:
        ``out`` with the batch's statistics that the norms used, and the layer's key and value.
    """
    y, *used = tail.residual_relu_naive(z, shortcut, norm)
    query, key = query_key(y, query_weight, key_weight)
    value = F.conv2d(y, value_weight, padding=1, groups=y.shape[1])
    o = mrla_base_naive(query, (*keys, key), (*values, value), head_channels)
    out = tail.output_naive(y, o, out_norm, scale, (used[0], used[1]))
    return BaseTailOutput(out, key, value)


def _value(y: Tensor, value_weight: Tensor) -> Tensor:
    return stencil(y, value_weight.to(accumulation_dtype(y.dtype)).transpose(0, 1))


def _forward(
    z: Tensor,
    shortcut: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    head_channels: int,
    scale: Tensor | None,
    *norms: Any,
) -> tuple[Tensor, ...]:
    norm, out_norm = tail.norms_of(norms)
    y, summary, statistics = tail.residual_relu(z, shortcut, norm)
    query, key = query_key_of(summary, query_weight, key_weight)
    value = _value(y, value_weight)
    weights = weights_of(query, [*keys, key], head_channels)
    if not out_norm.uses_batch:
        # The norm of a weighted sum goes into its weights: one pass.
        out_used, out_statistics = tail.resolve(out_norm, y)
        factor, shift = passes.scaled_affine(out_used, scale)
        shift = shift.expand_as(summary)
        out = passes.weighted_sum([*values, value], weights * factor, shift, y)
        return out, key, value, summary, *statistics, *out_statistics
    o = passes.weighted_sum([*values, value], weights)
    out_used, out_statistics = tail.resolve(out_norm, o)
    out = passes.add_norm_(y, o, out_used, scale)
    return out, key, value, summary, *statistics, *out_statistics


def _forward_fake(z: Tensor, *args: Any) -> tuple[Tensor, ...]:
    key, summary = (z.new_empty(z.shape[:2], dtype=accumulation_dtype(z.dtype)) for _ in "ks")
    maps = torch.empty_like(z), torch.empty_like(z)
    return maps[0], key, maps[1], summary, *tail.fake_statistics(args[-10:], z)


def _backward(
    grad: Tensor,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    z: Tensor,
    shortcut: Tensor,
    summary: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    later_grads: list[Tensor],
    later_factors: list[Tensor],
    deferred: bool,
    head_channels: int,
    scale: Tensor | None,
    *norms: Any,
) -> list[Tensor]:
    norm, out_norm = tail.restored_norms(norms)
    query, key = query_key_of(summary, query_weight, key_weight)
    keys = [*keys, key]
    y = passes.residual_relu(z, shortcut, norm, mean=False)[0]
    if len(values) < len(keys):
        values = [*values, _value(y, value_weight)]
    weights = weights_of(query, keys, head_channels)
    if out_norm.uses_batch:
        o = passes.weighted_sum(values, weights)
        grad_o, grad_out_weight, grad_out_bias = passes.norm_backward(o, grad, out_norm, scale)
        grad_weights, factors = passes.dots(grad_o, values), weights
    else:
        # o's gradient is a factor times grad, so that factors stand for it, and sums for o.
        grad_o = grad
        with_values = passes.dots(grad, values)
        with_o = (weights * with_values).sum(0)
        grad_out_weight, grad_out_bias = tail.frozen_norm_grads(with_o, grad, out_norm, scale)
        factor = passes.scaled_affine(out_norm, scale)[0]
        grad_weights, factors = factor * with_values, factor * weights
    grad_query, grad_keys = weights_backward(grad_weights, weights, query, keys, head_channels)
    if deferred:
        # In the other case grad itself stands for o's gradient, and nobody needs a copy.
        grad_values = [factors, grad_o if out_norm.uses_batch else grad_o.new_empty(0)]
    else:
        grad_values = [passes.scaled(grad_o, factor) for factor in factors[:-1]]
    own = passes.scaled(grad_o, factors[-1], grad_value)
    if later_grads:
        own = passes.weighted_sum(
            later_grads, torch.stack(later_factors), torch.zeros_like(summary), own
        )
    own_key = grad_keys[-1] if grad_key is None else grad_keys[-1] + grad_key
    grad_summary, grad_query_weight, grad_key_weight = query_key_backward(
        grad_query, own_key, summary, query_weight, key_weight
    )
    grad_value_weight = moments(own, y).sum(0).unsqueeze(1)
    taps = value_weight.to(summary.dtype).transpose(0, 1).flip(2, 3)
    pixels = z.shape[2] * z.shape[3]
    grad_y = stencil(own, taps, bias=grad_summary / pixels, residual=grad)
    grad_z, grad_sum, grad_weight, grad_bias = tail.residual_relu_backward(grad_y, y, z, norm)
    return [
        grad_z,
        grad_sum,
        grad_query_weight,
        grad_key_weight,
        grad_value_weight.to(value_weight.dtype),
        grad_weight,
        grad_bias,
        grad_out_weight,
        grad_out_bias,
        *(g.clone() for g in grad_keys[:-1]),
        *grad_values,
    ]


def _backward_fake(
    grad: Tensor,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    z: Tensor,
    shortcut: Tensor,
    summary: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    later_grads: list[Tensor],
    later_factors: list[Tensor],
    deferred: bool,
    *args: Any,
) -> list[Tensor]:
    if deferred:
        raise NotImplementedError("gradients are not deferred inside torch.compile")
    return [
        torch.empty_like(z),
        torch.empty_like(z),
        *(torch.empty_like(w) for w in (query_weight, key_weight, value_weight)),
        *(summary.new_empty(z.shape[1]) for _ in range(4)),
        *(torch.empty_like(key) for key in keys),
        *(torch.empty_like(z) for _ in keys),
    ]


_backward_op = register(
    "mmrla::base_tail_backward",
    "(Tensor grad, Tensor? grad_key, Tensor? grad_value, Tensor z, Tensor shortcut, "
    "Tensor summary, Tensor query_weight, Tensor key_weight, Tensor value_weight, Tensor[] keys, "
    "Tensor[] values, Tensor[] later_grads, Tensor[] later_factors, bool deferred, "
    f"int head_channels, Tensor? scale, {tail.SAVED_SCHEMA}) -> Tensor[]",
    _backward,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, keys, values, head_channels, scale = inputs[:9]
    norms, numbers = tail.saved_norms(inputs[9:], output[4:])
    own = output[3], *tensors[2:], scale, *norms
    group = current_group()
    again = group.recomputed
    kept = [*values, output[2]] if again is None else again.sources()
    ctx.save_for_backward(*tensors[:2], *own, *keys, *kept)
    ctx.recompute = None if again is None else again.without_sources()
    ctx.own_terms, ctx.terms = group.own_terms, group.terms
    ctx.options = head_channels, numbers, len(keys)
    ctx.set_materialize_grads(False)


def _grads(
    ctx: Any, grad: Tensor | None, grad_key: Tensor | None, grad_value: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    head_channels, numbers, t = ctx.options
    saved = ctx.saved_tensors
    tensors, scale, norms = saved[:6], saved[6], saved[7:15]
    keys, values = list(saved[15 : 15 + t]), list(saved[15 + t :])
    if ctx.recompute is not None:
        values = ctx.recompute.values(values)
    grad = torch.zeros_like(saved[0]) if grad is None else passes.laid_out(dense(grad), saved[0])
    later = ([], []) if ctx.own_terms is None else ctx.own_terms.take()
    found = _backward_op(
        grad, grad_key, grad_value, *tensors, keys, values, *later, bool(ctx.terms),
        head_channels, scale, *norms, *numbers,
    )  # fmt: skip
    small, grad_keys, grad_values = found[:9], found[9 : 9 + t], found[9 + t :]
    if ctx.terms:
        factors, grad_o = grad_values
        for terms, factor in zip(ctx.terms, factors, strict=False):
            terms.leave(grad_o if len(grad_o) else grad, factor)
        grad_values = [None] * t
    return *small[:5], grad_keys, grad_values, None, None, *tail.norm_grads(small[5:], norms)


_op = register_differentiable(
    "mmrla::base_tail",
    "(Tensor z, Tensor shortcut, Tensor query_weight, Tensor key_weight, Tensor value_weight, "
    f"Tensor[] keys, Tensor[] values, int head_channels, Tensor? scale, {tail.NORM_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _setup_context,
    _grads,
)


def mrla_base_tail_fused(
    z: Tensor,
    shortcut: Tensor,
    norm: BatchNorm,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    head_channels: int,
    out_norm: BatchNorm,
    scale: Tensor | None = None,
    recipes: Sequence[Recipe] | None = None,
    deferred: Sequence[Deferred] | None = None,
) -> BaseTailOutput:
    """See :func:`mrla_base_tail_naive`; keeps ``z``, ``shortcut`` and the values for backward.

    With ``recipes`` it keeps no value: backward makes them again from ``z`` and ``shortcut``. It
    keeps them as usual inside torch.compile, which decides that by itself.

    With ``deferred`` gradients of values are summed up by their own layers, as long as every
    earlier key came here untouched; else, and inside torch.compile, by autograd. Has no second
    derivative, and no gradient of ``scale`` and of the statistics.
    """
    z, shortcut, norms = dense(z), dense(shortcut), tail.flat_norms(norm, out_norm)
    values = [dense(v) for v in values]
    again = own_terms = recomputed = None
    terms: tuple[Terms, ...] = ()
    numbers: list[Any] = []

    def value_again(z: Tensor, shortcut: Tensor, weight: Tensor, *saved: Any) -> Tensor:
        used, _ = tail.restored_norms((*saved, *numbers))
        return _value(passes.residual_relu(z, shortcut, used, mean=False)[0], weight)

    if recipes is not None and not is_compiling():
        again = Again(value_again)
        recomputed = Recomputed(tuple(recipes), again)
    if deferred is not None and can_defer():
        own_terms = Terms()
        if deferred and all(d.reached_by(key) for d, key in zip(deferred, keys, strict=True)):
            terms = tuple(d.terms for d in deferred)
            values = [v.detach() for v in values]
    group = nullcontext() if is_compiling() else bound_to(Group(recomputed, own_terms, terms))
    with group:
        out, key, value, _, *statistics = _op(
            z, shortcut, query_weight, key_weight, value_weight, list(keys), values,
            head_channels, tail.factors(scale, z), *norms,
        )  # fmt: skip
    found = BaseTailOutput(TailOutput(out, *(s.detach() for s in statistics)), key, value)
    if own_terms is not None and key.grad_fn is not None:
        found = found._replace(deferred=Deferred(own_terms, key.grad_fn))
    if again is None:
        return found
    saved, options = tail.saved_norms(norms, found.tail[1:])
    numbers.extend(options)
    sources = (z, shortcut, value_weight, *saved)
    return found._replace(
        recipe=Recipe(again, tuple(None if s is None else s.detach() for s in sources))
    )
