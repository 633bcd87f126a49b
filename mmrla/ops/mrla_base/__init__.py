"""The retrieval of MRLA-base as one operation (Eq. 6 and 9, Algorithms 1 and 2 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmrla.ops.batch_norm import BatchNorm
from mmrla.ops.dispatch import Backend, Op, always
from mmrla.ops.memory import check_one_device, check_weight_dtype
from mmrla.ops.mrla_base import fused
from mmrla.ops.mrla_base.deferred import Deferred
from mmrla.ops.mrla_base.naive import mrla_base_naive
from mmrla.ops.mrla_base.recompute import Recipe
from mmrla.ops.mrla_base.tail import mrla_base_tail_fused, mrla_base_tail_naive
from mmrla.ops.query_key import check_feature_map, check_head_channels, check_query_key_value
from mmrla.ops.residual_tail import check_tail, why_not_tail


def _check(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], head_channels: int
) -> None:
    if not keys or len(keys) != len(values):
        raise ValueError(
            "keys and values must hold one tensor for each layer so far, at least one, got "
            f"{len(keys)} keys and {len(values)} values"
        )
    if query.dim() != 2:
        raise ValueError(f"query must be [B, C], got {tuple(query.shape)}")
    check_head_channels(query.shape[1], head_channels)
    for s, (key, value) in enumerate(zip(keys, values, strict=True)):
        check_feature_map(f"values[{s}]", value)
        if key.shape != query.shape or value.shape[:2] != query.shape:
            raise ValueError(
                f"keys[{s}] must be [B, C] and values[{s}] [B, C, H, W] with the query's B and C, "
                f"got query {tuple(query.shape)}, key {tuple(key.shape)}, "
                f"value {tuple(value.shape)}"
            )
        if value.shape != values[-1].shape:
            raise ValueError(
                "all values of a group must have one shape, got "
                f"values[{s}].shape={tuple(value.shape)} and "
                f"values[-1].shape={tuple(values[-1].shape)}"
            )
    check_one_device(query, *keys, *values)


def _check_tail(
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
) -> None:
    check_tail(z, shortcut, norm, out_norm, scale)
    check_query_key_value(z, query_weight, key_weight, value_weight, head_channels)
    check_weight_dtype("value_weight", value_weight, z)
    if len(keys) != len(values):
        raise ValueError(f"one value a key, got {len(keys)} keys and {len(values)} values")
    if recipes is not None and len(recipes) != len(values):
        raise ValueError(f"one recipe a value, got {len(recipes)} and {len(values)} values")
    if deferred is not None and len(deferred) != len(values):
        raise ValueError(f"one of deferred a value, got {len(deferred)} and {len(values)} values")
    for s, (key, value) in enumerate(zip(keys, values, strict=True)):
        if key.shape != z.shape[:2] or value.shape != z.shape or value.dtype != z.dtype:
            raise ValueError(
                f"keys[{s}] must be [B, C] and values[{s}] shaped like z, in its dtype, got key "
                f"{tuple(key.shape)}, value {tuple(value.shape)} {value.dtype}, "
                f"z {tuple(z.shape)} {z.dtype}"
            )
    weights = (query_weight, key_weight, value_weight)
    check_one_device(z, shortcut, *norm[:4], *weights, *keys, *values, *out_norm[:4], scale)


mrla_base = Op(
    "mrla_base",
    _check,
    [
        Backend("fused", fused.mrla_base_fused, fused.why_not),
        Backend("naive", mrla_base_naive, always),
    ],
)
"""``mrla_base(query, keys, values, head_channels)``.

``o_t = sum_s softmax_s(<q_t, k_s>_head / sqrt(d_k)) * V_s``; shapes and errors as in
:func:`mmrla.ops.mrla_base.naive.mrla_base_naive`; ``backend=`` forces an implementation.
"""

mrla_base_tail = Op(
    "mrla_base_tail",
    _check_tail,
    [
        Backend("fused", mrla_base_tail_fused, why_not_tail),
        Backend("naive", mrla_base_tail_naive, always),
    ],
)
"""``mrla_base_tail(z, shortcut, norm, query_weight, key_weight, value_weight, keys, values,
head_channels, out_norm, scale=None, recipes=None, deferred=None)``.

``y = relu(norm(z) + shortcut)``, ``out = y + scale * out_norm(o)`` with o retrieved from the values
so far; arguments and result in :func:`mmrla.ops.mrla_base.tail.mrla_base_tail_naive`.
"""

__all__ = ["mrla_base", "mrla_base_tail"]
