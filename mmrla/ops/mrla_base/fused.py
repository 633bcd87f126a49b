"""MRLA-base's retrieval over a list of values, which are never stacked or copied.

A value gets a gradient from every later layer of its group. Each layer's backward hands autograd
new tensors that nothing else refers to, and autograd adds the next ones onto the first in place.
At most two gradients a value are alive: what backward takes grows linearly with depth. Backward
itself never writes into a gradient it was given or handed out: hooks, ``retain_graph``,
``autograd.grad`` for some of the inputs, and values that are used elsewhere too may look at it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmrla.ops import passes
from mmrla.ops.custom_op import register, register_differentiable
from mmrla.ops.memory import dense, why_not_fused
from mmrla.ops.mrla_base.retrieve import weights_backward, weights_of
from mmrla.ops.query_key import accumulation_dtype


def _forward(query: Tensor, keys: list[Tensor], values: list[Tensor], head_channels: int) -> Tensor:
    return passes.weighted_sum(values, weights_of(query, keys, head_channels))


def _forward_fake(
    query: Tensor, keys: list[Tensor], values: list[Tensor], head_channels: int
) -> Tensor:
    return torch.empty_like(values[-1])


def _backward(
    grad: Tensor, query: Tensor, keys: list[Tensor], values: list[Tensor], head_channels: int
) -> list[Tensor]:
    weights = weights_of(query, keys, head_channels)
    grad_weights = passes.dots(grad, values)
    grad_query, grad_keys = weights_backward(grad_weights, weights, query, keys, head_channels)
    return [
        grad_query,
        *(g.clone() for g in grad_keys),
        *(passes.scaled(grad, weight) for weight in weights),
    ]


def _backward_fake(
    grad: Tensor, query: Tensor, keys: list[Tensor], values: list[Tensor], head_channels: int
) -> list[Tensor]:
    return [torch.empty_like(query), *map(torch.empty_like, keys), *(
        torch.empty_like(grad) for _ in values
    )]  # fmt: skip


_backward_op = register(
    "mmrla::base_backward",
    "(Tensor grad, Tensor query, Tensor[] keys, Tensor[] values, int head_channels) -> Tensor[]",
    _backward,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, keys, values, head_channels = inputs
    ctx.save_for_backward(query, *keys, *values)
    ctx.head_channels = head_channels


def _grads(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    query, *rest = ctx.saved_tensors
    t = len(rest) // 2
    found = _backward_op(dense(grad), query, rest[:t], rest[t:], ctx.head_channels)
    return found[0], found[1 : t + 1], found[t + 1 :], None


_op = register_differentiable(
    "mmrla::base",
    "(Tensor query, Tensor[] keys, Tensor[] values, int head_channels) -> Tensor",
    _forward,
    _forward_fake,
    _setup_context,
    _grads,
)


def mrla_base_fused(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], head_channels: int
) -> Tensor:
    """``o_t = sum_{s<=t} softmax_s(<q_t, k_s>_head / sqrt(d_k)) * V_s`` (Eq. 9).

    Arguments and result as in :func:`mmrla.ops.mrla_base.naive.mrla_base_naive`. Keeps references
    to the values for backward and nothing of their size besides. Has no second derivative.
    """
    dtype = accumulation_dtype(values[-1].dtype)
    return _op(
        query.to(dtype), [k.to(dtype) for k in keys], [dense(v) for v in values], head_channels
    )


def why_not(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], head_channels: int
) -> str | None:
    """Why :func:`mrla_base_fused` cannot run, or None; see :class:`mmrla.ops.Backend`."""
    dtypes = {v.dtype for v in values}
    if len(dtypes) > 1:
        return f"it takes values of one dtype, got {sorted(map(str, dtypes))}"
    return why_not_fused(values[-1])
